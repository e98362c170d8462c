"""Tokens per second of generation/generate.py and of transformers' generate, one model on a CPU.

    taskset -c 0 python -m experiments.measure.generation_speed \\
        --out=experiments/generation_speed.csv

Random weights of the shape of SmolLM2-135M, float32 in both, batch 8, 32 prompt tokens and 128 new
ones, greedy. Weights are laid out once for both, before. Rounds are interleaved and the first of
each is not counted; the ratio is that of CPU seconds. One core, because threads that wait for a
busy second core would be counted as work.
"""

import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import torch
import transformers

from experiments.lab import tables
from rho1_jax import command_line
from rho1_jax.models import llama, presets
from rho1_jax.models.formats import huggingface
from rho1_jax.models.generation import decoding, generate

BATCH, PROMPT, NEW = 8, 32, 128


def main(argv: Sequence[str]) -> None:
    needs = {"out": "name the CSV to write"}
    args = command_line.parse(argv, {"out": Path, "rounds": 5}, required=needs)
    config = presets.get("smollm2-135m").computed()
    params = llama.init(config, jax.random.key(0))
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(Path(folder), params, config, dtype="float32", more={})
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, PROMPT))

    unstacked = decoding.unstack(params, config)

    def ours() -> list[list[int]]:
        return generate.generate(
            params, config, prompts.tolist(), max_new_tokens=NEW, unstacked=unstacked
        )

    def transformers_generate() -> list[list[int]]:
        batch = torch.tensor(prompts)
        out = theirs.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, PROMPT:].tolist()

    same = np.mean(np.array(ours()) == np.array(transformers_generate()))
    print(f"{same:.1%} of the tokens agree")
    rows = []
    for i in range(args.rounds):
        ours_cpu, ours_wall = seconds(ours)
        theirs_cpu, theirs_wall = seconds(transformers_generate)
        rows.append([i, ours_cpu, theirs_cpu, ours_wall, theirs_wall, theirs_cpu / ours_cpu])
        rates = [BATCH * NEW / cpu for cpu in (ours_cpu, theirs_cpu)]
        print(f"round {i}: {rates[0]:.1f} and {rates[1]:.1f} tokens per CPU second", flush=True)
    ratios = [row[-1] for row in rows]
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    names = ("round", "ours_cpu_s", "transformers_cpu_s", "ours_wall_s", "transformers_wall_s",
             "cpu_ratio")  # fmt: skip
    text = [[i, *(f"{x:.3f}" for x in rest)] for i, *rest in rows]
    tables.write(
        args.out,
        [dict(zip(names, row, strict=True)) for row in text],
        note=f"{machine()}; jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; batch {BATCH}, {NEW} new tokens",
    )


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of all threads, and seconds of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}, {platform.system()}"


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
