"""The programs of a run around its training step: what a device holds while each of them runs.

A step that fits is no run that fits: before, between and after the steps rows are scored and
evaluated, and checkpoints get their digests, beside the training's state or another model. The
programs are those that the stages run (training/program.py, models/formats/digests.py). Of
benchmarks, and of a utility, which nothing here bounds, there is none.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax.models.formats import digests
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.training import program, sharding

_SCORED = "score.batch_size, loss_chunk_tokens"


class Around(NamedTuple):
    """The largest program of its kind, lowered and not yet compiled.

    beside: bytes that a device holds meanwhile and that are no argument; smaller: keys to change
    where it does not fit.
    """

    lowered: Any
    beside: int
    smaller: str


class Needs(NamedTuple):
    """Bytes of a device. outputs: that take no argument's place; peak: the compiler's, of the
    program alone and its arguments."""

    arguments: int
    temporaries: int
    outputs: int
    peak: int
    beside: int

    @property
    def total(self) -> int:
        return self.peak + self.beside

    @property
    def reserved(self) -> int:
        """An upper bound of `total`: the CPU's compiler names no peak."""
        return self.arguments + self.temporaries + self.outputs + self.beside


def programs(
    config: ConfigDict, policy: LlamaConfig, reference: LlamaConfig, mesh: Mesh
) -> dict[str, Around]:
    """What a run of `config` runs on `mesh` beside its training step, by name:

    initial, start: the first parameters, and the state that is made of them; reference: a training
    step of the reference; score: the reference's losses that are cached; save: the digest of the
    largest array of the state, also when it is restored; heldout: an evaluation in the midst of
    training; sample: the losses and entropies of the policy, for the report.
    """
    c, chunk_tokens = config, config.loss_chunk_tokens
    built = program.of_policy(c, policy, reference, mesh, steps=max(c.train.steps, 1))
    params, key = built.state.params, jax.eval_shape(lambda: jax.random.key(0))
    rows = program.abstract_batch(c.score.batch_size, c.data.seq_len, mesh)
    ref_params = program.abstract_params(reference, c.model.ref_dtype, mesh)
    in_step = bytes_of(built.ref_params)
    state = bytes_of(built.state) + in_step
    ref_ema, chips = built.state.ref_ema, "mesh.fsdp or mesh.tensor (larger), or more chips"

    found = {}
    if not c.model.init:
        found["initial"] = Around(program.initial(policy, mesh).lower(key), 0, chips)
    if config_lib.needs_reference(c) and not c.reference.init:
        found["reference"] = _reference_step(c, policy, mesh, key)
    if program.caches_scores(c) and not c.score.source:
        entropy = "ref_entropy" in program.score_fields(c)
        top = built.method.selection.top
        score_fn = program.score_fn(
            reference, mesh, chunk_tokens=chunk_tokens, entropy=entropy, top=top
        )
        found["score"] = Around(score_fn.lower(ref_params, rows), 0, _SCORED)
    new_state = program.start(built).lower(params, ref_ema=None if ref_ema is None else params)
    found["start"] = Around(new_state, in_step, chips)
    largest = max(jax.tree.leaves(built.state), key=bytes_of)
    digest = digests.program(largest.sharding).lower(largest)
    found["save"] = Around(digest, state - bytes_of(largest), chips)
    evaluate = program.eval_fn(policy, chunk_tokens).lower(params, rows)
    found["heldout"] = Around(evaluate, state - bytes_of(params), _SCORED)
    # In the stage evaluate no state is left, but the reference or the average is held.
    sample_fn = program.score_fn(policy, mesh, chunk_tokens=chunk_tokens, entropy=True)
    other = params if config_lib.follows_policy(c) else ref_params
    found["sample"] = Around(sample_fn.lower(params, rows), bytes_of(other), _SCORED)
    return found


def needs(compiled: Any, beside: int) -> Needs:
    """What a compiled program takes."""
    m = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return Needs(
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        outputs,
        m.peak_memory_in_bytes,
        beside,
    )


def bytes_of(tree: Any) -> int:
    """Of the part of some arrays that one device holds, from their shapes and shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _reference_step(c: ConfigDict, shape: LlamaConfig, mesh: Mesh, key: Any) -> Around:
    sharding.require_divisible(c.reference.batch_size, c.reference.accumulation, mesh, "reference")
    built = program.of_reference(c, shape, mesh, steps=max(c.reference.steps, 1))
    lowered = built.step.lower(built.state, built.ref_params, built.batch, key)
    return Around(lowered, 0, "reference.batch_size, reference.accumulation, model.remat=full")
