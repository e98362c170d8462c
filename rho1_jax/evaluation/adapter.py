"""A model behind lm-eval's interface. Importing this file imports lm-eval, which takes a second."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from rho1_jax.evaluation import tools
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models.generation.generate import Sampling


class Adapter(TemplateLM):
    """Every answer goes to lm-eval's cache as it comes: a run can be stopped at any time."""

    tokenizer_name = "rho1_jax"

    def __init__(self, scorer: Scorer):
        super().__init__()
        self._scorer = scorer

    @property
    def eot_token_id(self) -> int:
        return self._scorer.tokenizer.separator_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        del add_special_tokens  # none are ever added
        return self._scorer.encode(string)

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether the arguments of a request fit whole into the model's context."""
        if len(args) == 1:  # a text that is scored in pieces
            return True
        prompt, then = args
        if not isinstance(then, str):
            then = normalize_gen_kwargs(then)["max_gen_toks"]
        return self._scorer.fits(prompt, then)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        asked = [args for args, _, _ in requests]
        with self._keeping("loglikelihood", asked, disable_tqdm) as keep:
            return self._scorer.score([(c, t) for _, c, t in requests], keep)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        pairs = [([self.prefix_token_id], self._scorer.encode(*r.args)) for r in requests]
        asked = [request.args for request in requests]
        with self._keeping("loglikelihood_rolling", asked, disable_tqdm) as keep:
            scored = self._scorer.score(pairs, lambda i, result: keep(i, result[0]))
        return [nats for nats, _ in scored]

    def generate_until(self, requests, disable_tqdm=False):
        texts = [""] * len(requests)
        asked = [request.args for request in requests]
        with self._keeping("generate_until", asked, disable_tqdm) as keep:
            for alike in _by_settings(asked):

                def done(j, text, alike=alike):
                    texts[alike[j]] = text
                    keep(alike[j], text)

                self._generate([asked[i][0] for i in alike], asked[alike[0]][1], done)
        return texts

    def _generate(
        self, prompts: list[str], settings: dict[str, Any], done: Callable[[int, str], None]
    ) -> None:
        """What follows each prompt, with the settings of a task, goes to `done`."""
        settings = dict(normalize_gen_kwargs(settings))
        complete = functools.partial(
            self._scorer.complete,
            max_new_tokens=settings["max_gen_toks"],
            sampling=Sampling(settings["temperature"], float(settings.get("top_p", 1.0))),
        )
        if not settings.get("tools"):
            complete(prompts, stop=settings["until"], done=done)
            return
        write = functools.partial(complete, stop=[*settings["until"], tools.OUTPUT_HEAD])
        with tools.Sandbox() as sandbox:
            for i, text in enumerate(tools.solve(prompts, write, sandbox.run)):
                done(i, text)

    @contextlib.contextmanager
    def _keeping(
        self, kind: str, asked: Sequence[Any], disable_tqdm: bool
    ) -> Iterator[Callable[[int, Any], None]]:
        """A function that keeps the answer to asked[i] and moves a progress bar."""
        with tqdm(total=len(asked), desc=kind, disable=disable_tqdm, mininterval=1.0) as bar:

            def keep(i: int, answer: Any) -> None:
                bar.update()
                self.cache_hook.add_partial(kind, asked[i], answer)

            yield keep


def _by_settings(asked: Sequence[tuple[str, dict[str, Any]]]) -> list[list[int]]:
    """Indices of the requests that differ in nothing but their prompts."""
    groups: dict[str, list[int]] = {}
    for i, (_, settings) in enumerate(asked):
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
    return list(groups.values())
