"""A run: its config, its folder, its devices, and what its folder already holds.

The stages (stages.py) ask a Run for the tokenizer, the rows, the models and the scores; where each
of them lies in the folder is known here.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax.data import corpora, loader, ref_scores
from rho1_jax.errors import InputError
from rho1_jax.evaluation.heldout import heldout_losses
from rho1_jax.models import llama, load, presets, tokenizer
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.slm import step
from rho1_jax.training import checkpoint, hosts, sharding
from rho1_jax.training.interruption import StopSignal
from rho1_jax.training.loop import Evaluate
from rho1_jax.training.program import apply_fn

MOST_UNROLLED = 8  # layers
TOKENIZER_SAMPLE = 8_000_000  # characters of each domain that a new tokenizer is trained on

Model = tuple[Any, LlamaConfig]  # parameters and shape
Scores = dict[str, dict[str, np.ndarray]]  # domain -> {"ref_loss": [rows, S], ...}


class Run:
    """What every stage is given. Paths: data/, reference/, scores/, checkpoints/ in `folder`."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        mesh: Mesh,
        stop: StopSignal,
        beam_runner: str = "",
    ):
        self.config, self.folder, self.mesh, self.stop = config, folder, mesh, stop
        self.beam_runner = beam_runner
        self.selection = config_lib.selection(
            config, sharding.n_batch_shards(mesh), sharding.n_row_parts(mesh)
        )
        self.key = jax.random.key(config.seed)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: the one in its folder, else loaded or trained and put there."""
        folder, c = self.folder / "data", self.config
        if any(folder.glob("tokenizer.*")):
            return tokenizer.load(folder)
        if c.tokenizer.source == "train":
            tok = tokenizer.train(self._texts(), c.tokenizer.vocab_size)
        else:
            named = c.model.init if c.tokenizer.source == "init" else c.tokenizer.source
            place = load.locate(named)
            trained_here = place / "checkpoints"
            tok = tokenizer.load(trained_here if trained_here.exists() else place)
        if hosts.first():
            folder.mkdir(parents=True, exist_ok=True)
            tok.save(folder)
        return tok

    def sources(self) -> dict[str, corpora.Source]:
        """Every domain of the corpus and the clean text."""
        corpus = config_lib.sources(self.config.data.corpus)
        clean = config_lib.sources(self.config.data.clean)
        for name in corpus.keys() & clean.keys():
            if corpus[name] != dataclasses.replace(clean[name], weight=corpus[name].weight):
                raise InputError(
                    f"data.corpus.{name} and data.clean.{name} name different sources: "
                    "give one of them another name."
                )
        return corpus | clean

    def train_rows(self, domains: ConfigDict) -> dict[str, loader.Rows]:
        return {name: loader.open_rows(self.folder / "data", name, "train") for name in domains}

    def heldout_rows(self) -> dict[str, loader.Rows]:
        """The validation rows of every domain that has any."""
        found = {n: loader.open_rows(self.folder / "data", n, "val") for n in self.sources()}
        return {name: rows for name, rows in found.items() if len(rows)}

    def visited_rows(self) -> dict[str, np.ndarray]:
        """domain -> the corpus rows that training will read, ascending."""
        c = self.config
        rows = self.train_rows(c.data.corpus)
        return loader.visited_rows(
            rows,
            weights(c.data.corpus),
            batch_size=c.train.batch_size,
            seed=c.seed,
            num_steps=n_steps(c.train, rows),
        )

    @functools.cached_property
    def parts(self) -> dict[str, Any]:
        """Which parts of a batch this host reads, as data/loader.py takes it."""
        parts, n_parts = sharding.host_parts(self.mesh, jax.process_index())
        return {"parts": parts, "n_parts": n_parts}

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every host reads as a whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, batch: Mapping[str, np.ndarray]) -> step.Batch:
        """This host's rows of a batch on its devices."""
        return sharding.batch_to_devices(batch, self.mesh)

    def put_whole(self, batch: Mapping[str, np.ndarray]) -> step.Batch:
        """A batch that every host has as a whole on the devices of all."""
        return sharding.batch_to_devices(batch, self.mesh, whole=True)

    def initial_model(self) -> Model:
        """What reference and policy both start from: model.init, or weights from the seed."""
        m = self.config.model
        if m.init:
            params, shape, tok = checkpoint.load_model(m.init, self.mesh)
            tokenizer.require_same(self.tokenizer, tok)
            return params, self._computed(shape, m.dtype)
        sizes = {"vocab_size": self.tokenizer.vocab_size, "max_length": self.config.data.seq_len}
        shape = self._computed(presets.get(m.preset, **sizes), m.dtype)
        init = functools.partial(llama.init, shape)
        shardings = sharding.parameter_shardings(jax.eval_shape(init, self.key), self.mesh)
        return jax.jit(init, out_shardings=shardings)(self.key), shape

    def policy(self) -> Model:
        """The trained policy."""
        return self._load("checkpoints", "float32")

    def reference(self) -> Model:
        """The reference model, parameters in model.ref_dtype."""
        return self._load("reference", self.config.model.ref_dtype)

    def average(self) -> Model:
        """The reference that followed the policy (select.decay below 1), as training left it."""
        place = functools.partial(sharding.parameter_shardings, mesh=self.mesh)
        params = load.saved_params(self.folder / "checkpoints", place, part="average")
        return params, self.policy()[1]

    @property
    def score_fields(self) -> tuple[str, ...]:
        """What is scored and cached for each row."""
        entropy = self.selection.needs_ref_entropy or self.config.score.entropy
        return ("ref_loss", "ref_entropy") if entropy else ("ref_loss",)

    @property
    def caches_scores(self) -> bool:
        """Whether the reference is asked before training; one that follows the policy cannot be."""
        asked = self.selection.needs_reference and not config_lib.follows_policy(self.config)
        return asked and self.config.score.cached

    def score_binding(self, ref_params: Any, rows: loader.Rows, kind: str) -> dict[str, str]:
        """What cached scores of `rows` belong to; kind: "scores" or "utility"."""
        binding = {"rows": rows.fingerprint}
        if ref_params is not None:
            binding["reference"] = checkpoint.fingerprint(ref_params)
        if kind == "utility":
            binding["utility"] = self.config.select.utility
        return binding

    def cached_scores(self, ref_params: Any) -> Scores | None:
        """The finished scores of all rows that training will read, if it reads any; InputError if
        some are missing."""
        wanted = {}
        if self.caches_scores:
            wanted["scores"] = self.score_fields
        if self.selection.needs_utility:
            wanted["utility"] = ("utility",)
        if not wanted:
            return None
        visited, rows = self.visited_rows(), self.train_rows(self.config.data.corpus)
        found: Scores = {name: {} for name in rows}
        for (kind, fields), name in itertools.product(wanted.items(), rows):
            found[name] |= ref_scores.open_scores(
                self.folder / kind / name,
                fields=fields,
                row_ids=visited[name],
                binding=self.score_binding(ref_params, rows[name], kind),
            )
        return found

    def heldout_fn(self, shape: LlamaConfig) -> Evaluate:
        """parameters -> held-out losses per domain (evaluation/heldout.py)."""
        c = self.config
        return functools.partial(
            heldout_losses,
            _eval_fn(shape, c.loss_chunk_tokens),
            domains=self.heldout_rows(),
            max_rows=c.eval.rows,
            batch_size=c.score.batch_size,
            put=self.put_whole,
        )

    def _load(self, name: str, dtype: str) -> Model:
        folder = self.folder / name
        if not (folder / checkpoint.MODEL_FILE).exists():
            raise InputError(f"{folder} holds no model yet: run the stage that trains it first.")
        params, shape, _ = checkpoint.load_model(folder, self.mesh)
        m = self.config.model
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return params, self._computed(shape, m.dtype if name == "checkpoints" else m.ref_dtype)

    def _computed(self, shape: LlamaConfig, dtype: str) -> LlamaConfig:
        """`shape` as this run computes it."""
        remat = self.config.model.remat
        # Unrolled, a training step on CPU takes a tenth less time, but compiling grows with depth,
        # and XLA's CPU backend only rematerialises inside a loop.
        unrolled = (
            jax.default_backend() == "cpu" and remat == "none" and shape.n_layers <= MOST_UNROLLED
        )
        return dataclasses.replace(
            shape,
            dtype=dtype,
            remat=remat,
            batch_axes=sharding.token_axes(self.mesh),
            scan_layers=not unrolled,
        )

    def _texts(self) -> Iterator[str]:
        """Training text of every domain in turn, TOKENIZER_SAMPLE characters of each."""
        for source in self.sources().values():
            left = TOKENIZER_SAMPLE
            for document in corpora.documents(source, "train", root=self.config.data.root):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break


@functools.cache  # the models of a run, and of the runs of one process, share one program
def _eval_fn(shape: LlamaConfig, chunk_tokens: int) -> Callable[[Any, step.Batch], step.Metrics]:
    return jax.jit(
        functools.partial(step.eval_step, apply=apply_fn(shape), chunk_tokens=chunk_tokens)
    )


def weights(domains: ConfigDict) -> dict[str, float]:
    return {name: source.weight for name, source in domains.items()}


def n_steps(settings: ConfigDict, rows: Mapping[str, loader.Rows]) -> int:
    """The steps of a `reference` or `train` section: as many as it says, or by its epochs."""
    by_epochs = settings.epochs * sum(map(len, rows.values())) / settings.batch_size
    return settings.steps or math.ceil(by_epochs)
