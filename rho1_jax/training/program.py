"""The programs of a run: the training step, what makes its state, what scores and evaluates rows.

The stages run them, planning/ compiles them for machines that are not there: one construction of
each for both.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax.errors import InputError
from rho1_jax.models import llama
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.slm import losses, step
from rho1_jax.slm.backward import SelectedRows
from rho1_jax.slm.selection import Selection
from rho1_jax.slm.signals import SIGNALS, TOP
from rho1_jax.training import optimizer, scoring, sharding

MOST_UNROLLED = 8  # layers
PLAIN = Selection("all", 1.0)


class Program(NamedTuple):
    """One training's step, before there is anything to train. Shapes say where they will lie.

    step: the jitted (state, ref_params, batch, key) -> (state, metrics); it donates the state.
    """

    state: step.TrainState
    ref_params: Any  # None where no reference runs in the step
    batch: step.Batch
    step: jax.stages.Wrapped
    method: step.Method
    flops_per_token: float  # of three forward passes, and one of a reference in the step


def computed(
    config: ConfigDict, shape: Architecture, dtype: str, mesh: Mesh, *, separator: int = 0
) -> LlamaConfig:
    """A model's shape as a run of `config` computes it on `mesh`, be it only described.

    separator: the token between documents; any where only the program matters.
    """
    # Unrolled, a training step on CPU takes a tenth less time, but compiling grows with depth,
    # and XLA's CPU backend only rematerialises inside a loop.
    remat, on_cpu = config.model.remat, mesh.devices.flat[0].platform == "cpu"
    return shape.computed(
        dtype=dtype,
        remat=remat,
        batch_axes=sharding.token_axes(mesh),
        separator=separator if config.data.separate_documents else None,
        scan_layers=not (on_cpu and remat == "none" and shape.n_layers <= MOST_UNROLLED),
    )


def caches_scores(config: ConfigDict) -> bool:
    """Whether the reference is asked before training; one that follows the policy cannot be."""
    asked = config_lib.selection(config, n_shards=1).needs_reference
    return asked and not config_lib.follows_policy(config) and config.score.cached


def scores_in_step(config: ConfigDict) -> bool:
    """Whether every step asks a reference: a model of its own, or the policy's average."""
    asked = config_lib.selection(config, n_shards=1).needs_reference
    return asked and not caches_scores(config)


def score_fields(config: ConfigDict) -> tuple[str, ...]:
    """What is scored and cached for each row."""
    s = config_lib.selection(config, n_shards=1)
    entropy = ("ref_entropy",) if s.needs_ref_entropy or config.score.entropy else ()
    return ("ref_loss", *entropy, *(TOP if s.distill_weight else ()))


def of_policy(
    config: ConfigDict, policy: LlamaConfig, reference: LlamaConfig, mesh: Mesh, *, steps: int
) -> Program:
    """The program of the policy's training, on the devices of `mesh`, be they only described.

    policy, reference: how the two are computed; the reference is left out where none runs in a step
    (its scores are cached, it is an average of the policy, or nothing reads it).
    """
    selection = config_lib.selection(
        config, sharding.n_batch_shards(mesh), sharding.n_row_parts(mesh)
    )
    cached = score_fields(config) if caches_scores(config) else ()
    if selection.needs_utility:
        cached += ("utility",)
    in_step = scores_in_step(config) and not config_lib.follows_policy(config)
    return _build(
        config, config.train, policy, reference if in_step else None, mesh,
        selection=dataclasses.replace(selection, steps=steps), steps=steps, cached=cached,
        ref_ema_decay=config.select.ref_ema_decay,
    )  # fmt: skip


def of_reference(config: ConfigDict, shape: LlamaConfig, mesh: Mesh, *, steps: int) -> Program:
    """The program of the reference's training, on all tokens of the clean text."""
    every = Selection("all", 1.0, steps=steps)
    return _build(config, config.reference, shape, None, mesh, selection=every, steps=steps)


def _build(
    config: ConfigDict,
    section: ConfigDict,
    policy: LlamaConfig,
    reference: LlamaConfig | None,
    mesh: Mesh,
    *,
    selection: Selection,
    steps: int,
    cached: Iterable[str] = (),
    ref_ema_decay: float = 1.0,
) -> Program:
    averaged = ref_ema_decay < 1.0
    schedule, tx = optimizer_of(section, steps)
    method = step.Method(
        apply=_policy_apply(section, policy, selection),
        ref_apply=apply_fn(reference or policy),
        tx=tx,
        selection=selection,
        chunk_tokens=config.loss_chunk_tokens,
        accumulation=section.accumulation,
        ref_ema_decay=ref_ema_decay,
        spike=section.spike,
    )
    params = abstract_params(policy, "float32", mesh)
    state = jax.eval_shape(
        lambda p, ref_ema: step.init_state(p, tx, ref_ema, spike=section.spike),
        params,
        params if averaged else None,
    )
    shardings = sharding.state_shardings(state, mesh)
    ref_params = abstract_params(reference, config.model.ref_dtype, mesh) if reference else None

    def train_step(state, ref_params, batch, key):
        new, metrics = step.train_step(state, ref_params, batch, key, method=method)
        # Made here: on the host it would wait for the device, behind the next step.
        return new, metrics | {"learning_rate": jnp.asarray(schedule(_updates(state)))}

    live = reference or (policy if averaged else None)
    return Program(
        sharding.placed(state, shardings),
        ref_params,
        abstract_batch(section.batch_size, config.data.seq_len, mesh, selection, cached),
        jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        method,
        flops_per_token(policy, live, config.data.seq_len),
    )


def initial(shape: LlamaConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The compiled function from a key to new parameters, where they will lie."""
    params = abstract_params(shape, "float32", mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(functools.partial(llama.init, shape), out_shardings=shardings)


def start(built: Program) -> jax.stages.Wrapped:
    """The compiled (params, ref_ema=...) -> the state before the first step, where it will lie."""
    method = built.method
    new_state = functools.partial(step.init_state, tx=method.tx, spike=method.spike)
    return jax.jit(new_state, out_shardings=jax.tree.map(lambda x: x.sharding, built.state))


@functools.cache  # the models of a run, and of the runs of one process, share one program
def score_fn(
    shape: LlamaConfig, mesh: Mesh, *, chunk_tokens: int, entropy: bool, top: int = 0
) -> jax.stages.Wrapped:
    """The compiled scoring.score_step of a model, (params, batch) -> {name: [B, S]}, which every
    host reads as a whole."""
    return jax.jit(
        functools.partial(
            scoring.score_step,
            apply=apply_fn(shape),
            chunk_tokens=chunk_tokens,
            entropy=entropy,
            top=top,
        ),
        out_shardings=NamedSharding(mesh, P()),
    )


@functools.cache
def eval_fn(shape: LlamaConfig, chunk_tokens: int) -> jax.stages.Wrapped:
    """The compiled step.eval_step of a model, (params, batch) -> metrics."""
    return jax.jit(
        functools.partial(step.eval_step, apply=apply_fn(shape), chunk_tokens=chunk_tokens)
    )


def optimizer_of(
    section: ConfigDict, steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate and the optimizer of a `reference` or `train` section of the config."""
    s = section
    learning_rate = optimizer.schedule(
        s.schedule, s.lr, s.warmup_steps, steps, s.final_lr_share, s.decay_steps
    )
    return learning_rate, optimizer.of(
        s.optimizer, learning_rate, b1=s.b1, b2=s.b2, weight_decay=s.weight_decay, clip=s.clip,
        moments_dtype=s.moments_dtype,
    )  # fmt: skip


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


def _updates(state: step.TrainState) -> jax.Array:
    """The optimizer's own count, which its schedule follows: bad steps are not in it."""
    return optax.tree.get_all_with_path(state.opt_state, "count")[0][1]


def abstract_params(shape: LlamaConfig, dtype: str, mesh: Mesh) -> Any:
    """The shapes of a model's parameters, and where they will lie."""
    shapes = jax.eval_shape(functools.partial(llama.init, shape), jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return sharding.placed(shapes, sharding.parameter_shardings(shapes, mesh))


def abstract_batch(
    rows: int, seq_len: int, mesh: Mesh, selection: Selection = PLAIN, cached: Iterable[str] = ()
) -> step.Batch:
    """The shapes of a batch, and where they will lie."""
    spread = NamedSharding(mesh, P(sharding.BATCH_AXES))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=spread)

    top = (selection.distill_top,)
    signals = {
        name: array(jnp.dtype(SIGNALS[name].dtype), seq_len, *(top if name in TOP else ()))
        for name in cached
    }
    tokens, valid = array(jnp.int32, seq_len + 1), array(jnp.bool, seq_len)
    domain = array(jnp.int32) if selection.domains else None
    return step.Batch(tokens, valid, signals, domain=domain)


def _policy_apply(section: ConfigDict, shape: LlamaConfig, selection: Selection) -> losses.Apply:
    """The model, with the backward pass that the section asks for."""
    top = section.get("backward_rows_top", 0)
    if not top:
        return apply_fn(shape)
    require_blocks(top, shape.n_layers)
    rowwise = SelectedRows(
        selection, top, shape.n_layers, section.accumulation > 1, shape.remat != "full"
    )
    return functools.partial(llama.apply, config=shape, rowwise=rowwise)


def require_blocks(top: int, n_layers: int) -> None:
    """InputError if train.backward_rows_top counts more blocks than there are."""
    if top > n_layers:
        raise InputError(
            f"train.backward_rows_top is {top}, but the model has {n_layers} blocks: "
            "set it to that at most."
        )
