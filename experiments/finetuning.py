"""Does a base pretrained with selection fine-tune better? SLM and its controls, then answers only.

    python -m experiments.finetuning [--scale=tiny] [--seeds=3] --out=runs/finetuning

The runs of experiments/math_pretraining.py, the base they began with and the reference, each
fine-tuned by configs/sft.py: the same questions and answers, loss on the answers only. Embedded:
problems as the reference has read them. With --data: DIR/sft/* of question and answer.
"""

import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import sft
from experiments.lab import results, study, tables
from experiments.lab.study import Study
from rho1_jax import files, jsonfile
from rho1_jax.data import builtin
from rho1_jax.errors import InputError

N_PROBLEMS = 3000
LEFT_OUT = ("inverse selection",)  # a base that nobody would fine-tune
DOMAIN = "sft"


def run(this: Study) -> None:
    root = _questions(this)
    pretrained = this.run(
        {
            (method, seed): config
            for seed in range(this.seeds)
            for method, config in this.methods(seed).items()
            if method not in LEFT_OUT
        }
    )
    bases = {key: str(folder) for key, folder in pretrained.items()}
    for seed in range(this.seeds):
        bases["(base)", seed] = this.config(seed).model.init
        bases["(reference)", seed] = str(pretrained["SLM", seed] / "reference")
    runs = this.run({key: sft_config(this, key[1], base, root) for key, base in bases.items()})
    rows = [_row(method, seed, folder) for (method, seed), folder in runs.items()]
    text = [
        _table(runs, rows),
        results.save(this, results.figure_of_curves(runs, [DOMAIN])),
        results.beside_paper(
            ("fine-tuned from SLM (paper: accuracy on MATH with tools, 1.1B and 7B; here: held-out "
             "loss on the answers against fine-tuning from CLM, nats per token)",
             "40.6 % and 51.8 %",
             results.differences(runs, "SLM", [DOMAIN])),
        ),
    ]  # fmt: skip
    results.write(this, runs, rows, "\n\n".join(text))


def sft_config(this: Study, seed: int, base: str, root: Path) -> ConfigDict:
    """configs/sft.py from `base`; small models take the steps of their pretraining again, at half
    its learning rate."""
    own, c = this.config(seed), ConfigDict(sft.get_config().to_dict())
    c.seed = seed
    c.model.init = base
    c.data.root = str(root.resolve())
    c.data.seq_len = own.data.seq_len
    c.model.dtype, c.model.remat = own.model.dtype, own.model.remat
    c.loss_chunk_tokens, c.eval, c.checkpoint = own.loss_chunk_tokens, own.eval, own.checkpoint
    c.score.batch_size = own.score.batch_size
    if study.SCALES[this.scale].base_steps:
        c.train = ConfigDict(own.train.to_dict())
        c.train.lr /= 2
    return c


def _questions(this: Study) -> Path:
    """The folder with sft/*, of --data or written here."""
    if this.data:
        if not (Path(this.data) / "sft").is_dir():
            raise InputError(
                f"{this.data} has no folder sft: put JSONL files of question and answer there."
            )
        return Path(this.data)
    path, rng = this.out / "sft" / "problems.jsonl", random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as f:
        for _ in range(N_PROBLEMS):
            p = builtin.problem(rng)
            answer = f"{' '.join(p.steps)}\n#### {p.answer}"
            line = json.dumps({"question": p.question, "answer": answer})
            f.write(f"{line}\n".encode())
    return this.out


def _table(runs: results.Runs, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per base: loss before, after, and paired differences."""
    lines = []
    for method in results.methods(runs):
        before = statistics.mean(row["loss_before"] for row in rows if row["method"] == method)
        after = results.said(results.loss(runs, method, DOMAIN))
        difference = results.loss(runs, method, DOMAIN, minus=results.BASELINE)
        own = method == results.BASELINE
        minus = "" if own else results.said(difference, sign=True)
        lines.append([method, f"{before:.3f}", after, minus])
    head = ("base", "answers before, nats per token", "after", f"after, minus {results.BASELINE}")
    return tables.markdown(head, lines)


def _row(method: str, seed: int, folder: Path) -> dict[str, Any]:
    evals = jsonfile.read(folder / "eval.json")
    before, after = evals["initial"][DOMAIN], evals["policy"][DOMAIN]
    return {
        "method": method,
        "seed": seed,
        "loss_before": before["loss"],
        "loss": after["loss"],
        "bits_per_byte": after["bits_per_byte"],
    }


if __name__ == "__main__":
    sys.exit(study.main(run, sys.argv, __doc__))
