"""Benchmarks through lm-eval, with our models behind its model interface.

    python -m rho1_jax.evaluation.harness --checkpoint=MODEL --tasks=gsm8k,arc_easy --data_dir=DIR

A task is a file in evaluation/tasks/, whose data is in DIR, or on a hub where no DIR is given; or
else one of lm-eval's own.
"nine" stands for the paper's mathematics, "fifteen" for its general tasks. Leaves results.json,
samples/TASK.jsonl and a cache of answers in --out; the same command goes on where it was stopped.

--limit (items of each task), --num_fewshot and --max_gen_toks are the task's own unless given,
--max_length in tokens the model's context; --batch_size=8, --dtype=float32|bfloat16.
"""

import difflib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import yaml

from rho1_jax import command_line, files, jsonfile
from rho1_jax.errors import InputError
from rho1_jax.evaluation import likelihood
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models.formats import load
from rho1_jax.training import checkpoint, program, sharding

TASKS = Path(__file__).parent / "tasks"
GROUPS = {
    "nine": "gsm8k math svamp asdiv mawps tabmwp mathqa mmlu_stem sat_math",
    "fifteen": "mmlu bbh math gsm8k mbpp humaneval agieval arc_easy arc_challenge boolq piqa "
    "hellaswag winogrande openbookqa tydiqa",
}
OPTIONS: dict[str, Any] = {
    "checkpoint": "", "tasks": "", "data_dir": "", "limit": int, "num_fewshot": int,
    "max_gen_toks": int, "batch_size": 8, "max_length": int, "dtype": ("float32", "bfloat16"),
    "out": Path("benchmarks"),
}  # fmt: skip
REQUIRED = {
    "checkpoint": f"give {load.ACCEPTED}",
    "tasks": "give names or groups, with commas between them",
}
_PACKAGES = ("rho1_jax", "lm_eval", "jax", "math-verify", "sympy", "numpy")


def check(tasks: Sequence[str], data_dir: str = "") -> None:
    """InputError that names the nearest task for an unknown one, or the file a task of ours lacks.

    Loads no model, and lm-eval (seconds) only for a task that is not ours or has no data of ours.
    Whether a hub answers is not asked.
    """
    for name in _expanded(tasks):
        about = _about(name)
        if has_data(name, data_dir):
            continue
        if about and data_dir:
            raise InputError(
                f"{name} needs {about['file']}, which is not in {data_dir}: put it there, or name "
                "another folder."
            )
        theirs = _manager(data_dir, theirs=True).all_tasks
        if name in theirs:
            continue
        if about:
            raise InputError(f"{name} needs {about['file']}: name a data_dir that holds it.")
        known = [*_ours(), *GROUPS, *theirs]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise InputError(f"There is no task {name}: did you mean {nearest}?")


def evaluate(
    scorer: Scorer,
    tasks: Sequence[str],
    *,
    out: Path,
    data_dir: str = "",
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
) -> dict[str, Any]:
    """Run `tasks` and return what is written to out/results.json.

    "tasks": task -> {"n", "prompts" (sha256 of all prompts), "defined_by" (rho1_jax or lm_eval),
    "cut" (items whose prompt and answer did not fit whole into "context" tokens: see Scorer),
    metric: [value, standard error]}. "seconds" is for all of them. limit: items of each task.
    num_fewshot, max_gen_toks: instead of the tasks' own. InputError as from `check`, and for
    settings that a task cannot have.
    """
    from rho1_jax.evaluation.adapter import Adapter

    check(tasks, data_dir)
    lm, model, start = Adapter(scorer), checkpoint.fingerprint(scorer.params), time.monotonic()
    found = _answered(
        lm,
        _expanded(tasks),
        data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        gen_kwargs=None if max_gen_toks is None else {"max_gen_toks": max_gen_toks},
        use_cache=str(out / f"answers-{model[:16]}-{scorer.config.dtype}-{scorer.max_length}"),
    )
    seconds = time.monotonic() - start
    summaries = {_plain(name): _summary(name, values) for name, values in found["results"].items()}
    for name, samples in found["samples"].items():
        summaries[_plain(name)] |= _of_items(scorer, lm, samples)
        _write_samples(out / "samples" / f"{_plain(name)}.jsonl", samples)
    results = {
        "model": model,
        "context": scorer.max_length,
        "versions": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "tasks": summaries,
    }
    jsonfile.write_sealed(out / "results.json", results)
    return results


def _answered(lm: Any, names: Sequence[str], data_dir: str, **settings: Any) -> Any:
    """What lm-eval finds; InputError for what a user can mend."""
    from lm_eval import evaluator

    ours = {name: str(path) for name, path in _ours().items() if has_data(name, data_dir)}
    try:
        return evaluator.simple_evaluate(
            lm,
            tasks=[ours.get(name, name) for name in names],
            task_manager=_manager(data_dir, theirs=not ours.keys() >= set(names)),
            bootstrap_iters=1000,
            **settings,
        )
    except OSError as error:  # what the datasets library raises, and a disk that is full
        raise InputError(
            f"{', '.join(names)}: some data cannot be had or something not be written "
            f"({_first_line(error)}); check the network, HF_HUB_OFFLINE, --data_dir and --out."
        ) from error
    except AssertionError as error:
        if "fewshot" not in str(error):
            raise
        raise InputError(
            f"num_fewshot={settings['num_fewshot']}: a task has not so many examples "
            f"({_first_line(error)}); give fewer."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@functools.cache
def _manager(data_dir: str, *, theirs: bool) -> Any:
    """lm-eval's way to tasks; to index its thousands of own ones takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata={"data_dir": data_dir}, include_defaults=theirs)


def _expanded(tasks: Sequence[str]) -> list[str]:
    names = [name for task in tasks for name in GROUPS.get(task.strip(), task).split()]
    return list(dict.fromkeys(names))


def has_data(name: str, data_dir: str) -> bool:
    """Whether `name` is a task of ours whose data can be had."""
    about = _about(name)
    return Path(data_dir, about["file"]).exists() if about and data_dir else "hub" in about


def _ours() -> dict[str, Path]:
    return {path.stem: path for path in TASKS.glob("[a-z]*.yaml")}


def _about(name: str) -> dict[str, Any]:
    """What our task `name` says of its data; {} if it is none of ours."""
    path = _ours().get(name)
    return yaml.load(path.read_text(), _PlainLoader)["metadata"] if path else {}


def _plain(name: str) -> str:
    """A task's name without what keeps ours apart from lm-eval's."""
    return name.removeprefix("rho_")


class _PlainLoader(yaml.SafeLoader):
    """Leaves the functions that a task names unread."""


_PlainLoader.add_constructor("!function", lambda *_: None)


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _summary(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """{"n", "defined_by", metric: [value, standard error]} of one of lm-eval's results.

    n is 0 for a group of tasks, whose items are theirs.
    """
    out: dict[str, Any] = {"n": 0, "defined_by": "lm_eval" if _plain(name) == name else "rho1_jax"}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            label = metric if kind in ("none", "") else f"{metric} ({kind})"
            out[label] = [value, error if isinstance(error, float) else None]
    return out


def _of_items(scorer: Scorer, lm: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What `evaluate` says of a task beside lm-eval's metrics."""
    prompts = json.dumps([sample["arguments"] for sample in samples], sort_keys=True, default=str)
    asked = [(sample["arguments"][0][0], sample["doc"]) for sample in samples]
    return {
        "n": len(samples),
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "cut": sum(not all(map(lm.fits, sample["arguments"])) for sample in samples),
        **likelihood.small_metrics(scorer, asked),
    }


def _write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = ("doc_id", "target", "resps", "prompt_hash")
    with files.replacing(path) as stream:
        for sample in samples:
            metrics = {name: sample[name] for name in sample["metrics"]}
            row = {k: sample[k] for k in keep} | metrics
            stream.write((json.dumps(row, default=str) + "\n").encode())


def table(results: dict[str, Any]) -> str:
    """The results as lines of text; last, what did not fit into the model's context."""
    lines, cut = [], []
    for task, values in results["tasks"].items():
        for metric, value in values.items():
            if isinstance(value, list):
                error = "" if value[1] is None else f" ± {value[1]:.4f}"
                lines.append(f"{task:16} {metric:28} {value[0]:.4f}{error}  (n={values['n']})")
        if n_cut := values.get("cut"):
            cut.append(f"{task} ({n_cut:,} of {values['n']:,} items)")
    if cut:
        lines.append(
            f"Prompt and answer did not fit into {results['context']:,} tokens, so that the "
            f"prompt lost its beginning or the answer its end: {', '.join(cut)}."
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    return command_line.run(_run, argv, __doc__)


def _run(argv: Sequence[str]) -> None:
    args = command_line.parse(argv, OPTIONS, required=REQUIRED)
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    _require_sound(args, sharding.n_batch_shards(mesh))
    program.keep_compiled(args.out)
    with jax.set_mesh(mesh):
        params, shape, tok = checkpoint.load_model(args.checkpoint, mesh)
        config = shape.computed(dtype=args.dtype, batch_axes=sharding.BATCH_AXES)
        found = evaluate(
            Scorer(params, config, tok, batch_size=args.batch_size, max_length=args.max_length),
            args.tasks.split(","),
            out=args.out,
            data_dir=args.data_dir,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            max_gen_toks=args.max_gen_toks,
        )
    print(table(found))


def _require_sound(args: SimpleNamespace, n_devices: int) -> None:
    """InputError for what is wrong before a model is loaded."""
    for name, least in {"limit": 1, "num_fewshot": 0, "max_gen_toks": 1, "batch_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}={value}: give at least {least}.")
    if args.batch_size % n_devices:
        raise InputError(
            f"--batch_size={args.batch_size} does not divide over {n_devices} devices: make it a "
            f"multiple of {n_devices}."
        )
    if not _expanded(args.tasks.split(",")):
        raise InputError("--tasks names no task: give names or groups, with commas between them.")
    check(args.tasks.split(","), args.data_dir)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={args.out} cannot be made ({error.strerror}).") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
