"""Stage 2: the reference in reference/, the initial model trained on the clean corpus or one loaded
from reference.init."""

from collections.abc import Mapping

from rho1_jax import jsonfile
from rho1_jax.models import tokenizer
from rho1_jax.pipeline import models, plan, train
from rho1_jax.pipeline.workspace import Workspace, say, warn
from rho1_jax.training import checkpoint, hosts, sharding

JUDGED = "heldout.json"  # in reference/: its held-out losses beside those of the initial model


def check(ws: Workspace) -> None:
    """InputError if the batches do not fit the devices, or a named model is not one to use."""
    c = ws.config
    if not ws.has_reference:
        return
    if not c.reference.init:
        t = c.reference
        sharding.require_divisible(t.batch_size, t.accumulation, ws.mesh, "reference")
        plan.resumes_at(ws, "reference")
    for source in filter(None, (c.model.init, c.reference.init)):
        named = ws.named_model(source)
        if c.tokenizer.source != "train":
            tokenizer.require_same(ws.named_tokenizer(), named.tokenizer)


def run(ws: Workspace) -> None:
    """Trains or links it, and warns where it knows the clean text no better than the policy."""
    c, folder = ws.config, ws.folder / "reference"
    if not ws.has_reference:
        why = f"select.score={c.select.score} reads none"
        if ws.selection.needs_reference:
            why = "it is a moving average of the policy, from the policy's start"
        if ws.given_scores:
            why = f"its scores are given, in {ws.given_scores}"
        return say("reference", f"{why}, skipped")
    if c.reference.init:
        tokenizer.require_same(ws.tokenizer, ws.named_model(c.reference.init).tokenizer)
        hosts.once(lambda: checkpoint.write_model_link(folder, c.reference.init))
        say("reference", f"is {c.reference.init}")
    else:
        train.fit(ws, train.of_reference(ws))
    return _warn_if_weak(ws)


def _warn_if_weak(ws: Workspace) -> None:
    """A reference that knows the clean text no better than the policy ranks tokens by accident."""
    c = ws.config
    losses = _judged(ws)
    for domain in c.data.clean or c.data.corpus:
        if domain not in losses["reference"]:  # nothing was held out
            continue
        theirs, ours = (losses[name][domain] for name in ("reference", "initial"))
        if not theirs < ours:  # nor where one of them is NaN
            warn(
                "reference",
                f"its held-out loss on {domain} is {theirs:.3f}, the policy starts with "
                f"{ours:.3f}: excess loss will mislead; train it longer or on better text.",
            )


def _judged(ws: Workspace) -> Mapping[str, Mapping[str, float]]:
    """Held-out nats per token of reference and initial model by domain, computed once."""
    path = ws.folder / "reference" / JUDGED
    binding = {name: ws.digest(name) for name in ("reference", "initial")}
    binding |= {name: rows.fingerprint for name, rows in ws.heldout_rows().items()}
    if path.exists() and (found := jsonfile.read(path))["binding"] == binding:
        return found["losses"]
    losses = {}
    for name, load_model in (("reference", models.reference), ("initial", models.initial)):
        params, shape = load_model(ws)
        measured = models.heldout_fn(ws, shape)(params)
        losses[name] = {domain: result["loss"] for domain, result in measured.items()}
    judged = {"binding": binding, "losses": losses}
    hosts.once(lambda: jsonfile.write_sealed(path, judged))
    return losses
