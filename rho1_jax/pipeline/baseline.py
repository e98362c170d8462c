"""The plain baseline of a run (--baseline), in baseline/ of its folder: the same initial model on
the same rows, for as many tokens, trained on every one of them (CLM). It has the stages train and
evaluate only; what the run keeps of text and tokenizer serves both.
"""

import os

from ml_collections import ConfigDict

from rho1_jax import config as config_lib
from rho1_jax.errors import InputError
from rho1_jax.pipeline.workspace import BASELINE, Workspace

STAGES = ("train", "evaluate")


def workspace(ws: Workspace) -> Workspace:
    """The baseline's; InputError where there is nothing to compare."""
    if ws.options.compare:
        raise InputError("--baseline and --compare are both given: the report shows one of them.")
    s = ws.selection
    if s.score == "all" or min(s.ratio, s.last_ratio) >= 1.0:
        raise InputError(
            f"--baseline is this run itself, which trains on every token (select.score={s.score}, "
            f"select.ratio={s.ratio}): leave the option out."
        )
    return Workspace(config(ws.config), ws.folder / BASELINE, ws.mesh, ws.stop, label="baseline ")


def config(ours: ConfigDict) -> ConfigDict:
    """CLM where `ours` selects; benchmarks are left to the run itself."""
    c = ConfigDict(ours.to_dict())
    c.select = config_lib.default_config().select
    c.select.update(score="all", ratio=1.0)
    c.train.backward_rows_top = 0
    c.eval.tasks = ()
    return c.lock()


def share_data(ws: Workspace) -> None:
    """The run's packed rows and tokenizer where the baseline looks for its own."""
    link = ws.folder / "data"
    ws.folder.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.join("..", "data"))
