"""What a training step costs: CLM, SLM as people write it, and SLM here, against each other.

    python -m experiments.measure.benchmark --size=37m --out=experiments/benchmark.csv [--torch]

Every variant runs once per round, in one process and in another order every round, so that what the
machine and the variant before do hits all of them; `relative` is the median over rounds of a
variant's time divided by CLM's in the same round, with the least and the most. On CPU time is CPU
time (of all threads), with the wall clock beside it; on GPU it is the wall clock. `bound` is the
ratio of the FLOPs of the matrix products, counted in the traced step with loops multiplied out.
`temp_mib` is what the compiler reserves beside arguments and results. A size's rows in the CSV are
replaced, others are kept.

--batch, --seq_len and --chunk_tokens (whose logits fit into memory) are the size's own unless
given; --ratios=0.4,0.6 are the selected shares; --only=REGEX picks variants beside CLM; --torch
measures the same in PyTorch with transformers; --remat=none|dots|full, --dtype, --rounds.
"""

import collections
import dataclasses
import functools
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's idle threads must not spin

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.lab import tables
from rho1_jax import command_line
from rho1_jax.models import llama, presets
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.step import Batch
from rho1_jax.training import optimizer
from rho1_jax.training.planning import cost

SHAPES = {  # shape, batch, sequence length
    "small": (presets.get("tiny"), 8, 256),
    "37m": (
        LlamaConfig(vocab_size=32_000, width=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64,
                    ffn_width=1280), 4, 512,
    ),
    "135m": (presets.get("smollm2-135m"), 2, 512),
    "1.1b": (presets.get("tinyllama-1.1b"), 4, 2048),
}  # fmt: skip
SEPARATOR = 0
COLUMNS = ("size", "remat", "chunk_tokens", "variant", "ratio", "seconds", "relative", "least",
           "most", "bound", "wall_seconds", "wall_relative", "temp_mib", "rounds", "batch",
           "seq_len", "dtype", "device", "versions")  # fmt: skip
OPTIONS: dict[str, Any] = {
    "size": tuple(SHAPES),
    "batch": 0, "seq_len": 0, "chunk_tokens": 0, "rounds": 5, "documents": 0,
    "ratios": "0.4,0.6", "remat": ("none", "dots", "full"), "dtype": ("float32", "bfloat16"),
    "only": "", "torch": False, "out": Path,
}  # fmt: skip
TX = optimizer.of("adamw", lambda _: 1e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)

Step = Callable[..., Any]


def naive_step(state, ref_params, batch, _key, *, apply, ratio, masked=True):
    """One step as it is usually written: all logits, autodiff through the masked mean."""

    def token_loss(params):
        hidden, head = apply(params, batch.tokens[:, :-1])
        logits = losses.logits_of(hidden.reshape(-1, hidden.shape[-1]), head)
        return losses.loss_of(logits, batch.tokens[:, 1:].reshape(-1))

    def loss_fn(params):
        loss = token_loss(params)
        if not masked:
            return loss.mean()
        cached = batch.cached.get("ref_loss")
        ref = token_loss(ref_params) if cached is None else cached.reshape(-1)
        excess = jax.lax.stop_gradient(loss - ref)
        threshold = jax.lax.top_k(excess, round(ratio * excess.size))[0][-1]
        mask = excess >= threshold
        return jnp.sum(loss * mask) / mask.sum()

    grads = jax.grad(loss_fn)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    return step.TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), opt_state
    ), optax.tree.norm(grads)


def variants(
    shape: LlamaConfig, ratios: list[float], chunk_tokens: int, documents: int = 0
) -> dict[tuple[str, float], Step]:
    """(name, ratio) -> step(state, ref_params, batch, key)."""
    apply = functools.partial(llama.apply, config=shape)
    apart = functools.partial(llama.apply, config=dataclasses.replace(shape, separator=SEPARATOR))

    def ours(selection, apply=apply):
        method = step.Method(apply, apply, TX, selection, chunk_tokens)
        return functools.partial(step.train_step, method=method)

    def rows(selection, top):
        how = SelectedRows(selection, top, shape.n_layers, save_products=shape.remat != "full")
        return ours(selection, functools.partial(apply, rowwise=how))

    out: dict[tuple[str, float], Step] = {("CLM", 1.0): ours(Selection("all", 1.0))}
    if documents:
        out["CLM, documents apart", 1.0] = ours(Selection("all", 1.0), apart)
    out["CLM, autodiff", 1.0] = functools.partial(naive_step, apply=apply, ratio=1.0, masked=False)
    for k in ratios:
        selection, naive = (
            Selection("excess", k),
            functools.partial(naive_step, apply=apply, ratio=k),
        )
        out["SLM naive, live", k] = naive
        out["SLM naive, cached", k] = naive
        out["selective head", k] = ours(selection)
        if documents:
            out["selective head, documents apart", k] = ours(selection, apart)
        for m in dict.fromkeys([shape.n_layers, shape.n_layers // 2, shape.n_layers // 3]):
            out[f"rows, top {m} of {shape.n_layers}", k] = rows(selection, m)
    return out


class Clock:
    """Seconds of CPU and of wall clock that calls took, by name."""

    def __init__(self) -> None:
        self.cpu: dict[Any, list[float]] = collections.defaultdict(list)
        self.wall: dict[Any, list[float]] = collections.defaultdict(list)

    def __call__(self, name, fn, *args):
        wall, cpu = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(fn(*args))
        self.cpu[name].append(time.process_time() - cpu)
        self.wall[name].append(time.perf_counter() - wall)
        return out


def measure(
    shape: LlamaConfig,
    batch_size: int,
    seq_len: int,
    ratios,
    chunk_tokens,
    rounds,
    only,
    torch_too,
    documents,
):
    """Rows of the table, one for each variant."""
    steps = {
        name: fn
        for name, fn in variants(shape, ratios, chunk_tokens, documents).items()
        if name[0] == "CLM" or re.match(only, name[0])
    }
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.vocab_size, (batch_size, seq_len + 1)).astype(np.int32)
    if documents:
        tokens[rng.random(tokens.shape) < 1 / documents] = SEPARATOR
    params = llama.init(shape, jax.random.key(0))
    state = step.init_state(params, TX)
    live = Batch(jnp.asarray(tokens), jnp.ones((batch_size, seq_len), bool))
    ref_loss = jnp.asarray(rng.normal(10, 1, live.valid.shape), jnp.float32)
    cached = live._replace(cached={"ref_loss": ref_loss})
    ref_params = jax.tree.map(jnp.copy, params) if ratios else None
    compiled, facts = {}, {}
    for name, fn in steps.items():
        args = (ref_params, live) if "live" in name[0] else (None, cached)
        traced = jax.jit(fn, donate_argnums=0).trace(state, *args, jax.random.key(0))
        compiled[name] = functools.partial(_call, traced.lower().compile(), args)
        temp = compiled[name].args[0].memory_analysis().temp_size_in_bytes
        # Blocks decide at run time whether they are among the upper ones.
        top = re.match(r"rows, top (\d+) of (\d+)", name[0])
        taken = int(top[1]) / int(top[2]) if top else 1.0
        facts[name] = {"flops": cost.flops(traced.jaxpr, taken), "temp_mib": round(temp / 2**20)}
        print(name, facts[name], flush=True)
    theirs = torch_steps(shape, tokens, ratios, ref_loss) if torch_too else {}

    names = [*compiled, *theirs]
    for i in range(rounds + 1):
        if i < 2:  # the first round warms up
            clock = Clock()
        for j in rng.permutation(len(names)):
            name = names[j]
            if name in compiled:
                state = clock(name, compiled[name], state)
            else:
                clock(name, theirs[name])
    on_cpu = jax.default_backend() == "cpu"
    seconds = clock.cpu if on_cpu else clock.wall
    clm = ("CLM", 1.0)
    for name in names:
        ratio = [a / b for a, b in zip(seconds[name], seconds[clm], strict=True)]
        wall = [a / b for a, b in zip(clock.wall[name], clock.wall[clm], strict=True)]
        fact = facts.get(name, {})
        bound = fact["flops"] / facts[clm]["flops"] if fact else math.nan
        yield {
            "variant": name[0], "ratio": name[1], "seconds": statistics.median(seconds[name]),
            "relative": statistics.median(ratio), "least": min(ratio), "most": max(ratio),
            "bound": bound, "wall_seconds": statistics.median(clock.wall[name]),
            "wall_relative": statistics.median(wall), "temp_mib": fact.get("temp_mib", ""),
        }  # fmt: skip


def _call(compiled, args, state):
    return compiled(state, *args, jax.random.key(0))[0]


def torch_steps(shape: LlamaConfig, tokens, ratios, ref_loss) -> dict[tuple[str, float], Callable]:
    """The same in PyTorch: transformers' Llama, the masked loss as everybody writes it."""
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    llama_config: Any = transformers.LlamaConfig  # takes more than its signature says
    config = llama_config(
        vocab_size=shape.vocab_size, hidden_size=shape.width, num_hidden_layers=shape.n_layers,
        intermediate_size=shape.ffn_width, num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads, head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_head, attn_implementation="sdpa",
    )  # fmt: skip
    make: Any = transformers.LlamaForCausalLM
    model, reference = make(config).to(device), make(config).to(device).eval()
    tx = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.tensor(tokens, dtype=torch.long, device=device)
    cached = torch.tensor(np.asarray(ref_loss), device=device).reshape(-1)
    low = torch.autocast(device, torch.bfloat16, enabled=shape.dtype == "bfloat16")

    def token_loss(model):
        with low:
            logits = model(ids[:, :-1], use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, shape.vocab_size), ids[:, 1:].reshape(-1), reduction="none"
        )

    def one_step(ratio, live):
        loss = token_loss(model)
        if ratio < 1:
            with torch.no_grad():
                ref = token_loss(reference) if live else cached
                excess = loss - ref
                k = round(ratio * excess.numel())
                mask = excess >= torch.topk(excess, k).values[-1]
            total = (loss * mask).sum() / mask.sum()
        else:
            total = loss.mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        tx.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    out: dict[tuple[str, float], Callable] = {
        ("torch CLM", 1.0): functools.partial(one_step, 1.0, False)
    }
    for k in ratios:
        out["torch SLM, live", k] = functools.partial(one_step, k, True)
        out["torch SLM, cached", k] = functools.partial(one_step, k, False)
    return out


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The CSV with these rows in the place of those of the same setting."""
    text = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    setting = ("size", "remat", "chunk_tokens", "dtype", "device")
    tables.replace(path, text, setting, columns=COLUMNS)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("variant", "k", "time / CLM", "bound", "wall / CLM", "temp MiB")
    lines = []
    for r in rows:
        bound = "" if math.isnan(r["bound"]) else f"{r['bound']:.3f}"
        spread = f"{r['relative']:.3f} ({r['least']:.2f} to {r['most']:.2f})"
        wall = f"{r['wall_relative']:.2f}"
        lines.append((r["variant"], r["ratio"], spread, bound, wall, r["temp_mib"]))
    return tables.markdown(head, lines)


def main(argv: Sequence[str]) -> None:
    f = command_line.parse(argv, OPTIONS)
    shape, batch, seq_len = SHAPES[f.size]
    batch, seq_len = f.batch or batch, f.seq_len or seq_len
    unrolled = jax.default_backend() == "cpu" and f.remat == "none"  # as run.py has it
    shape = shape.computed(dtype=f.dtype, remat=f.remat, scan_layers=not unrolled)
    chunk_tokens = f.chunk_tokens or batch * seq_len
    ratios = [float(k) for k in f.ratios.split(",")]
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    if f.torch:
        import torch

        versions += f", torch {torch.__version__}"
    setting = {
        "size": f.size, "remat": f.remat, "chunk_tokens": chunk_tokens, "rounds": f.rounds,
        "batch": batch, "seq_len": seq_len, "dtype": f.dtype, "versions": versions,
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind,
    }  # fmt: skip
    measured = measure(
        shape, batch, seq_len, ratios, chunk_tokens, f.rounds, f.only, f.torch, f.documents
    )
    rows = [setting | row for row in measured]
    if f.out:
        write(f.out, rows)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
