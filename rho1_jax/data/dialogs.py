"""Texts to fine-tune on: what a person asked, and the spans a model is to learn to answer."""

import json
import re
from typing import Any

import numpy as np

Spans = tuple[tuple[int, int], ...]  # of characters: start, stop

# What a program printed is given to the model, not written by it (ToRA, arXiv 2309.17452).
_TOOL_OUTPUT = re.compile(r"```output\n.*?```[ \t]*\n?", re.S)
_NAMES = {"user": "Question: ", "human": "Question: ", "assistant": "Answer: ", "gpt": "Answer: "}
_ANSWERING = ("assistant", "gpt")


def answered(prompt: str, response: str) -> tuple[str, Spans]:
    """Prompt and response as one text, and what of it carries loss: all of the response but the
    output of tools."""
    edges = [len(prompt)]
    for output in _TOOL_OUTPUT.finditer(response):
        edges += [len(prompt) + output.start(), len(prompt) + output.end()]
    edges.append(len(prompt) + len(response))
    return prompt + response, tuple(
        (start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start
    )


def chat(messages: str) -> tuple[str, Spans] | None:
    """The same of a conversation, [{"role", "content"}, ...] (or "from", "value") as JSON.

    Written as "Question: ...", "Answer: ..." like the prompts of evaluation/tasks/; system messages
    come as they are. None if it is no such list, or nothing is answered.
    """
    text = ""
    spans: list[tuple[int, int]] = []
    try:
        for message in json.loads(messages):
            role, content = _turn(message)
            more, answer = answered(text + _NAMES.get(role, ""), content)
            spans += answer if role in _ANSWERING else []
            text = more + "\n\n"
    except (TypeError, KeyError, ValueError):
        return None
    return (text.removesuffix("\n\n"), tuple(spans)) if spans else None


def trained_tokens(spans: Spans, starts: np.ndarray, length: int) -> np.ndarray:
    """bool [n + 1]: which of a text's n tokens reach into a span, and whether the text's end does.

    starts: where in the text, of `length` characters, each token begins.
    """
    marked = np.zeros(len(starts) + 1, bool)
    stops = np.append(starts[1:], length)[: len(starts)]
    for start, stop in spans:
        marked[:-1] |= ((stops > start) | (starts >= start)) & (starts < stop)
        marked[-1] |= stop == length  # that an answer is finished is to be learnt too
    return marked


def _turn(message: Any) -> tuple[str, str]:
    role = message["role"] if "role" in message else message["from"]
    content = message["content"] if "content" in message else message["value"]
    if not isinstance(content, str):
        raise TypeError(content)
    return role, content
