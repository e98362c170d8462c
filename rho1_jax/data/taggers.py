"""What kind of text a token is: LaTeX, code, number, name, word, punctuation or space.

A tagger is any function from a text to one tag for each of its characters, an index into TAGS; the
one here goes by regular expressions. It says which tokens a selection keeps (experiments/
selected_tokens.py) and can itself be a score (training/utility.py).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int8

from rho1_jax.errors import InputError, require_known

Tagger = Callable[[str], Int8[np.ndarray, " n"]]

# The first rule that matches at a place takes all that it matches: a number in a formula is LaTeX.
_RULES = {
    "latex": r"\$[^$\n]{1,200}\$|\\[A-Za-z]+\*?(?:\{[^{}\n]*\})*|\\[^\sA-Za-z]|[_^]\{[^{}\n]*\}",
    "code": r"`[^`\n]+`|^(?:>>>|\.\.\.) .*$|</?[a-z][^<>\n]*>|\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\b"
    r"|\b[A-Za-z_]\w*\([^()\n]*\)|\b[A-Za-z]+_\w+|https?://\S+|[=!<>+*/&|-]=|[{};]",
    "number": r"\d+(?:[.,]\d+)*%?",
    "name": r"\b[A-Z][\w'-]*",
    "word": r"[^\W\d_](?:[^\W\d_]|['-](?=[^\W\d_]))*",
    "punctuation": r"[^\w\s]|_",
}
TAGS = (*_RULES, "space")
UTILITIES = ("relevance", "tags")
_PATTERN = re.compile("|".join(f"(?P<{tag}>{rule})" for tag, rule in _RULES.items()), re.MULTILINE)


def by_pattern(text: str) -> Int8[np.ndarray, " n"]:
    """The tag of each character; a name is any word with a capital, be it only the sentence's."""
    tags = np.full(len(text), TAGS.index("space"), np.int8)
    for match in _PATTERN.finditer(text):
        tags[match.start() : match.end()] = TAGS.index(match.lastgroup or "space")
    return tags


def of_pieces(pieces: Sequence[str], tagger: Tagger = by_pattern) -> Int8[np.ndarray, " n"]:
    """The tag of each token of a text that is cut into `pieces`: that of its first character that
    is no space, be the token a part of a longer number, name or formula."""
    text = "".join(pieces)
    of_characters = tagger(text + " ")
    tags, start = np.empty(len(pieces), np.int8), 0
    for i, piece in enumerate(pieces):
        blank = len(piece) - len(piece.lstrip())
        tags[i] = of_characters[start + (blank if blank < len(piece) else 0)]
        start += len(piece)
    return tags


def of_rows(
    tokens: Int[np.ndarray, "B T"], tokenizer: Any, tagger: Tagger = by_pattern
) -> Int8[np.ndarray, "B S"]:
    """The tag of each target of rows [B, T = S+1]."""
    return np.stack([of_pieces(tokenizer.pieces(row), tagger)[1:] for row in tokens])


def parse_utility(name: str) -> tuple[str, tuple[str, ...]]:
    """Kind and tags of a `select.utility`; InputError if there is no such thing."""
    kind, _, rest = name.partition(":")
    require_known("select.utility", kind, UTILITIES)
    tags = tuple(rest.split(",")) if rest else ()
    for tag in tags:
        require_known("select.utility: tag", tag, TAGS)
    if (kind == "tags") != bool(tags):
        raise InputError(
            f"select.utility is {name!r}: write relevance, or tags with the tags to keep, "
            "for instance tags:number,latex."
        )
    return kind, tags
