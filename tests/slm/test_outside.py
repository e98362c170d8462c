"""A score from outside: what it may read, what it is refused for, what it is bound to."""

import hashlib
import sys

import numpy as np
import pytest

from docs.examples import relative
from rho1_jax.errors import InputError
from rho1_jax.slm import outside, scores
from rho1_jax.slm.selection import Selection, select
from tests.slm.test_selection import every_signal

EXAMPLE = "docs.examples.relative:relative"
MODULE = """
import jax.numpy as jnp

NUMBER = 3
def good(loss, *, valid): return loss * helper(valid)
def helper(valid): return jnp.where(valid, 1.0, 0.0)
def typo(los, valid): return los
def many(*signals): return signals[0]
def none(): return 0.0
def positional(loss, /): return loss
def row(loss): return loss.mean(axis=1)
def whole(targets): return targets
def pair(loss): return loss, loss
def breaks(loss): return loss if loss > 0 else -loss
def looks(loss): return loss[{}]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The file of the module `own_scores`, as often as it is written anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "own_scores.py"

    def write(text):
        file.write_text(text)
        sys.modules.pop("own_scores", None)
        outside.load.cache_clear()

    write(MODULE)
    yield write
    sys.modules.pop("own_scores", None)
    outside.load.cache_clear()


def test_it_is_a_score_like_the_others():
    assert scores.needs(EXAMPLE) == {"loss", "ref_loss"}
    s = every_signal()
    np.testing.assert_array_equal(
        scores.score(EXAMPLE, s), relative.relative(s["loss"], s["ref_loss"])
    )
    parts = ((EXAMPLE, 1.0), ("entropy", 0.5))
    for score in (EXAMPLE, "combined", "intersection"):
        selection = Selection(score, 0.4, parts=parts)
        assert selection.needs_reference
        kept = select(selection, s)
        assert 0 < kept.sum() < s["valid"].sum()
        assert (kept != select(Selection("entropy", 0.4), s)).any()
    assert outside.load(EXAMPLE) is relative.relative


@pytest.mark.usefixtures("module")
def test_all_that_it_names_is_given():
    assert scores.needs("own_scores:good") == {"loss"}
    s = every_signal()
    found = scores.score("own_scores:good", s)
    np.testing.assert_array_equal(found, np.where(s["valid"], s["loss"], 0.0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "cannot be imported .ModuleNotFoundError: No module named"),
        ("own_scores:god", "function 'god' is not known: did you mean good"),
        ("own_scores:NUMBER", "is no function but a int"),
        ("own_scores:typo", "its argument 'los' is not known: did you mean loss"),
        ("own_scores:many", "argument .signals, which no signal can be given to"),
        ("own_scores:positional", "which no signal can be given to"),
        ("own_scores:none", "takes no argument"),
        ("own_scores:row", r"makes float32 \[2\] of signals \[2, 4\]"),
        ("own_scores:whole", r"makes int32 \[2, 4\]"),
        ("own_scores:pair", "makes a tuple"),
        ("own_scores:breaks", "fails on signals .b, S. "),
        ("own_scores:looks", "fails on signals .*IndexError"),
        ("own_scores", "'own_scores' is not known"),
    ],
)
@pytest.mark.parametrize("place", ["score", "part"])
@pytest.mark.usefixtures("module")
def test_what_is_none_is_one_sentence(name, words, place):
    with pytest.raises(InputError, match=words) as raised:
        Selection(name) if place == "score" else Selection("combined", parts=((name, 1.0),) * 2)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("text", ["import sys; sys.exit(3)", "1 / 0", "def f(loss: return"])
def test_a_module_that_fails_is_one_sentence(module, text):
    module(text)
    with pytest.raises(InputError, match=r"cannot be imported \(\w+: "):
        outside.load("own_scores:f")


def test_the_digest_is_of_the_module(module):
    before = outside.source_digest("own_scores:good")
    assert outside.source_digest("own_scores:good") == before
    module(MODULE.replace("1.0", "2.0"))  # in what the function calls
    assert outside.source_digest("own_scores:good") != before
    text = "from docs.examples.relative import relative\n"
    module(text)
    alone = {hashlib.sha256(text.encode()).hexdigest(), outside.source_digest(EXAMPLE)}
    assert outside.source_digest("own_scores:relative") not in alone
