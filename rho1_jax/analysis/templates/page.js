// The values of a token under the pointer; or of one that the arrow keys have come to, where a
// passage is a single stop of the Tab key.
const tip = document.getElementById("tip");
const names = ["policy loss", "reference loss", "score", "rank percentile"];
let current = null; // the token that the keys have come to

const visible = text =>
  text.replace(/\n/g, "\u21b5").replace(/ /g, "\u2423") || "part of a character";
const item = (tag, textContent) => Object.assign(document.createElement(tag), { textContent });

function show(token) {
  tip.hidden = !token;
  if (!token) return;
  const rows = [["token", visible(token.textContent)]];
  token.dataset.v.split(" ").forEach((v, i) => { if (v !== "-") rows.push([names[i], v]); });
  tip.replaceChildren(...rows.flatMap(([k, v]) => [item("dt", k), item("dd", v)]));
  const box = boxOf(token);
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.top = (below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight) + "px";
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
}

function boxOf(token) {
  return token.getClientRects()[0] ?? token.getBoundingClientRect();
}

function moveTo(token) {
  current?.classList.remove("at");
  current = token;
  current?.classList.add("at");
  current?.scrollIntoView({ block: "nearest" });
  show(current);
}

// The token on the next line in that direction that is nearest from side to side.
function onNextLine(tokens, direction) {
  const from = boxOf(current);
  const ahead = tokens.map(token => ({ token, box: boxOf(token) }))
    .filter(({ box }) => direction * (box.top - from.top) > from.height / 2);
  if (!ahead.length) return current;
  const line = Math.min(...ahead.map(({ box }) => direction * box.top));
  const aside = ({ box }) => Math.abs(box.left - from.left);
  return ahead.filter(({ box }) => direction * box.top < line + from.height / 2)
    .reduce((a, b) => (aside(b) < aside(a) ? b : a)).token;
}

for (const passage of document.querySelectorAll(".text[tabindex]")) {
  const tokens = [...passage.querySelectorAll("[data-v]")];
  let place = 0;
  const keys = {
    ArrowRight: () => tokens[Math.min(place + 1, tokens.length - 1)],
    ArrowLeft: () => tokens[Math.max(place - 1, 0)],
    ArrowDown: () => onNextLine(tokens, 1),
    ArrowUp: () => onNextLine(tokens, -1),
    Home: () => tokens[0],
    End: () => tokens.at(-1),
  };
  passage.addEventListener("focus", () => {
    if (passage.matches(":focus-visible")) moveTo(tokens[place]);
  });
  passage.addEventListener("blur", () => moveTo(null));
  passage.addEventListener("keydown", event => {
    if (event.key === "Escape") tip.hidden = true;
    if (!keys[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const next = current ? keys[event.key]() : tokens[place];
    place = tokens.indexOf(next);
    moveTo(next);
  });
}

document.addEventListener("pointerover", event => show(event.target.closest?.("[data-v]")));
addEventListener("scroll", () => show(tip.hidden ? null : current), { passive: true });
