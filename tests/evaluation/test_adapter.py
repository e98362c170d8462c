"""What lm-eval asks of a model, answered by a tiny one or by hand."""

import math

import pytest

from rho1_jax.evaluation.adapter import Adapter
from rho1_jax.evaluation.scorer import Scorer


def test_rolling_likelihood_is_the_whole_text_in_windows(scorer):
    class Request:
        args = ("true false 1 2 3 " * 10,)

    short = Scorer(scorer.params, scorer.config, scorer.tokenizer, batch_size=2, max_length=32)
    (whole,) = Adapter(short).loglikelihood_rolling([Request], disable_tqdm=True)
    n = len(scorer.encode(Request.args[0]))
    assert n > 64
    assert -whole / n == pytest.approx(math.log(300), rel=0.05)


class Writes(Scorer):
    """A scorer that writes a program, and what it comes to when it has seen the output."""

    def complete(self, texts, *, stop, **_):
        assert stop == ["\n\nQ", "```output\n"]
        if "```output\n42\n```" in texts[0]:
            return ["It is \\boxed{42}."]
        return ["```python\nprint(6 * 7)\n```\n"]


def test_a_task_with_tools_runs_programs(scorer):
    class Request:
        args = ("Q", {"until": ["\n\nQ"], "max_gen_toks": 9, "do_sample": False, "tools": True})

    writes = Writes(scorer.params, scorer.config, scorer.tokenizer)
    (text,) = Adapter(writes).generate_until([Request], disable_tqdm=True)
    assert text == "```python\nprint(6 * 7)\n```\n```output\n42\n```\nIt is \\boxed{42}."


def test_each_request_goes_with_its_own_settings(scorer):
    asked = []

    class Records(Scorer):
        def complete(self, texts, *, stop, max_new_tokens, done, **_):
            asked.append((texts, stop, max_new_tokens))
            for i, text in enumerate(texts):
                done(i, text.upper())

    class Request:
        def __init__(self, prompt, n):
            self.args = (prompt, {"until": ["."], "max_gen_toks": n, "do_sample": False})

    records = Adapter(Records(scorer.params, scorer.config, scorer.tokenizer))
    requests = [Request("a", 5), Request("b", 7), Request("c", 5)]
    assert records.generate_until(requests, disable_tqdm=True) == ["A", "B", "C"]
    assert asked == [(["a", "c"], ["."], 5), (["b"], ["."], 7)]


def test_what_fits_of_each_kind_of_request(scorer):
    lm = Adapter(Scorer(scorer.params, scorer.config, scorer.tokenizer, max_length=16))
    long = "true false 1 2 3 " * 10
    assert lm.fits((long,))  # scored in pieces
    assert lm.fits(("1", " 2"))
    assert not lm.fits((long, " 2"))
    assert lm.fits(("1", {"max_gen_toks": 8}))
    assert not lm.fits(("1", {"max_gen_toks": 16}))
