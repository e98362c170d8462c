"""The page's script in a real browser: keys in a passage. Skips where Chromium is not installed."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from rho1_jax.analysis import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
           "--disable-background-networking", "--disable-component-update", "--disable-quic",
           "--window-size=400,800", "--dump-dom")  # fmt: skip
DRIVER = """
<script>
const passage = document.querySelector(".text"), seen = [];
const press = key => {
  const event = new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true });
  passage.dispatchEvent(event);
  seen.push([key, document.querySelector(".at")?.textContent, tip.hidden ? "" : tip.textContent,
    event.defaultPrevented]);
};
passage.focus();
KEYS.forEach(press);
passage.dispatchEvent(new Event("blur")); // a window without focus sends none
seen.push(["blurred", document.querySelector(".at")?.textContent ?? "", tip.hidden ? "" : "shown"]);
document.body.append(Object.assign(document.createElement("output"),
  { textContent: JSON.stringify(seen) }));
</script></html>
"""


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_arrow_keys_go_from_token_to_token(tmp_path):
    pieces = ["one ", "two\n", "three ", "four"]
    loss = np.array([np.nan, 1.0, 2.0, 3.0])  # the first has none and is passed over
    html = page.passage(pieces, loss, loss / 2, loss / 2, np.array([False, True, True, False]))
    keys = ["Home", "ArrowDown", "ArrowLeft", "ArrowRight", "ArrowUp", "End", "Escape", "Tab"]
    whole = str(page.render("text.html", title="", lede="", note="", items=(), passage=html))
    driver = DRIVER.replace("KEYS", json.dumps(keys))
    (tmp_path / "page.html").write_text(whole.replace("</html>", driver))
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "page.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    *steps, blurred = json.loads(found[1].replace("&lt;", "<").replace("&amp;", "&"))
    at = ["two\n", "four", "three ", "four", "two\n", "four", "four", "four"]  # below two is four
    assert [step[1] for step in steps] == at
    assert "policy loss3.000reference loss1.500score1.500rank percentile100" in steps[1][2]
    assert [bool(step[2]) for step in steps] == [True] * 6 + [False, False]  # Escape puts it away
    assert [step[3] for step in steps] == [True] * 6 + [False, False]  # Tab goes on to what follows
    assert blurred == ["blurred", "", ""]
