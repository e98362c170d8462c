"""Metrics that move while accuracy still stands at chance: how likely what is right is."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rho1_jax.evaluation.scorer import Scorer

WRONG = 3  # answers of other questions that each right answer is compared with

Estimate = list[float | None]  # value, standard error


def small_metrics(scorer: Scorer, asked: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """{metric: [mean over items, standard error]} of documents as evaluation/tasks/ makes them.

    asked: (prompt, document). `solution_loss` and `solution_bits_per_byte` of the gold solution
    after the prompt; `answer_margin`, nats by which the right answer is likelier than the wrong
    ones are on average; `answer_first`, how often it is likelier than each of them. Wrong answers
    are the other choices, or else answers of other questions. `solution_cut` counts the solutions
    that did not fit into the context together with their whole prompt. {} for documents of another
    form.
    """
    if not asked or not all("gold" in document and "target" in document for _, document in asked):
        return {}
    spans = [(prompt, " " + document["target"]) for prompt, document in asked]
    candidates = _candidates([document for _, document in asked])
    for (prompt, _), answers in zip(asked, candidates, strict=True):
        spans += [(prompt, f" The answer is {answer}.") for answer in answers]
    pairs = [_pair(scorer, *span) for span in spans]
    nats = [-logp for logp, _ in scorer.score(pairs)]

    n = len(asked)
    loss = [x / len(tokens) for x, (_, tokens) in zip(nats[:n], pairs[:n], strict=True)]
    sizes = [len(text.encode()) for _, text in spans[:n]]
    bits = [x / math.log(2) / size for x, size in zip(nats[:n], sizes, strict=True)]
    margins, firsts, start = [], [], n
    for answers in candidates:
        right, *wrong = nats[start : start + len(answers)]
        start += len(answers)
        if wrong:
            margins.append(statistics.fmean(wrong) - right)
            firsts.append(float(right < min(wrong)))
    return {
        "solution_loss": _estimate(loss),
        "solution_bits_per_byte": _estimate(bits),
        "solution_cut": sum(not scorer.fits(*span) for span in spans[:n]),
        "answer_margin": _estimate(margins),
        "answer_first": _estimate(firsts),
    }


def _candidates(documents: list[dict[str, Any]]) -> list[list[str]]:
    """For each document its right answer, then the wrong ones."""
    golds = [document["gold"] for document in documents]
    out = []
    for i, document in enumerate(documents):
        others = document.get("choices") or golds[i + 1 :] + golds[:i]
        right = document["choices"][document["label"]] if document.get("choices") else golds[i]
        wrong = [answer for answer in dict.fromkeys(others) if answer != right]
        out.append([right, *(wrong if document.get("choices") else wrong[:WRONG])])
    return out


def _pair(scorer: Scorer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Both tokenized apart, so that right and wrong answers follow the same context."""
    return scorer.encode(prompt) or [scorer.tokenizer.separator_id], scorer.encode(text)


def _estimate(values: list[float]) -> Estimate:
    if not values:
        return [math.nan, None]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return [statistics.fmean(values), error]
