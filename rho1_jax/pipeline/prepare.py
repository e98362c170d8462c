"""Stage 1: text to packed rows, per domain, in data/."""

from rho1_jax.data import builder, corpora
from rho1_jax.errors import InputError
from rho1_jax.pipeline.workspace import Workspace
from rho1_jax.training import hosts, sharding


def check(ws: Workspace) -> None:
    """InputError if a source cannot be read, a named tokenizer cannot be loaded, or rows of this
    length cannot be cut over the devices."""
    sharding.require_even_cut(ws.config.data.seq_len, ws.mesh)
    prepared = ws.folder / "data"
    for name, source in ws.sources().items():
        if not (prepared / name / "manifest.json").exists():
            corpora.require_readable(source, ws.config.data.root)
    if ws.config.tokenizer.source != "train" and not any(prepared.glob("tokenizer.*")):
        ws.named_tokenizer()


def run(ws: Workspace) -> None:
    """Several hosts take the domains in turn."""
    c = ws.config.data
    hosts.once(lambda: ws.tokenizer)
    with hosts.together():
        for name, source in hosts.in_turn(ws.sources().items()):
            builder.prepare(
                name,
                source,
                root=c.root,
                tokenizer=ws.tokenizer,
                seq_len=c.seq_len,
                out=ws.folder / "data",
                beam_runner=ws.options.beam_runner,
            )
    if not ws.heldout_rows().keys() & c.corpus.keys():
        raise InputError(
            "No document of data.corpus is held out for evaluation (1 % are, by a hash of their "
            "text): add text, or name a split_field that says train or val."
        )
