"""Every experiment, and one page with all of them: the paper's numbers beside ours.

    python -m experiments.all [--scale=tiny] [--seeds=3] [--data=DIR] --out=runs/experiments

Writes --out/NAME/ for each experiment, --out/index.html, which needs no other file, and the same in
Markdown, --out/README.md, which shows the figures in the folders.
"""

import base64
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.lab import results, study
from experiments.lab.study import Study
from rho1_jax import files
from rho1_jax.analysis import page as pages
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
        files.write(this.out / "index.html", page(this.out, done))
        files.write(this.out / "README.md", markdown(this.out, done))
    if not done:
        raise InputError(f"No experiment can run at --scale={this.scale} with this text.")
    print(this.out / "index.html")


def page(out: Path, names: list[str]) -> str:
    """The page of the experiments in out/NAME/, pictures inline."""
    sections = [_section(out / name) for name in names]
    return pages.render(
        "experiments.html", folder=results.TEMPLATES, title="Experiments", sections=sections
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


def _section(folder: Path) -> dict[str, Any]:
    title, about = _about(folder.name)
    text = "\n\n".join([*about, (folder / "summary.md").read_text()])
    return {"name": folder.name, "title": title, "body": _html(text, folder)}


def _html(text: str, folder: Path) -> Markup:
    """Markdown as HTML, its pictures of `folder` inline; HTML in it is shown as text."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in (child for block in tokens for child in block.children or []):
        if token.type == "image":
            data = base64.b64encode((folder / str(token.attrs["src"])).read_bytes()).decode()
            token.attrs["src"] = f"data:image/png;base64,{data}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
