"""Every key of a config as data: its default, what it may be, what it means, what it decides.

`ENTRIES` is all there is to say: config.py makes the default config and the checks of it, `page`
docs/config.md. A new key is one entry here.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rho1_jax.config_values import (
    LARGEST,
    Changes,
    Choice,
    Kind,
    Names,
    Number,
    Parts,
    Ratios,
    Score,
    Sources,
    Text,
    Utility,
    YesNo,
)
from rho1_jax.errors import InputError, shown
from rho1_jax.models.presets import PRESETS
from rho1_jax.slm import scores
from rho1_jax.slm.selection import SCHEDULES, SCOPES, SET_OPERATIONS

_INTRODUCTION = """# Every key of a config

Written by `python -m rho1_jax.config > docs/config.md` from rho1_jax/config_schema.py; a test keeps
it true. Any value can be set on the command line, `--config.select.ratio=0.4`, and is checked
before anything else happens. *Decides* names the stages whose output the value decides: once such
a stage has started in a folder, the key stays as it is there. A key with "-" only says how to
compute, or what to show, and may change at any time: the method stays the same, to rounding."""
STAGES = ("prepare", "reference", "score", "train")
ALL, FROM_REFERENCE, FROM_SCORE, TRAIN = (STAGES[i:] for i in range(4))
FREE: tuple[str, ...] = ()

SHARE = Number(0.0, 1.0)
ROWS, STEPS, TOKENS = (Number(1, 10**9, of=unit) for unit in ("rows", "steps", "tokens"))
STEPS_OR_NONE = Number(0, 10**9, of="steps")
PLACE = Text("a folder, file or name")


class Sometimes(NamedTuple):
    """Stages that a key decides only where others say so: `holds` of a config, `when` in words."""

    stages: tuple[str, ...]
    when: str
    holds: Callable[[ConfigDict], bool]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key.

    key: its parts with dots between; "*" stands for the name of any domain.
    binds: the stages whose output is another, as a method, if the value is another; none if it only
      says how to compute (then nothing but rounding may differ) or what to show.
    """

    key: str
    default: Any
    kind: Kind
    meaning: str
    binds: tuple[str, ...] = FREE
    sometimes: Sometimes | None = None

    def bound(self, config: ConfigDict, stage: str) -> bool:
        """Whether the key decides what `stage` makes of this config."""
        s = self.sometimes
        return stage in self.binds or (s is not None and stage in s.stages and s.holds(config))


def _relevance(stages: tuple[str, ...]) -> Sometimes:
    return Sometimes(
        stages, "select.utility is relevance", lambda c: c.select.utility == "relevance"
    )


def _competes_within_microbatch(c: ConfigDict) -> bool:
    s, together = c.select, {"middle", "diversity"}
    if s.score == "all" or s.scope == "batch":
        return False
    if s.scope in ("microbatch", "shard") or s.score == "combined":
        return True
    named = {name for name, _ in s.parts} if s.score in SET_OPERATIONS else {s.score}
    return bool(named & together)


_SHARD = Sometimes(TRAIN, "select.scope is shard", lambda c: c.select.scope == "shard")
_MICROBATCH = Sometimes(
    TRAIN,
    "select.scope is microbatch or shard, or sequence with a score that compares the tokens of a "
    "microbatch (combined, middle, diversity)",
    _competes_within_microbatch,
)


def _training(
    section: str, steps: int, epochs: float, data: str, binds: tuple[str, ...]
) -> tuple[Entry, ...]:
    """What the reference and the policy share: length, optimizer and schedule."""
    entries = (
        Entry("steps", steps, STEPS_OR_NONE, "Updates; 0: as many as `epochs` says.", binds),
        Entry("epochs", epochs, Number(0.0, 1e4, of="epochs"),
              f"Passes over the rows of `{data}`, where `steps` is 0.", binds),
        Entry("batch_size", 8, ROWS, "Of a step, over all devices and microbatches.", binds),
        Entry("accumulation", 1, Number(1, 10**9, of="microbatches"),
              "In a step, one in memory at a time.", FREE,
              _MICROBATCH if section == "train" else None),
        Entry("optimizer", "adamw", Choice(("adamw", "adafactor", "muon")), "What makes "
              "updates of gradients (training/optimizer.py); muon is for the layers' matrices, "
              "AdamW for the rest.", binds),
        Entry("moments_dtype", "float32", Choice(("float32", "bfloat16")),
              "Of the first moment; the second stays float32.", binds),
        Entry("lr", 3e-3, Number(0.0, LARGEST, above=True), "Peak learning rate.", binds),
        Entry("schedule", "cosine", Choice(("cosine", "linear", "constant", "wsd")), "Of the "
              "learning rate after the warmup; with constant and wsd (warmup, stable, decay) a run "
              "may go on for more steps.", binds),
        Entry("warmup_steps", 20, STEPS_OR_NONE, "Steps from a learning rate of 0 to the peak.",
              binds),
        Entry("decay_steps", 0, STEPS_OR_NONE, "The last steps, in which wsd decays.", binds),
        Entry("final_lr_share", 0.1, SHARE, "Learning rate of the last step over the peak; the "
              "schedule leads there, unless it is constant.", binds),
        Entry("b1", 0.9, Number(0.0, 1.0, below=True), "Decay of the first moment; adafactor keeps "
              "none where it is 0.", binds),
        Entry("b2", 0.95, Number(0.0, 1.0, below=True), "AdamW's decay of the second moment "
              "(adafactor has its own).", binds),
        Entry("weight_decay", 0.1, Number(0.0, LARGEST),
              "Decoupled weight decay, of matrices only.", binds),
        Entry("clip", 1.0, Number(0.0, LARGEST, above=True),
              "Largest global norm of the gradient; what is above is scaled down.", binds),
        Entry("most_bad_steps", 10, STEPS,
              "In a row, without a finite loss and gradient (each changes nothing), after which "
              "the run stops."),
        Entry("spike", 0.0, Number(1.0, LARGEST, above=True, also=0.0),
              "A step whose gradient norm is above this many times its recent median changes "
              "nothing; 0: off.", binds),
    )  # fmt: skip
    return tuple(dataclasses.replace(e, key=f"{section}.{e.key}") for e in entries)


def _domain(section: str, weight: Entry) -> tuple[Entry, ...]:
    return (
        Entry(f"{section}.*.spec", "", Text("files:GLOB[,GLOB], tfds:NAME, hf:REPO[/FOLDER] or "
              "builtin:NAME", pattern=r"(files|tfds|hf|builtin):.*\S.*"),
              "Where the text comes from; the globs start in `data.root`.", ALL),
        Entry(f"{section}.*.text", "text", Text("a field or a template", lines=True),
              "The field of a record that holds the text, a template such as "
              "`{question}\\n{answer}`, several of these with ` | ` between (the first that a "
              "record has the fields of), or `messages`.", ALL),
        Entry(f"{section}.*.split_field", "", Text("a field", empty=True),
              "The field that says train or val; \"\": the dataset's own splits, or 1 % of the "
              "documents are held out by their hash.", ALL),
        dataclasses.replace(weight, key=f"{section}.*.weight"),
        Entry(f"{section}.*.prompt", "", Text("a template", empty=True, lines=True),
              "What comes before the text and carries no loss.", ALL),
    )  # fmt: skip


_WEIGHT = Number(0.0, LARGEST)

ENTRIES: tuple[Entry, ...] = (
    Entry("name", "run", Text("a name without slashes", pattern=r"(?!\.+$)[^/\\]{1,100}"),
          "Of the experiment, and of its folder `runs/NAME`."),
    Entry("seed", 0, Number(0, 2**32 - 1),
          "Of initial weights, order of rows and random scores.", ALL),
    Entry("log_every", 1, STEPS, "From one line of metrics.csv to the next."),
    Entry("loss_chunk_tokens", 4096, TOKENS, "At most, whose logits exist at once."),

    Entry("model.preset", "tiny", Choice(PRESETS),
          "A shape of models/presets.py; ignored where `model.init` brings one.", FROM_REFERENCE),
    Entry("model.init", "", Text("a run, RUN@STEP for a checkpoint it keeps, a Hugging Face "
          "folder or name, a GGUF file", empty=True),
          "What reference and policy start from; \"\": from scratch.", FROM_REFERENCE,
          Sometimes(("prepare",), "tokenizer.source is init",
                    lambda c: c.tokenizer.source == "init")),
    Entry("model.dtype", "float32", Choice(("float32", "bfloat16")),
          "Of the computation; master weights are float32. Bound because the rounding of bfloat16 "
          "is that of a step's signal, not only of its last digits.", FROM_REFERENCE),
    Entry("model.ref_dtype", "float32", Choice(("float32", "bfloat16")),
          "Of the reference's parameters and computation when it scores. Bound because rounded "
          "losses rank tokens in another order.", FROM_SCORE),
    Entry("model.remat", "none", Choice(("none", "dots", "full")),
          "What the backward pass computes again instead of keeping: nothing, all but matrix "
          "products, everything."),

    Entry("tokenizer.source", "train", PLACE,
          "`train` (on this text), `init` (that of `model.init`), or a file or folder.", ALL),
    Entry("tokenizer.vocab_size", 2048, Number(257, 10**6, of="tokens"),
          "At most, of a tokenizer trained here; 256 of them are the bytes.", ALL),

    Entry("data.root", ".", PLACE, "Where relative `files:` start. Free, since rows are bound to "
          "what is in the files, not to where they lie."),
    Entry("data.seq_len", 256, Number(1, 10**7, of="tokens"), "Targets in a row (context length).",
          ALL),
    Entry("data.separate_documents", True, YesNo(), "No document of a row sees another, in "
          "attention and positions (models/documents.py); False: a row is one text.",
          FROM_REFERENCE),
    Entry("data.corpus", {}, Sources(), "Domains that the policy is trained on, by name.", ALL),
    *_domain("data.corpus", Entry("", 1.0, _WEIGHT, "Share of the mixture's tokens, relative to "
             "the other domains'; 0: only evaluated on.", TRAIN, _relevance(("score",)))),
    Entry("data.weight_changes", (), Changes(), "Mixtures in stages: from that share of training "
          "on, the domain of `data.corpus` has that weight.", TRAIN),
    Entry("data.clean", {}, Sources(), "Domains that the reference is trained on, by name.", ALL),
    *_domain("data.clean", Entry("", 1.0, _WEIGHT, "Share of the reference's tokens, relative to "
             "the other domains'.", FROM_REFERENCE)),

    *_training("reference", 200, 3.0, "data.clean", FROM_REFERENCE),
    Entry("reference.init", "", Text("as `model.init`", empty=True),
          "A finished reference to load instead of training one; \"\": train.", FROM_REFERENCE),

    Entry("score.cached", True, YesNo(),
          "Score the corpus once, before training; False: the reference runs in every step. Bound "
          "because what is stored is rounded to float16, which moves tokens at the threshold.",
          FROM_SCORE),
    Entry("score.entropy", False, YesNo(), "Also store the reference's predictive entropy.",
          ("score",)),
    Entry("score.source", "", Text("a Parquet file, or a folder of such", empty=True),
          "The reference's scores, computed elsewhere, in the place of a reference of this run. "
          "Free, since scores are bound to what is in the files."),
    Entry("score.batch_size", 32, ROWS, "Scored or evaluated at once, over all devices."),

    Entry("select.score", "excess", Score(("all", *scores.SCORES, "combined", *SET_OPERATIONS)),
          "What ranks tokens (slm/scores.py); `all` selects none: causal language modeling. A "
          "function elsewhere binds with its module's source.",
          TRAIN),
    Entry("select.ratio", 0.6, Number(0.0, 1.0, above=True), "Share of the valid tokens that "
          "are trained on; 1 is causal language modeling.", TRAIN),
    Entry("select.scope", "batch", Choice(SCOPES), "The set within which tokens compete.", TRAIN),
    Entry("select.parts", (), Parts(), "The scores of combined, intersection and union; weights "
          "count for combined, and those of the same score add up.", TRAIN),
    Entry("select.domain_ratios", (), Ratios(), "Domains of `data.corpus` whose tokens compete "
          "among themselves, at this ratio; 1: all are trained. The others compete together.",
          TRAIN),
    Entry("select.final_ratio", 0.0, SHARE, "Ratio of the last step; 0: it stays.", TRAIN),
    Entry("select.schedule", "linear", Choice(SCHEDULES), "How the ratio gets there.", TRAIN),
    Entry("select.unselected_weight", 0.0, Number(0.0, 1.0, below=True), "Weight in the loss of "
          "the tokens that are not selected; above 0 none is dropped.", TRAIN),
    Entry("select.weight_range", 0.0, Number(0.0, 1.0, below=True), "What a selected token weighs "
          "lies between 1 minus and 1 plus this, by its excess loss over its row's mean "
          "(slm/selection.py); 0: all weigh the same. With `select.score=all`, weights instead of "
          "a mask.", TRAIN),
    Entry("select.weight_slope", 1.0, Number(0.0, LARGEST, above=True), "How steeply that weight "
          "grows with the excess loss, per nat.", TRAIN),
    Entry("select.distill_weight", 0.0, Number(0.0, LARGEST), "Weight in the loss of the "
          "divergence from the reference's prediction; 0: no distillation.", TRAIN),
    Entry("select.distill_top", 32, Number(1, 256, of="tokens"), "The reference's likeliest tokens "
          "that are kept of each prediction; all others count as one.", TRAIN),
    Entry("select.distill_on", "selected", Choice(("selected", "all")), "Tokens that divergence is "
          "of.", TRAIN),
    Entry("select.ref_ema_decay", 1.0, Number(0.0, 1.0, above=True), "Below 1 the reference is an "
          "exponential moving average of the policy, with this decay a step.", TRAIN),
    Entry("select.ref_ema_init", "policy", Choice(("policy", "reference")),
          "What that average starts from.", TRAIN),
    Entry("select.utility", "", Utility(), "The score `utility`: likeness to the clean text, or "
          "1 on tokens with these tags (data/taggers.py).", FROM_SCORE),

    *_training("train", 300, 0.0, "data.corpus", TRAIN),
    Entry("train.backward_rows_top", 0, Number(0, 10**4, of="blocks"),
          "So many upper blocks go back through selected tokens only, which is approximate "
          "(slm/backward.py); 0: the exact gradient.", TRAIN),

    Entry("eval.every", 50, STEPS, "From one held-out loss to the next."),
    Entry("eval.rows", 64, ROWS, "Held out, of each domain, at most."),
    Entry("eval.tasks", (), Names(), "Benchmarks of the finished policy (evaluation/harness.py)."),
    Entry("eval.data_dir", "", Text("a folder", empty=True), "Of the benchmarks' files."),
    Entry("eval.limit", 0, Number(0, 10**9, of="items"), "Of each benchmark; 0: all."),
    Entry("checkpoint.every", 100, STEPS, "From one checkpoint to the next."),
    Entry("checkpoint.keep", 2, Number(1, 10**9, of="checkpoints"), "The newest are kept."),
    *(Entry(f"mesh.{axis}", size, Number(1, 10**6, also=-1, of="devices"),
            f"Over which {what}.", FREE,
            _SHARD)
      for axis, size, what in (
          ("data", -1, "rows are split; -1 takes the devices that the other axes leave"),
          ("fsdp", 1, "rows and parameters are split"),
          ("sequence", 1, "each row is split along its length, and parameters are"),
          ("tensor", 1, "each layer is split"))),
)  # fmt: skip

BY_KEY = {entry.key: entry for entry in ENTRIES}
DOMAINS = ("data.corpus", "data.clean")
KEYS = tuple(key for key in BY_KEY if "*" not in key and key not in DOMAINS)
# Old name -> the name today.
RENAMED = {
    "select.floor": "select.unselected_weight",
    "select.decay": "select.ref_ema_decay",
    "select.average_of": "select.ref_ema_init",
}


@functools.cache
def entry_of(key: str) -> Entry:
    """The entry of a key; InputError, with the nearest, if there is none."""
    parts = key.split(".")
    domain = ".".join(parts[:2]) in DOMAINS and len(parts) == 4
    found = BY_KEY.get(".".join([*parts[:2], "*", parts[3]]) if domain else key)
    if found is not None:
        return found
    if ".".join(parts[:2]) in DOMAINS:
        raise InputError(f"{key} is no field of a source: write config.source('files:*').")
    if key in RENAMED:
        raise InputError(f"{key} is called {RENAMED[key]} now.")
    nearest = difflib.get_close_matches(key[:100], KEYS, n=1, cutoff=0.0)[0]
    raise InputError(f"The config's {shown(key)} is not a key: did you mean {nearest}?")


def page() -> str:
    """docs/config.md: every key in tables, in Markdown."""
    lines, section = [_INTRODUCTION], None
    for entry in ENTRIES:
        first = entry.key.split(".")[0] if "." in entry.key else "Others"
        if first != section:
            section = first
            head = "| key | default | may be | meaning | decides |\n| --- | --- | --- | --- | --- |"
            lines.append(f"\n## {section}\n\n{head}")
        key = entry.key.replace("*", "NAME")
        default = f"`{entry.default!r}`"
        cells = (f"`{key}`", default, entry.kind.allowed, entry.meaning, _decides(entry))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _decides(entry: Entry) -> str:
    said = [", ".join(entry.binds)] if entry.binds else []
    if entry.sometimes:
        said.append(f"{', '.join(entry.sometimes.stages)} where {entry.sometimes.when}")
    return "; ".join(said) or "-"
