"""The models of a run, with their weights on its devices, computed as its config says."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from rho1_jax.errors import InputError
from rho1_jax.evaluation.heldout import heldout_losses
from rho1_jax.models import presets, tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import load
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import program, sharding
from rho1_jax.training.loop import Evaluate

Model = tuple[Any, LlamaConfig]  # parameters, and how they are computed with


def initial(ws: Workspace) -> Model:
    """What reference and policy both start from: model.init, or weights from the seed."""
    shape = initial_shape(ws)
    if ws.config.model.init:
        return ws.named_model(ws.config.model.init).params(_place(ws)), shape
    return program.initial(shape, ws.mesh)(ws.key), shape


def initial_shape(ws: Workspace) -> LlamaConfig:
    """Of the initial model, and so of the policy and of a reference that is trained here."""
    tok, init = ws.tokenizer, ws.config.model.init
    if init:
        tokenizer.require_same(tok, ws.named_model(init).tokenizer)
    return planned(ws)


def planned(ws: Workspace) -> LlamaConfig:
    """`initial_shape`, also before there is a tokenizer to take the vocabulary from."""
    c, m = ws.config, ws.config.model
    if m.init:
        return _computed(ws, ws.named_model(m.init).architecture, m.dtype)
    sizes = {"vocab_size": ws.vocab_size, "max_length": c.data.seq_len}
    return _computed(ws, presets.get(m.preset, **sizes), m.dtype)


def planned_reference(ws: Workspace) -> LlamaConfig:
    """The reference's: of the model that is named, else of the initial one."""
    m, init = ws.config.model, ws.config.reference.init
    shape = ws.named_model(init).architecture if init else planned(ws)
    return _computed(ws, shape, m.ref_dtype)


def policy(ws: Workspace) -> Model:
    """The trained policy."""
    model = load.describe(ws.model_folder("policy"))
    return model.params(_place(ws)), _computed(ws, model.architecture, ws.config.model.dtype)


def reference(ws: Workspace) -> Model:
    """The reference model, parameters in model.ref_dtype."""
    params = load.describe(ws.model_folder("reference")).params(_place(ws))
    dtype = ws.config.model.ref_dtype
    return jax.tree.map(lambda x: x.astype(dtype), params), reference_shape(ws)


def reference_shape(ws: Workspace) -> LlamaConfig:
    model = load.describe(ws.model_folder("reference"))
    return _computed(ws, model.architecture, ws.config.model.ref_dtype)


def average(ws: Workspace) -> Model:
    """The reference that followed the policy (select.ref_ema_decay), as training left it."""
    folder = ws.model_folder("policy")
    shape = _computed(ws, load.describe(folder).architecture, ws.config.model.dtype)
    return load.saved_params(folder, _place(ws), part="ref_ema"), shape


def heldout_fn(ws: Workspace, shape: LlamaConfig, *, max_rows: int = 0) -> Evaluate:
    """parameters -> held-out losses per domain (evaluation/heldout.py); max_rows: 0 for the
    config's."""
    c = ws.config
    return functools.partial(
        heldout_losses,
        program.eval_fn(shape, c.loss_chunk_tokens),
        domains=ws.heldout_rows(),
        max_rows=max_rows or c.eval.rows,
        batch_size=c.score.batch_size,
        put=ws.put_whole,
    )


def _place(ws: Workspace) -> Callable[[Any], Any]:
    return functools.partial(sharding.parameter_shardings, mesh=ws.mesh)


def _computed(ws: Workspace, shape: Architecture, dtype: str) -> LlamaConfig:
    """`shape` as this run computes it."""
    return program.computed(ws.config, shape, dtype, ws.mesh, separator=ws.separator)


def require_reference_shape(ours: Any, theirs: Any) -> None:
    """InputError unless an average of the two trees of parameters can be made."""
    if jax.tree.map(jax.numpy.shape, ours) != jax.tree.map(jax.numpy.shape, theirs):
        raise InputError(
            "select.ref_ema_init=reference averages reference and policy, but their shapes differ: "
            "use a reference of the policy's shape, or select.ref_ema_init=policy."
        )
