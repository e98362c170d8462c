"""A request to stop is heard wherever it arrives."""

import os
import signal
import time

import pytest

from rho1_jax.training import sharding
from rho1_jax.training.interruption import Interrupted, StopSignal


class Unseen:
    """What its destructor raises, no caller sees."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # the handler runs before the next statement


def lose_one_unseen() -> None:
    unseen = Unseen()
    del unseen
    time.sleep(5)


def test_a_signal_in_a_destructor_comes_again(capsys):
    stop = StopSignal(sharding.make_mesh(-1, 1, 1))
    with stop.installed(), pytest.raises(Interrupted) as caught:
        lose_one_unseen()
    assert caught.value.signum == signal.SIGINT
    assert capsys.readouterr().err == ""


def test_a_run_that_has_ended_is_not_stopped_again():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(sharding.make_mesh(-1, 1, 1)).installed():
        unseen = Unseen()
        del unseen
    assert signal.getsignal(signal.SIGINT) is before
    time.sleep(0.1)  # a KeyboardInterrupt would come here
