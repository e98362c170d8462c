"""Benchmarks through lm-eval, with our models behind its model interface.

    python -m rho1_jax.evaluation.harness --checkpoint=MODEL --tasks=gsm8k,arc_easy --data_dir=DIR

A task is a file in evaluation/tasks/ where DIR or a hub has its data, else one of lm-eval's own.
"nine" stands for the paper's mathematics, "fifteen" for its general tasks. Leaves results.json,
samples/TASK.jsonl and a cache of answers in --out; the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml
from tqdm import tqdm

from rho1_jax import jsonfile
from rho1_jax.errors import InputError
from rho1_jax.evaluation import likelihood, tools
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models import load
from rho1_jax.models.generate import Sampling
from rho1_jax.training import checkpoint, program, sharding

TASKS = Path(__file__).parent / "tasks"
GROUPS = {
    "nine": "gsm8k math svamp asdiv mawps tabmwp mathqa mmlu_stem sat_math",
    "fifteen": "mmlu bbh math gsm8k mbpp humaneval agieval arc_easy arc_challenge boolq piqa "
    "hellaswag winogrande openbookqa tydiqa",
}
_PACKAGES = ("rho1_jax", "lm_eval", "jax", "math-verify", "sympy", "numpy")


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

    task -> {"n", "prompts" (sha256 of all prompts), "seconds" is for all of them,
    metric: [value, standard error]}. limit: items of each task. num_fewshot, max_gen_toks: instead
    of the tasks' own. InputError for unknown tasks and absent data.
    """
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    names = _expanded(tasks)
    ours = {name: str(TASKS / f"{name}.yaml") for name in names if has_data(name, data_dir)}
    # Indexing lm-eval's thousands of tasks takes seconds.
    manager = TaskManager(metadata={"data_dir": data_dir}, include_defaults=len(ours) < len(names))
    for name in names:
        if name not in ours and name not in manager.task_index:
            raise _unknown(name, data_dir, manager.all_tasks)
    specs: Any = [ours.get(name, name) for name in names]
    model = checkpoint.fingerprint(scorer.params)
    start = time.monotonic()
    try:
        found: Any = evaluator.simple_evaluate(
            as_lm(scorer),
            tasks=specs,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            gen_kwargs=None if max_gen_toks is None else {"max_gen_toks": max_gen_toks},
            use_cache=str(out / f"cache-{model[:16]}-{scorer.config.dtype}-{scorer.max_length}"),
            bootstrap_iters=1000,
        )
    except OSError as error:  # what the datasets library raises, and a disk that is full
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"{', '.join(names)}: some data cannot be had or something not be written ({reason}); "
            "check the network, HF_HUB_OFFLINE, --data_dir and --out."
        ) from error
    results = {
        "model": model,
        "versions": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
        "device": jax.devices()[0].device_kind,
        "seconds": time.monotonic() - start,
        "tasks": {
            name.removeprefix("rho_"): _summary(values, found["samples"].get(name, []))
            for name, values in found["results"].items()
        },
    }
    for name, samples in found["samples"].items():
        extra = likelihood.small_metrics(scorer, [_asked(sample) for sample in samples])
        results["tasks"][name.removeprefix("rho_")].update(extra)
        _write_samples(out / "samples" / f"{name.removeprefix('rho_')}.jsonl", samples)
    jsonfile.write(out / "results.json", results)
    return results


def as_lm(scorer: Scorer) -> Any:
    """The model behind lm-eval's interface."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Ours(TemplateLM):
        tokenizer_name = "rho1_jax"
        eot_token_id = scorer.tokenizer.separator_id

        def tok_encode(self, string, add_special_tokens=None, **_):
            del add_special_tokens  # none are ever added
            return scorer.encode(string)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            with _progress("loglikelihood", len(requests), disable_tqdm) as bar:

                def done(i, result):
                    bar.update()
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)

                return scorer.score([(c, t) for _, c, t in requests], done)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows, owners = [], []
            for i, request in enumerate(requests):
                cut = utils.get_rolling_token_windows(
                    scorer.encode(request.args[0]), self.prefix_token_id, scorer.max_length, 1
                )
                new = [(None, *utils.make_disjoint_window(window)) for window in cut]
                windows += new
                owners += [i] * len(new)
            totals = [0.0] * len(requests)
            scored = self._loglikelihood_tokens(windows, disable_tqdm)
            for i, (nats, _) in zip(owners, scored, strict=True):
                totals[i] += nats
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            results = [""] * len(requests)
            by_settings: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            with _progress("generate", len(requests), disable_tqdm) as bar:
                for indices in by_settings.values():
                    settings = normalize_gen_kwargs(requests[indices[0]].args[1])

                    def done(j, text, indices=indices):
                        bar.update()
                        results[indices[j]] = text
                        self.cache_hook.add_partial(
                            "generate_until", requests[indices[j]].args, text
                        )

                    complete = functools.partial(
                        scorer.complete,
                        max_new_tokens=settings["max_gen_toks"],
                        sampling=Sampling(
                            settings["temperature"], float(settings.get("top_p", 1.0))
                        ),
                    )
                    texts = [requests[i].args[0] for i in indices]
                    if not settings.get("tools"):
                        complete(texts, stop=settings["until"], done=done)
                        continue
                    stop = [*settings["until"], tools.OUTPUT_HEAD]
                    with tools.Sandbox() as sandbox:
                        write = functools.partial(complete, stop=stop)
                        for j, text in enumerate(tools.solve(texts, write, sandbox.run)):
                            done(j, text)
            return results

    return Ours()


def _progress(name: str, n: int, disable: bool) -> tqdm:
    return tqdm(total=n, desc=name, disable=disable, mininterval=1.0)


def _expanded(tasks: Sequence[str]) -> list[str]:
    names = [name for task in tasks for name in GROUPS.get(task, task).split()]
    return list(dict.fromkeys(names))


def has_data(name: str, data_dir: str) -> bool:
    """Whether `name` is a task of ours whose data can be had."""
    about = _about(name)
    return Path(data_dir, about["file"]).exists() if about and data_dir else "hub" in about


def _about(name: str) -> dict[str, Any]:
    """What our task `name` says of its data; {} if it is none of ours."""
    path = TASKS / f"{name}.yaml"
    return yaml.load(path.read_text(), _PlainLoader)["metadata"] if path.exists() else {}


def _unknown(name: str, data_dir: str, theirs: Sequence[str]) -> InputError:
    if about := _about(name):
        return InputError(f"{name} needs {about['file']}, which --data_dir={data_dir} lacks.")
    known = [path.stem for path in TASKS.glob("[a-z]*.yaml")] + [*GROUPS, *theirs]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return InputError(f"There is no task {name}: did you mean {nearest}?")


class _PlainLoader(yaml.SafeLoader):
    """Leaves the functions that a task names unread."""


_PlainLoader.add_constructor("!function", lambda *_: None)


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _summary(values: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """{"n", "prompts", metric: [value, standard error]} of one of lm-eval's results."""
    prompts = json.dumps([sample["arguments"] for sample in samples], sort_keys=True, default=str)
    out = {"n": len(samples), "prompts": hashlib.sha256(prompts.encode()).hexdigest()}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind in ("none", "") else f"{metric} ({kind})"
            out[name] = [value, error if isinstance(error, float) else None]
    return out


def _asked(sample: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(prompt, document) of one of lm-eval's samples."""
    return sample["arguments"][0][0], sample["doc"]


def _write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = ("doc_id", "target", "resps", "prompt_hash")
    with path.open("w") as f:
        for sample in samples:
            metrics = {name: sample[name] for name in sample["metrics"]}
            row = {k: sample[k] for k in keep} | metrics
            f.write(json.dumps(row, default=str) + "\n")


def table(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    lines = []
    for task, values in results["tasks"].items():
        for metric, value in values.items():
            if isinstance(value, list):
                error = "" if value[1] is None else f" ± {value[1]:.4f}"
                lines.append(f"{task:16} {metric:28} {value[0]:.4f}{error}  (n={values['n']})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser("harness", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help=load.ACCEPTED)
    parser.add_argument("--tasks", required=True, help="names or groups, with commas")
    parser.add_argument("--data_dir", default="", help="folder of the tasks' JSONL files")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--max_gen_toks", type=int)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=2048, help="tokens")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args(argv)
    try:
        mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
        sharding.require_divisible(args.batch_size, 1, mesh, "--batch_size")
        program.keep_compiled(args.out)
        with jax.set_mesh(mesh):
            params, config, tok = checkpoint.load_model(args.checkpoint, mesh)
            config = dataclasses.replace(config, dtype=args.dtype, batch_axes=sharding.BATCH_AXES)
            scorer = Scorer(
                params, config, tok, batch_size=args.batch_size, max_length=args.max_length
            )
            results = evaluate(
                scorer,
                args.tasks.split(","),
                out=args.out,
                data_dir=args.data_dir,
                limit=args.limit,
                num_fewshot=args.num_fewshot,
                max_gen_toks=args.max_gen_toks,
            )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
