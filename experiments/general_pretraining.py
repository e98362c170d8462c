"""SLM on general text: web, code and mathematics 6:3:1, domain by domain (Figure 5).

    python -m experiments.general_pretraining [--scale=tiny] [--seeds=3] [--data=DIR]
        --out=runs/general_pretraining

Embedded: web is the corpus of configs/math.py, code the source files of installed packages, and
mathematics worked problems; the reference reads other problems and documented functions. With
--data: DIR/web/*, DIR/code/*, DIR/math/* and DIR/clean/*.
"""

import ast
import dataclasses
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from experiments.lab import results, study
from experiments.lab.study import QA, Study
from rho1_jax import files
from rho1_jax.config import source
from rho1_jax.data import builtin
from rho1_jax.errors import InputError

WEIGHTS = {"web": 6.0, "code": 3.0, "math": 1.0}
CHARACTERS = 1_500_000  # of code, embedded


def run(this: Study) -> None:
    if this.data:
        texts, clean = Path(this.data), source("files:clean/*", text=QA)
    elif this.scale in ("tiny", "debug"):
        texts, clean = this.pool / "general", source("files:functions.jsonl")
        write_texts(texts)
    else:
        raise InputError("general_pretraining has no text for this scale: give it --data=DIR.")

    def adapt(c: ConfigDict) -> None:
        c.data.root = str(texts.resolve())
        c.data.corpus, c.data.clean = ConfigDict(), ConfigDict({"clean": clean})
        for name, weight in WEIGHTS.items():
            spec = f"files:{name}/*" if this.data else f"files:{name}.jsonl"
            c.data.corpus[name] = source(spec, weight=weight)
        if not this.data:
            c.data.corpus.web.spec = "builtin:pages"
            c.data.clean.problems = source("builtin:problems")

    adapted = dataclasses.replace(this, data="", adapt=adapt)
    runs = adapted.run(
        {(m, s): c for s in range(this.seeds) for m, c in adapted.methods(s).items()}
    )
    domains = [*WEIGHTS, *adapted.targets]
    text = [
        results.comparison(runs, domains),
        results.save(this, results.figure_of_curves(runs, domains)),
        results.beside_paper(
            ("SLM against CLM at matched tokens (here: held-out loss, nats per token)",
             "6.8 % better on average over 15 benchmarks, 1.1B, 80B tokens",
             results.differences(runs, "SLM", domains)),
        ),
    ]  # fmt: skip
    results.write(this, runs, results.rows(runs), "\n\n".join(text))


def write_texts(folder: Path) -> None:
    """code.jsonl, math.jsonl and functions.jsonl in `folder`, once: from installed packages and
    the generator of problems."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = (builtin.worked(random.Random(f"general/{i}")) for i in range(2000))
    texts = {
        "math": problems,
        "code": _sources("scipy"),
        "functions": _documented_functions("numpy"),
    }
    for name, found in texts.items():
        path = folder / f"{name}.jsonl"
        if path.exists():
            continue
        with files.replacing(path) as f:
            left = CHARACTERS
            for text in found:
                left -= len(text)
                if left < 0:
                    break
                f.write(f"{json.dumps({'text': text})}\n".encode())


def _sources(package: str) -> Iterator[str]:
    """The source files of an installed package, read and never imported, tests left out."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"general_pretraining reads the source of {package!r}: install it.")
    folder = Path(found.origin).parent
    for file in sorted(folder.rglob("*.py")):
        if "tests" not in file.relative_to(folder).parts:
            yield file.read_text()


def _documented_functions(package: str) -> Iterator[str]:
    """Short functions with a docstring."""
    for text in _sources(package):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            function = ast.get_source_segment(text, node) or ""
            if 200 < len(function) < 2000:
                yield function


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
