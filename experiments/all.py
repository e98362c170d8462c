"""Every experiment, and one page with all of them: the paper's numbers beside ours.

    python -m experiments.all [--scale=tiny] [--seeds=3] [--data=DIR] --out=runs/experiments

Writes --out/NAME/ for each experiment, --out/index.html, which needs no other file, and the same in
Markdown, --out/README.md, which shows the figures in the folders.
"""

import base64
import dataclasses
import html
import importlib
import re
import sys
from pathlib import Path

from experiments import study
from experiments.study import Study
from rho1_jax.errors import InputError

NAMES = (
    "token_dynamics",
    "math_pretraining",
    "general_pretraining",
    "self_reference",
    "select_ratio",
    "weak_to_strong",
    "downstream_correlation",
    "selected_tokens",
    "scoring_functions",
    "schedules",
    "utility_scores",
    "rows_quality",
    "finetuning",
)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
table { border-collapse: collapse; font-size: 0.82rem; display: block; overflow-x: auto }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left }
td:nth-child(n+2) { font-variant-numeric: tabular-nums; white-space: nowrap }
img { max-width: 100%; height: auto } code { font-size: 0.85em } pre { white-space: pre-wrap }
section > p:last-child { color: #555; font-size: 0.82rem } nav a { margin-right: 1rem }
"""


def run(this: Study) -> None:
    done = []
    for name in NAMES:
        module = importlib.import_module(f"experiments.{name}")
        # One folder deeper than a lone experiment, so the pool lies in --out.
        part = dataclasses.replace(this, name=name, out=this.out / name)
        try:
            module.run(part)
        except InputError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        done.append(name)
        (this.out / "index.html").write_text(page(this.out, done))
        (this.out / "README.md").write_text(markdown(this.out, done))
    if not done:
        raise InputError(f"No experiment can run at --scale={this.scale} with this text.")
    print(this.out / "index.html")


def page(out: Path, names: list[str]) -> str:
    """The page of the experiments in out/NAME/, pictures inline."""
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    sections = "".join(_section(out / name) for name in names)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>rho1_jax: experiments</title><style>{STYLE}</style>"
        f"<h1>Experiments</h1><nav>{links}</nav>{sections}</html>\n"
    )


def markdown(out: Path, names: list[str]) -> str:
    """The same as Markdown, for a README.md in `out`."""
    sections = ["# Experiments"]
    for name in names:
        title, about = _about(name)
        summary = (out / name / "summary.md").read_text().strip()
        sections += [f"## {title}", *about, re.sub(r"\]\((\w+\.png)\)", rf"]({name}/\1)", summary)]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(sections)) + "\n"


def _about(name: str) -> tuple[str, list[str]]:
    """Title and paragraphs of an experiment's docstring, without its command."""
    doc = importlib.import_module(f"experiments.{name}").__doc__ or ""
    title, *rest = doc.strip().split("\n\n")
    return title, [part for part in rest if not part.startswith(" ")]


def _section(folder: Path) -> str:
    name = folder.name
    title, paragraphs = _about(name)
    about = "".join(f"<p>{html.escape(part)}</p>" for part in paragraphs)
    parts = (folder / "summary.md").read_text().strip().split("\n\n")
    body = "".join(_html(part.strip(), folder) for part in parts)
    return f'<section id="{name}"><h2>{html.escape(title)}</h2>{about}{body}</section>'


def _html(part: str, folder: Path) -> str:
    """A paragraph, table or picture of a summary.md."""
    picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", part)
    if picture:
        data = base64.b64encode((folder / picture[2]).read_bytes()).decode()
        return f'<p><img alt="{html.escape(picture[1])}" src="data:image/png;base64,{data}"></p>'
    if not part.startswith("|"):
        text = re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(part))
        return f"<p>{text}</p>"
    cells = (line.removeprefix("| ").removesuffix(" |").split(" | ") for line in part.splitlines())
    head, _, *lines = cells
    rows = [_row("th", head)] + [_row("td", line) for line in lines]
    return f"<table>{''.join(rows)}</table>"


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(c.strip())}</{tag}>' for c in cells)}</tr>"


if __name__ == "__main__":
    sys.exit(study.main(run))
