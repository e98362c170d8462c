"""Does a base pretrained with selection (SLM) fine-tune better than one without (CLM)?

    python -m experiments.finetuning --data_root=DIR --out=runs/finetuning [--seeds=3]

For each seed: the SLM and the CLM run of experiments/math_pretraining.py, and the base both began
with, each fine-tuned by configs/sft.py on DIR/*.jsonl* of question and answer for 3 epochs, loss on
the answers only. Finished runs are not done again. --sft_steps shortens it. Writes results.csv:
held-out loss on the answers before and after.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from configs import sft
from experiments.study import Study
from rho1_jax import main as job

BASES = ("SLM", "CLM", "base")
COLUMNS = ("base", "seed", "steps", "loss_before", "loss_after", "bits_per_byte_after")


def sft_config(base: Path, spec: str, root: str, seed: int, steps: int) -> ConfigDict:
    """configs/sft.py for a model of a million parameters."""
    c = ConfigDict(sft.get_config().to_dict())
    c.seed = seed
    c.model.init = str(base)
    c.data.root = root
    c.data.seq_len = 256
    c.data.corpus.sft.spec = spec
    c.train.update(steps=steps, batch_size=16, lr=1e-3)
    c.eval.every = max(1, steps // 3) if steps else 200
    c.score.batch_size = 16
    return c


def run_all(out: Path, spec: str, root: str, seeds: int, sft_steps: int) -> None:
    this, rows = Study("finetuning", out, seeds=seeds), []
    configs = {
        (base, seed): this.base(seed) if base == "base" else this.methods(seed)[base]
        for seed in range(seeds)
        for base in BASES
    }
    for (base, seed), folder in this.run(configs).items():
        tuned = out / f"seed{seed}" / base
        job.run(sft_config(folder, spec, root, seed, sft_steps), tuned)
        rows.append(_row(base, seed, tuned))
        _write(out / "results.csv", rows)


def _row(base: str, seed: int, tuned: Path) -> list:
    evals = json.loads((tuned / "eval.json").read_text())
    before, after = evals["initial"]["sft"], evals["policy"]["sft"]
    steps = len((tuned / "metrics.csv").read_text().splitlines()) - 1
    return [base, seed, steps, before["loss"], after["loss"], after["bits_per_byte"]]


def _write(path: Path, rows: Sequence[list]) -> None:
    with path.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--spec", default="files:*.jsonl*")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sft_steps", type=int, default=0)
    args = parser.parse_args()
    run_all(args.out, args.spec, args.data_root, args.seeds, args.sft_steps)
