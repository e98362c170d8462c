"""Damage is one sentence, and loggers and hooks are afterwards as they were."""

import logging
import sys
from pathlib import Path

import pytest

from rho1_jax.errors import InputError
from rho1_jax.models.formats import orbax_reads


@pytest.mark.parametrize(
    "raised", [ValueError("damaged"), InputError("other"), KeyboardInterrupt()]
)
def test_loggers_are_as_before_after_an_error(raised):
    loggers = [logging.getLogger(name) for name in (None, "absl", "asyncio")]
    before = [logger.disabled for logger in loggers]

    def fail():
        with orbax_reads.reading(Path("steps/1")):
            assert logging.getLogger("absl").disabled
            raise raised

    with pytest.raises((InputError, KeyboardInterrupt)):
        fail()
    assert [logger.disabled for logger in loggers] == before


def test_a_read_that_ends_late_prints_nothing(capsys):
    """As uvloop does from a thread of the storage library, after the one sentence was said."""
    with orbax_reads.quiet():
        pass
    for told, error in ((False, RuntimeError("Event loop is closed")), (True, ValueError("other"))):
        sys.excepthook(type(error), error, None)
        assert bool(capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("message", "error", "told"),
    [
        ("Task exception was never retrieved", ValueError("x [tensorstore_spec={}]"), False),
        ("Task exception was never retrieved", RuntimeError("Event loop is closed"), False),
        ("Task exception was never retrieved", ValueError("another task"), True),
        ("Executing took long", ValueError("x [tensorstore_spec={}]"), True),
    ],
)
def test_asyncio_does_not_tell_of_a_late_read(caplog, message, error, told):
    with orbax_reads.quiet():
        pass
    logging.getLogger("asyncio").error(message, exc_info=error)
    assert bool(caplog.records) == told
