"""Symbolic equality of two answers by math-verify, in a process of its own that can be killed.

sympy can take for ever, and `10^{10^{10}}` all memory, inside C code that no signal interrupts.
This file is also that process: it reads [gold, answer] and writes true or false, as lines of JSON.
"""

import json
import math
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS = 5.0  # for one pair
START_SECONDS = 120.0  # for importing sympy on a busy machine
RELATIVE = 1e-4  # two decimals this near are one number
MEMORY = 4 * 2**30  # bytes of address space


class Judge:
    """The process, started when first needed and again after each one that was killed."""

    def __init__(self, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two LaTeX or plain expressions are equal; None if that took too long."""
        with self._lock:
            process = self._running()
            stdin: Any = process.stdin
            try:
                stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                stdin.flush()
            except BrokenPipeError:  # it died between two questions
                self.close()
                return None
            line = _line(process, self._seconds)
            if line is None:
                self.close()
                return None
            return json.loads(line)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P: this folder must not come before the packages that sympy imports.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if _line(self._process, START_SECONDS) is None:
                self.close()
                raise RuntimeError("math-verify does not start: is it installed?")
        return self._process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line that it writes; None if it does not within `seconds`, or has died."""
    stdout: Any = process.stdout
    with selectors.DefaultSelector() as ready:
        ready.register(stdout, selectors.EVENT_READ)
        if not ready.select(seconds):
            return None
    return stdout.readline() or None


def _near(a: Any, b: Any) -> bool:
    """Whether two values, numbers with a decimal point in one, are as good as equal."""
    from sympy import Expr, Float, Interval, MatrixBase, Set, Tuple

    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(map(_near, a.flat(), b.flat()))
    if isinstance(a, (Set, Tuple)) and a.func == b.func and len(a.args) == len(b.args):
        ordered = isinstance(a, (Interval, Tuple))
        parts = [x.args if ordered else sorted(x.args, key=_real) for x in (a, b)]
        return all(map(_near, *parts))
    if a == b or not (isinstance(a, Expr) and isinstance(b, Expr)):
        return a == b
    numbers = a.is_number and b.is_number and (a.has(Float) or b.has(Float))
    return numbers and math.isclose(float(a), float(b), rel_tol=RELATIVE)


def _real(part: Any) -> float:
    return float(part) if getattr(part, "is_number", False) else math.inf


def _serve() -> None:
    import logging
    import resource

    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Its own units are any letter behind a number ("2 t"), its boxes and anchors were looked for
    # before; nor may it take a number out of what it cannot read as a whole.
    notation = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    configs = (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=notation),)
    modes: Any = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Whatever sympy prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            parsed = [
                parse(f"${text}$", configs, parsing_timeout=None, **modes)
                for text in json.loads(line)
            ]
            equal = all(parsed) and (
                verify(*parsed, timeout_seconds=None, allow_set_relation_comp=True)
                or _near(parsed[0][0], parsed[1][0])
            )
        except (Exception, RecursionError):
            equal = False
        print(json.dumps(bool(equal)), file=out, flush=True)


if __name__ == "__main__":
    _serve()
