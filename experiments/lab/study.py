"""What every experiment shares: its command line, the setting, the methods, tables and figures.

    python -m experiments.NAME [--scale=tiny|small|smollm2|tinyllama|mistral] [--seeds=3] --out=DIR
        [--data=DIR] [--config.KEY=VALUE]

The setting is the paper's: a base that already knows the noisy corpus goes on training on it. At
scales `tiny` and `small` each seed trains that base itself, on rows in another order; the larger
ones start from model.init. The reference is the base trained on the clean text.

--data=DIR replaces the embedded corpus by files: DIR/corpus/* (noisy), DIR/clean/*, and
optionally DIR/eval/NAME.jsonl, records with "split": "val" that are only evaluated on.
--config.KEY=VALUE changes every run, as for the main job; what an experiment compares stays.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import math as math_config
from experiments.lab import pool
from rho1_jax import command_line, config_file
from rho1_jax import config as config_lib
from rho1_jax.config import source
from rho1_jax.errors import InputError

CLM = {"select.score": "all", "select.ratio": 1.0}
QA = "text | {question}\n{answer} | {problem}\n{solution}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """base_steps: of the base's own training; 0 where the config starts from a trained model.
    side_by_side: whether runs are small enough to go one on each core."""

    config: Callable[[str], ConfigDict]
    base_steps: int = 0
    side_by_side: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """One experiment at one scale. `out` is its folder, the pool of runs lies beside it.

    adapt: changes the scale's config where an experiment has other text; bases follow it, and
      `overrides` too.
    """

    name: str
    out: Path
    scale: str = "tiny"
    seeds: int = 3
    data: str = ""
    adapt: Callable[[ConfigDict], None] = lambda _: None
    overrides: tuple[str, ...] = ()  # KEY=VALUE

    @property
    def pool(self) -> Path:
        return self.out.parent / "pool"

    def base(self, seed: int, changes: Mapping[str, Any] | None = None) -> ConfigDict:
        """The base of a seed: CLM on the corpus, in an order that no other run sees."""
        c = self._config(seed, {**CLM, **(changes or {})})
        c.seed += 1000
        c.train.steps = SCALES[self.scale].base_steps
        return c

    def config(self, seed: int, changes: Mapping[str, Any] | None = None) -> ConfigDict:
        """SLM from the base of that seed, with `changes` ("select.ratio": 0.4, ...) to it.

        Changes to `model` and `data` hold for the base as well, so that the base fits.
        """
        changes = changes or {}
        c = self._config(seed, changes)
        if SCALES[self.scale].base_steps and not c.model.init:
            lasting = {k: v for k, v in changes.items() if k.split(".")[0] in ("model", "data")}
            c.model.init = str(pool.place(self.pool, self.base(seed, lasting)))
        return c

    def methods(self, seed: int, changes: Mapping[str, Any] | None = None) -> dict[str, ConfigDict]:
        """SLM, CLM and the controls, each from the base of that seed.

        The mixture has as much clean text as the reference saw, within the same number of tokens.
        """
        changes = changes or {}
        slm, clm = self.config(seed, changes), self.config(seed, {**changes, **CLM})
        clm_matched, mixture = ConfigDict(clm.to_dict()), ConfigDict(clm.to_dict())
        clm_matched.train.steps = round(clm.train.steps * relative_flops(slm))
        clean_rows = slm.reference.steps * slm.reference.batch_size
        shares = [domain.weight for domain in mixture.data.corpus.values()]
        for domain in mixture.data.corpus.values():
            domain.weight *= (clm.train.steps * clm.train.batch_size - clean_rows) / sum(shares)
        for name, domain in slm.data.clean.items():
            mixture.data.corpus[name] = ConfigDict(domain.to_dict())
            mixture.data.corpus[name].weight = clean_rows / len(slm.data.clean)
        return {
            "SLM": slm,
            "CLM": clm,
            "CLM, matched FLOPs": clm_matched,
            "CLM on corpus + clean": mixture,
            "random selection": self.config(seed, {**changes, "select.score": "random"}),
            "inverse selection": self.config(seed, {**changes, "select.score": "inverse"}),
        }

    def run(self, configs: Mapping[Any, ConfigDict]) -> dict[Any, Path]:
        """The finished runs of these configs, by the same keys."""
        folders = {key: pool.place(self.pool, config) for key, config in configs.items()}
        apart = SCALES[self.scale].side_by_side and jax.default_backend() == "cpu"
        pool.run_all(folders.values(), workers=len(pool.cores()) if apart else 1)
        return folders

    @property
    def targets(self) -> list[str]:
        """The domains that training is for: those only evaluated on if there are any, else the
        clean ones."""
        data = self._scaled().data
        return [name for name, d in data.corpus.items() if not d.weight] or list(data.clean)

    @property
    def corpus(self) -> list[str]:
        """The noisy domains that the policy is trained on."""
        data = self._scaled().data
        return [name for name, domain in data.corpus.items() if domain.weight]

    def _config(self, seed: int, changes: Mapping[str, Any]) -> ConfigDict:
        c = self._scaled()
        c.seed = seed
        c.score.entropy = True  # so that every score shares one pass of the reference
        c.update_from_flattened_dict(dict(changes))
        return c

    def _scaled(self) -> ConfigDict:
        c = SCALES[self.scale].config(self.data)
        c.data.separate_documents = False  # as docs/results were measured: separate_documents.py
        self.adapt(c)
        return config_file.overridden(c, self.overrides)


def tiny(data: str) -> ConfigDict:
    """0.4M parameters; the embedded corpus, or the files of --data."""
    c = ConfigDict(math_config.get_config().to_dict())
    c.model.preset = "micro"
    c.tokenizer.vocab_size = 1024
    c.data.seq_len = 128
    if data:
        _files(c, data)
    c.reference.update(steps=100, batch_size=8)
    c.train.update(steps=160, batch_size=8, lr=2e-3, warmup_steps=10)
    c.score.batch_size = 16
    c.eval.update(every=40, rows=64)
    c.checkpoint.update(every=200, keep=1)
    c.log_every = 10
    return c


def small(data: str) -> ConfigDict:
    """The same model for real text: about a minute and a half a run on one core."""
    c = tiny(data)
    c.tokenizer.vocab_size = 2048
    c.reference.update(steps=150, batch_size=16)
    c.train.update(steps=200, batch_size=16, warmup_steps=20)
    c.eval.every = 40
    c.checkpoint.every = 200
    return c


def debug(data: str) -> ConfigDict:
    """Two steps, for tests."""
    c = tiny(data)
    c.model.preset = "nano"
    c.tokenizer.vocab_size = 300
    c.data.seq_len = 32
    for section in (c.reference, c.train):
        section.update(steps=2, batch_size=8, warmup_steps=1)
    c.score.batch_size = c.eval.rows = 8
    c.eval.every = 1
    return c


def larger(variant: str) -> Callable[[str], ConfigDict]:
    """configs/math.py's variant, its reference trained on a tenth of the policy's tokens: the
    paper's share (3 epochs of 0.5B of 15B), in steps, so that FLOPs are known beforehand."""

    def config(data: str) -> ConfigDict:
        c = ConfigDict(math_config.get_config(variant).to_dict())
        if data:
            _files(c, data)
        rows = 0.1 * c.train.steps * c.train.batch_size
        c.reference.update(steps=round(rows / c.reference.batch_size), epochs=0.0)
        return c

    return config


def _files(c: ConfigDict, data: str) -> None:
    c.data.root = str(Path(data).resolve())
    c.data.corpus = ConfigDict({"web": source("files:corpus/*")})
    c.data.clean = ConfigDict({"clean": source("files:clean/*", text=QA)})
    for path in sorted(Path(data).glob("eval/*")):
        spec, name = f"files:eval/{path.name}", path.name.split(".")[0]
        c.data.corpus[name] = source(spec, text=QA, split="split", weight=0.0)


SCALES = {
    "tiny": Scale(tiny, base_steps=300, side_by_side=True),
    "small": Scale(small, base_steps=300, side_by_side=True),
    "smollm2": Scale(larger("smollm2")),
    "tinyllama": Scale(larger("tinyllama")),
    "mistral": Scale(larger("mistral")),
    "debug": Scale(debug, base_steps=2),
}


def flops(c: ConfigDict, reference_size: float = 1.0) -> float:
    """FLOPs of reference training, scoring and training, in rows trained by the policy.

    A forward pass is a third of a training step. Every row is scored once by a reference, be that
    one which follows the policy, and once more for its relevance, where the selection asks for it.
    reference_size: the reference's FLOPs for a token over the policy's.
    """
    trained = float(c.train.steps * c.train.batch_size)
    reference = c.reference.steps * c.reference.batch_size * config_lib.needs_reference(c)
    s = config_lib.selection(c, n_shards=1)
    passes = s.needs_reference + (s.needs_utility and c.select.utility == "relevance")
    return trained + reference_size * (reference + passes * trained / 3)


def relative_flops(c: ConfigDict) -> float:
    """Over those of CLM for as many tokens."""
    return flops(c) / (c.train.steps * c.train.batch_size)


def main(run: Callable[[Study], None], argv: Sequence[str], doc: str | None) -> int:
    """Run an experiment as the command line says; its exit status. Bad input is one sentence.

    doc: the experiment's docstring, for --help, to which that of every experiment is added.
    """
    return pool.command(functools.partial(_run, run), argv, f"{doc}\n{__doc__}")


def _run(run: Callable[[Study], None], argv: Sequence[str]) -> None:
    name = Path(argv[0]).stem
    plain, overrides = config_file.split(argv)
    options = {"scale": tuple(SCALES), "seeds": 3, "out": Path("runs") / name, "data": ""}
    args = command_line.parse(plain, options)
    if args.seeds < 1:
        raise InputError(f"--seeds={args.seeds}: give at least 1.")
    run(Study(name, args.out, args.scale, args.seeds, args.data, overrides=overrides))
