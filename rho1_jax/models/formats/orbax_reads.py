"""Reading what Orbax wrote: damage is one sentence, and nothing else is printed around it."""

import contextlib
import functools
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from rho1_jax.errors import InputError

_LAST_READS = 0.2  # seconds


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """InputError for whatever Orbax raises (many kinds) when the checkpoint at `path` is damaged.

    When one array cannot be read, nobody fetches the errors of the others' reads: asyncio, Orbax
    and the interpreter would print a page of tracebacks around the one sentence.
    """
    with quiet():
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {str(error)[:200]}"
            _forget(error)
            raise InputError(
                f"Checkpoint {path} cannot be read ({told}); if it is damaged, delete that folder, "
                "and the same command resumes from the step before it."
            ) from None


def _forget(error: BaseException | None) -> None:
    """Let go of what the failed calls held: reads that nobody waits for, which now say so."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    time.sleep(_LAST_READS)  # those under way end, and find their event loop closed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, asyncio and Orbax tell nothing of their own, nor the interpreter of their reads."""
    _hide_lost_reads()
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio")]
    disabled = [logger.disabled for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # coroutines that were never awaited
            for logger in loggers:
                logger.disabled = True
            yield
    finally:
        for logger, was in zip(loggers, disabled, strict=True):
            logger.disabled = was


@functools.cache
def _hide_lost_reads() -> None:
    """From here on nothing is printed of reads that nobody waits for.

    A slow one may fail, or find its event loop closed, long after the one that failed first has
    been told of, in a thread of its own. uvloop prints such an error twice, by both hooks.
    """
    logging.getLogger("asyncio").addFilter(_no_lost_read)
    unraisable, uncaught = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = lambda what: None if _of_a_read(what.exc_value) else unraisable(what)
    sys.excepthook = lambda kind, error, trace: (
        None if _of_a_read(error) else uncaught(kind, error, trace)
    )


def _of_a_read(error: BaseException | None) -> bool:
    return "Event loop is closed" in str(error) or "while reading array index" in str(error)


def _no_lost_read(record: logging.LogRecord) -> bool:
    """False for asyncio's word that nobody fetched a read's error."""
    error = record.exc_info[1] if record.exc_info else None
    of_a_read = _of_a_read(error) or "tensorstore_spec" in str(error)
    return not (of_a_read and "never retrieved" in record.getMessage())
