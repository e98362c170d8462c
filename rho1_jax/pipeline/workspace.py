"""What a run is given and what its folder holds, asked without loading a weight.

    config.json  data/  reference/  scores/  utility/  checkpoints/  metrics.csv  heldout.csv
    eval.json  samples.npz  report.html

A stage asks a Workspace for rows, tokenizer, cached scores, and for the digests that say whether
what lies there belongs to this run; the models themselves come from models.py beside it.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax import jsonfile
from rho1_jax.data import corpora, given_scores, loader, ref_scores
from rho1_jax.errors import InputError
from rho1_jax.models import tokenizer
from rho1_jax.models.formats import load
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.slm.step import Batch
from rho1_jax.training import hosts, program, sharding
from rho1_jax.training.interruption import StopSignal

BASELINE = "baseline"  # its folder inside the run's
TOKENIZER_SAMPLE = 8_000_000  # characters a domain: more no longer moves the merges of a BPE

Scores = dict[str, dict[str, np.ndarray]]  # domain -> {"ref_loss": [rows, S], ...}

_log = logging.getLogger("rho1_jax")


class Options(NamedTuple):
    """What the command line asks of the stages beside the config."""

    beam_runner: str = ""
    compare: str = ""  # the folder of a run to show beside this one
    baseline: bool = False  # train the plain baseline, too (baseline.py), and show it
    profile: tuple[int, int] | None = None  # the first and the last step that are traced


NO_OPTIONS = Options()


class Workspace:
    """A config, its folder and its devices: what every stage is given.

    label: stands before the names of its stages where they say something.
    """

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        mesh: Mesh,
        stop: StopSignal | None = None,
        options: Options = NO_OPTIONS,
        label: str = "",
    ):
        self.config, self.folder, self.mesh = config, folder, mesh
        self.stop = stop or StopSignal(mesh)
        self.options, self.label = options, label
        self.selection = config_lib.selection(
            config, sharding.n_batch_shards(mesh), sharding.n_row_parts(mesh)
        )
        self.key = jax.random.key(config.seed)

    # Text and rows

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

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: the one in its folder, else loaded or trained and put there."""
        folder, source = self.folder / "data", self.config.tokenizer.source
        if any(folder.glob("tokenizer.*")):
            return tokenizer.load(folder)
        if source == "train":
            tok = tokenizer.train(self._texts(), self.config.tokenizer.vocab_size)
        else:
            tok = self.named_tokenizer()
        if hosts.first():
            folder.mkdir(parents=True, exist_ok=True)
            tok.save(folder)
        return tok

    @property
    def vocab_size(self) -> int:
        """Tokens of the run's tokenizer: one that is trained later may come to fewer."""
        c = self.config.tokenizer
        return c.vocab_size if self._trains_tokenizer else self.tokenizer.vocab_size

    @property
    def separator(self) -> int:
        """The token between documents: the first, of a tokenizer that is trained later."""
        return 0 if self._trains_tokenizer else self.tokenizer.separator_id

    @property
    def _trains_tokenizer(self) -> bool:
        """Whether the run's tokenizer is trained later."""
        there = "tokenizer" in vars(self) or any((self.folder / "data").glob("tokenizer.*"))
        return self.config.tokenizer.source == "train" and not there

    def named_tokenizer(self) -> Tokenizer:
        """That of model.init, or of the file, folder or model that tokenizer.source names."""
        c = self.config
        if c.tokenizer.source == "init" and not c.model.init:
            raise InputError(
                "tokenizer.source=init means the tokenizer of model.init, but that is empty: set "
                "model.init, or tokenizer.source to train, a file or a folder."
            )
        if c.tokenizer.source == "init":
            return self.named_model(c.model.init).tokenizer
        place = load.locate(c.tokenizer.source)
        trained_here = place / "checkpoints"
        return tokenizer.load(trained_here if trained_here.exists() else place)

    @functools.cached_property
    def named_model(self) -> Callable[[str], load.Model]:
        """Describes model.init or reference.init, once: neither changes while a run goes on."""
        return functools.cache(load.describe)

    def train_rows(self, domains: ConfigDict) -> dict[str, loader.Rows]:
        return {name: loader.open_rows(self.folder / "data", name, "train") for name in domains}

    def heldout_rows(self) -> dict[str, loader.Rows]:
        """The validation rows of every domain that has any."""
        found = {n: loader.open_rows(self.folder / "data", n, "val") for n in self.sources()}
        return {name: rows for name, rows in found.items() if len(rows)}

    @functools.cached_property
    def visited_rows(self) -> dict[str, np.ndarray]:
        """domain -> the corpus rows that training will read, ascending."""
        c = self.config
        rows = self.train_rows(c.data.corpus)
        steps = n_steps(c.train, sum(map(len, rows.values())))
        return loader.visited_rows(rows, **mixture(c, "train", steps), num_steps=steps)

    def _texts(self) -> Iterator[str]:
        """Training text of every domain in turn, TOKENIZER_SAMPLE characters of each."""
        for source in self.sources().values():
            left = TOKENIZER_SAMPLE
            for document in corpora.documents(source, "train", root=self.config.data.root):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break

    # Batches and devices

    @functools.cached_property
    def parts(self) -> dict[str, Any]:
        """Which parts of a batch this host reads, as data/loader.py takes it."""
        parts, n_parts = sharding.host_parts(self.mesh, jax.process_index())
        return {"parts": parts, "n_parts": n_parts}

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every host reads as a whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This host's rows of a batch on its devices."""
        return sharding.batch_to_devices(batch, self.mesh)

    def put_whole(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """A batch that every host has as a whole on the devices of all."""
        return sharding.batch_to_devices(batch, self.mesh, whole=True)

    # What belongs together

    @functools.cached_property
    def has_reference(self) -> bool:
        """Whether the run trains or loads a reference before its policy."""
        return config_lib.needs_reference(self.config)

    @property
    def score_fields(self) -> tuple[str, ...]:
        """What is scored and cached for each row."""
        return program.score_fields(self.config)

    @property
    def caches_scores(self) -> bool:
        """Whether the reference is asked before training."""
        return program.caches_scores(self.config)

    def digest(self, model: str) -> str:
        """What tells a model's weights from others': of "initial", "reference" or "policy"."""
        if model != "initial":
            return load.describe(self.model_folder(model)).digest
        c = self.config
        if c.model.init:
            return self.named_model(c.model.init).digest
        return jsonfile.digest([c.seed, c.model.preset, self.tokenizer.vocab_size])

    def model_folder(self, model: str) -> Path:
        """Where the trained "policy" or the "reference" lies; InputError if it is not there."""
        folder = self.folder / ("checkpoints" if model == "policy" else model)
        if not (folder / load.MODEL_FILE).exists():
            raise InputError(f"{folder} holds no model yet: run the stage that trains it first.")
        return folder

    @property
    def reference_digest(self) -> str | None:
        """What tells this run's reference, or the scores it was given, from others'; None where it
        has neither."""
        if self.given_scores:
            return self._given_digest
        return self.digest("reference") if self.has_reference else None

    @functools.cached_property
    def _given_digest(self) -> str:
        return given_scores.digest(self.given_scores)

    @property
    def given_scores(self) -> str:
        """Where the reference's scores lie that are not computed here; "" if they are."""
        return self.config.score.source if self.caches_scores else ""

    def score_binding(self, rows: loader.Rows, kind: str) -> dict[str, str]:
        """What cached scores of `rows` belong to; kind: "scores" or "utility"."""
        binding = {"rows": rows.fingerprint}
        if self.reference_digest:
            binding["reference"] = self.reference_digest
        if kind == "utility":
            binding["utility"] = self.config.select.utility
        return binding

    def cached_scores(self, row_ids: Mapping[str, np.ndarray] | None = None) -> Scores | None:
        """The finished scores, if training reads any; InputError if some are missing.

        row_ids: by domain, of which rows; None: of all that training will read.
        """
        wanted = {}
        if self.caches_scores:
            wanted["scores"] = self.score_fields
        if self.selection.needs_utility:
            wanted["utility"] = ("utility",)
        if not wanted:
            return None
        rows = self.train_rows(self.config.data.corpus)
        found: Scores = {name: {} for name in rows}
        for (kind, fields), name in itertools.product(wanted.items(), rows):
            found[name] |= ref_scores.open_scores(
                self.folder / kind / name,
                fields=fields,
                row_ids=(row_ids or self.visited_rows)[name],
                binding=self.score_binding(rows[name], kind),
            )
        return found


def mixture(config: ConfigDict, section: str, steps: int) -> dict[str, Any]:
    """What decides the batches of a `reference` or `train` section, as data/loader.py takes it."""
    data = config.data
    of_policy = section == "train"
    later = config_lib.later_weights(config) if of_policy else []
    return {
        "weights": {
            name: d.weight for name, d in (data.corpus if of_policy else data.clean).items()
        },
        "later": [(round(share * steps), of) for share, of in later],
        "batch_size": config[section].batch_size,
        "seed": config.seed,
    }


def n_steps(settings: ConfigDict, n_rows: int) -> int:
    """The steps of a `reference` or `train` section: as many as it says, or by its epochs."""
    return settings.steps or math.ceil(settings.epochs * n_rows / settings.batch_size)


def decays_after(settings: ConfigDict, steps: int) -> int | None:
    """The step of a `reference` or `train` section after which its learning rate begins to depend
    on how many there are; None for a schedule that never does, or always."""
    return steps - settings.decay_steps if settings.schedule == "wsd" else None


def say(stage: str, message: str) -> None:
    """One line about a stage."""
    _log.info("%s: %s", stage, message)


def warn(stage: str, message: str) -> None:
    """One line about what a stage found that its user should know."""
    _log.warning("%s: WARNING: %s", stage, message)
