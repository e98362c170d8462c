"""The training step as one compiled program: what a config makes of a model's shape.

The job runs it, aot.py compiles it for machines that are not there: one construction for both.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Selection
from rho1_jax.training import optimizer


def optimizer_of(
    section: ConfigDict, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate and the optimizer of a `reference` or `train` section of the config."""
    s = section
    learning_rate = optimizer.schedule(s.lr, s.warmup_steps, steps, s.final_lr_share)
    return learning_rate, optimizer.adamw(
        learning_rate, b1=s.b1, b2=s.b2, weight_decay=s.weight_decay, clip=s.clip
    )


def train_step(
    section: ConfigDict,
    shape: LlamaConfig,
    ref_shape: LlamaConfig,
    selection: Selection,
    tx: optax.GradientTransformation,
    shardings: step.TrainState,
    chunk_tokens: int,
    decay: float = 1.0,
) -> Any:
    """The jitted (state, ref_params, batch, key) -> (state, metrics). The state is donated and
    stays where `shardings` say."""
    one_step = functools.partial(
        step.train_step,
        apply=_policy_apply(section, shape, selection),
        ref_apply=apply_fn(ref_shape),
        tx=tx,
        selection=selection,
        chunk_tokens=chunk_tokens,
        accumulation=section.accumulation,
        decay=decay,
    )
    return jax.jit(one_step, donate_argnums=0, out_shardings=(shardings, None))


def keep_compiled(folder: Path) -> None:
    """Compiled programs lie in `folder`/compiled from now on, for the next process that starts
    there; where JAX_COMPILATION_CACHE_DIR is set, for all that have the same."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
        # Evaluation has many programs that take less than JAX's one second, and more than to read.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def apply_fn(shape: LlamaConfig) -> losses.Apply:
    """The model as the method sees it: a function of parameters and tokens."""
    return functools.partial(llama.apply, config=shape)


def flops_per_token(shape: LlamaConfig, ref_shape: LlamaConfig | None, seq_len: int) -> float:
    """What a step must compute at least: three forward passes, and one of a live reference."""
    live = llama.flops_per_token(ref_shape, seq_len) if ref_shape else 0
    return 3.0 * llama.flops_per_token(shape, seq_len) + live


def _policy_apply(section: ConfigDict, shape: LlamaConfig, selection: Selection) -> losses.Apply:
    """The model, with the backward pass that the section asks for."""
    top = section.get("backward_rows_top", 0)
    if not top:
        return apply_fn(shape)
    if top > shape.n_layers:
        raise InputError(
            f"train.backward_rows_top is {top}, but the model has {shape.n_layers} blocks: "
            "set it to that at most."
        )
    rowwise = SelectedRows(
        selection, top, shape.n_layers, section.accumulation > 1, shape.remat != "full"
    )
    return functools.partial(llama.apply, config=shape, rowwise=rowwise)
