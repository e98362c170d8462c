"""The plain training step of MaxText, compiled by its own train_compile, in numbers like ours.

    python -m experiments.measure.maxtext [--only=REGEX] --out=experiments/plans.csv

Needs Python 3.12 and `pip install "maxtext[tpu]==0.2.5"`, in an environment of its own. Same shape,
slice, batch, sequence, optimizer state (float32), splash attention and full rematerialisation as
the cases of plans.py beside it, whose CSV gets the rows; run those in the same environment, so
that one compiler judges both.
"""

import re
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from experiments.measure import plans
from experiments.measure.plans import Case
from rho1_jax import command_line
from rho1_jax.models import presets
from rho1_jax.training.planning import aot, cost, slices


def arguments(case: Case) -> list[str]:
    """MaxText's settings for a case."""
    s = presets.get(case.preset)
    settings: dict[str, object] = {
        "run_name": "compared",
        "compile_topology": case.topology,
        "compile_topology_num_slices": 1,
        "per_device_batch_size": case.rows / case.tensor,
        "max_target_length": case.seq_len,
        "ici_fsdp_parallelism": case.fsdp,
        "ici_tensor_parallelism": case.tensor,
        "decoder_block": "llama2",
        "base_emb_dim": s.width,
        "base_num_query_heads": s.n_heads,
        "base_num_kv_heads": s.n_kv_heads,
        "base_mlp_dim": s.ffn_width,
        "base_num_decoder_layers": s.n_layers,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab_size,
        "mlp_activations": "['silu','linear']",
        "logits_via_embedding": False,
        "normalization_layer_epsilon": s.norm_eps,
        "remat_policy": "full",
        "attention": "flash",
        "dtype": "bfloat16",
        "weight_dtype": "float32",
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "opt_type": "adamw",
    }
    if not case.rings:
        flat = (f"--{name}={value}" for name, value in plans.NO_RINGS.items())
        settings["compile_xla_flags"] = " ".join(flat)
    return ["train_compile", *(f"{name}={value}" for name, value in settings.items())]


def row(case: Case) -> dict[str, object]:
    """What plans.row says of our step, of MaxText's."""
    from maxtext.trainers.pre_train import train_compile

    kept: list[Any] = []
    original = train_compile.jit_and_compile

    def compile_and_keep(*args, **kwargs):
        kept.append(original(*args, **kwargs))
        return kept[0]

    train_compile.jit_and_compile = compile_and_keep
    started = time.perf_counter()
    train_compile.main(arguments(case))
    train_compile.jit_and_compile = original
    memory, found = kept[0].memory_analysis(), cost.read(kept[0].as_text())
    chip = slices.chip(case.topology)
    n_chips = case.fsdp * case.tensor
    facts: dict[str, object] = {
        "name": f"MaxText {metadata.version('maxtext')} {case.name}",
        "preset": case.preset,
        "topology": case.topology,
        "versions": f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}",
        "chips": n_chips,
        "arguments_gib": memory.argument_size_in_bytes / aot.GIB,
        "temporaries_gib": memory.temp_size_in_bytes / aot.GIB,
        "peak_gib": memory.peak_memory_in_bytes / aot.GIB,
        "memory_gib": chip.memory,
        "mega_cycles": found.cycles / 1e6,
        "link_seconds": sum(t.bytes for t in found.traffic.values()) / chip.links,
        "endless_loops": found.endless,
        "without_estimate": found.unknown,
        "compile_seconds": time.perf_counter() - started,
    }
    return facts | plans.traffic_columns(found)


def main(argv: Sequence[str]) -> None:
    only = "(tinyllama|mistral-7b)"
    found = command_line.parse(argv, {"out": plans.OUT, "only": only})
    for case in plans.cases():
        if case.method == "CLM" and re.search(found.only, case.name):
            facts = row(case)
            plans.write(found.out, facts)
            print(facts, flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
