"""The order of things. One file a stage, each with `check` (no data, all of them before the first
stage) beside `run`, which leaves its output in the run's folder and returns at once if that is
finished: the same command always resumes.
"""

from collections.abc import Callable
from typing import NamedTuple

from rho1_jax.pipeline import evaluate, prepare, reference, report, score, train
from rho1_jax.pipeline.workspace import Workspace


class Stage(NamedTuple):
    check: Callable[[Workspace], None]
    run: Callable[[Workspace], None]


STAGES = {
    "prepare": Stage(prepare.check, prepare.run),
    "reference": Stage(reference.check, reference.run),
    "score": Stage(score.check, score.run),
    "train": Stage(train.check, train.run),
    "evaluate": Stage(evaluate.check, evaluate.run),
    "report": Stage(report.check, report.run),
}
