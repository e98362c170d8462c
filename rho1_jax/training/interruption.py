"""SIGTERM and Ctrl-C: finish the step in hand, save, say how to resume."""

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(BaseException):
    """Somebody asked the run to stop; what was finished is on disk.

    Like KeyboardInterrupt no Exception: handlers that explain damage must not see it.
    """

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(saved)
        self.signum = signum
        self.saved = saved


class StopSignal:
    """Set by the first SIGTERM or SIGINT; a second one raises at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False

    def handle(self, signum: int, _frame) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self.deferred:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Inside, the first signal only sets `signum`: the loop looks at it between steps."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle both signals while inside; only possible in the main thread."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {s: signal.signal(s, self.handle) for s in signals}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
