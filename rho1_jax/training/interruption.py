"""SIGTERM and Ctrl-C: finish the step in hand, save, say how to resume."""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from rho1_jax.training import hosts


class Interrupted(BaseException):
    """Somebody asked the run to stop; what was finished is on disk.

    Like KeyboardInterrupt no Exception: handlers that explain damage must not see it.
    """

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(saved)
        self.signum = signum
        self.saved = saved


_SOON = 0.01  # seconds


class StopSignal:
    """Set by the first SIGTERM or SIGINT of this host; a second one raises at once."""

    def __init__(self, mesh: Mesh) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._mesh = mesh
        self._asked: jax.Array | None = None

    def handle(self, signum: int, _frame) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self.deferred:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Inside, the first signal only sets `signum`: the loop asks `now` between steps."""
        self.deferred, self._asked = True, None
        try:
            yield
        finally:
            self.deferred = False

    def now(self) -> int | None:
        """The signal that ends the loop here, on all hosts after the same step; else None.

        One host answers for itself. Several compare: each call sends this host's signal and reads
        what the call before sent, which is there by now, so that no device waits.
        """
        if jax.process_count() == 1:
            return self.signum
        before, self._asked = self._asked, hosts.greatest(self.signum or 0, self._mesh)
        return (int(before) or None) if before is not None else None

    def after_stage(self) -> int | None:
        """The signal that any host has received, all hosts having come to the same point."""
        if jax.process_count() == 1:
            return self.signum
        return int(hosts.greatest(self.signum or 0, self._mesh)) or None

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Handle both signals while inside; only possible in the main thread."""
        signals = (signal.SIGTERM, signal.SIGINT)
        _come_again_if_swallowed()
        before = {s: signal.signal(s, self.handle) for s in signals}
        try:
            yield self
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


@functools.cache
def _come_again_if_swallowed() -> None:
    """From here on an Interrupted that no caller can see comes once more, a moment later.

    What is raised in a destructor or in a callback of the garbage collector goes no further: the
    interpreter would print it, and the run go on.
    """
    unraisable = sys.unraisablehook

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Interrupted):
            unraisable(what)
            return
        timer = threading.Timer(_SOON, _send_again, (what.exc_value.signum,))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook


def _send_again(signum: int) -> None:
    handler = signal.getsignal(signum)
    main = threading.main_thread().ident
    if main and isinstance(getattr(handler, "__self__", None), StopSignal):  # the run goes on
        signal.pthread_kill(main, signum)
