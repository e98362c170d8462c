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


def _near(gold: list, answer: list) -> bool:
    """Whether two real numbers, one of them written with a decimal point, are as good as equal."""
    from sympy import Float

    (a, *_), (b, *_) = gold, answer
    if not (a.is_number and b.is_number and (a.has(Float) or b.has(Float))):
        return False
    return math.isclose(float(a), float(b), rel_tol=RELATIVE)


def _serve() -> None:
    import logging
    import resource

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    configs = (LatexExtractionConfig(), ExprExtractionConfig())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Whatever sympy prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        try:
            parsed = [
                # Strings come back for what is no mathematics; those were compared before.
                parse(f"${text}$", configs, fallback_mode="no_fallback", parsing_timeout=None)
                for text in json.loads(line)
            ]
            equal = all(parsed) and (verify(*parsed, timeout_seconds=None) or _near(*parsed))
        except (Exception, RecursionError):
            equal = False
        print(json.dumps(bool(equal)), file=out, flush=True)


if __name__ == "__main__":
    _serve()
