"""Scores against a plain forward pass; batches, padding and sharding change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.errors import InputError
from rho1_jax.evaluation import scorer as scorer_file
from rho1_jax.evaluation.scorer import Scorer
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.generation import generate, prefix
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.training import sharding

TEXTS = ["one two three", "four", "five six seven eight nine ten", "a b", "xyz " * 20]


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(TEXTS * 5, 300)


@pytest.fixture(scope="module")
def model(tok):
    config = LlamaConfig(
        vocab_size=tok.vocab_size, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
        ffn_width=64,
    )  # fmt: skip
    params = llama.init(config, jax.random.key(0))
    # Larger weights, so that the next tokens are not all alike.
    return jax.tree.map(lambda x: x * 8, params), config


@pytest.fixture(scope="module")
def scorer(model, tok):
    return Scorer(*model, tok, batch_size=2, max_length=64)


def plainly(model, context, continuation):
    params, config = model
    tokens = jnp.array([context + continuation])
    hidden, head = llama.apply(params, tokens[:, :-1], config=config)
    logp = jax.nn.log_softmax((hidden @ head.T).astype(jnp.float32))[0]
    targets = tokens[0, 1:]
    n = len(continuation)
    own = jnp.take_along_axis(logp, targets[:, None], axis=1)[-n:, 0]
    return float(own.sum()), bool((logp.argmax(-1) == targets)[-n:].all())


def pairs_of(tok):
    ids = [t.ids.tolist() for t in tok.encode(TEXTS)]
    return [(ids[0], ids[1]), (ids[2], ids[3]), (ids[1], ids[2]), ([0], ids[0]), (ids[0], ids[0])]


def test_scores_are_those_of_a_plain_forward_pass(scorer, model, tok):
    seen = {}
    results = scorer.score(pairs_of(tok), seen.__setitem__)
    for pair, (nats, greedy) in zip(pairs_of(tok), results, strict=True):
        expected, expected_greedy = plainly(model, *pair)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy
    assert [seen[i] for i in range(len(results))] == results


def test_what_prompts_have_in_common_is_read_once(model, tok, monkeypatch):
    """Continuations of one and more tokens, one of which lies within what contexts share."""
    common, reads, read = list(range(10, 80)), [], prefix.read
    monkeypatch.setattr(prefix, "read", lambda *a: reads.append(len(a[1])) or read(*a))
    pairs = [(common, [7]), (common, [8, 9]), (common[:-3], common[-3:]), ([*common, 5], [5])]
    results = Scorer(*model, tok, batch_size=4, max_length=128).score(pairs)
    assert reads == [64]
    for pair, (nats, greedy) in zip(pairs, results, strict=True):
        expected, expected_greedy = plainly(model, *pair)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy


@pytest.mark.parametrize("window", [None, 6])
def test_what_several_continuations_follow_is_read_once(model, tok, monkeypatch, window):
    params, config = model
    config = dataclasses.replace(config, window=window)
    context, other, read = list(range(10, 20)), list(range(30, 37)), []
    continuations = scorer_file._continuations
    monkeypatch.setattr(
        scorer_file, "_continuations", lambda *a, **k: read.append(a[3]) or continuations(*a, **k)
    )
    pairs = [(context, [7]), (other, [8, 4, 3]), (context, [5, 6, 7, 8]), (other, [9])]
    pairs += [(context[:-2], [*context[-2:], 3]), (context, [6])]
    results = Scorer(params, config, tok, batch_size=2, max_length=64).score(pairs)
    assert [lengths.tolist() for lengths in read] == [[10, 7]]
    for pair, (nats, greedy) in zip(pairs, results, strict=True):
        expected, expected_greedy = plainly((params, config), *pair)
        assert nats == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy


def test_what_greedy_decoding_writes_is_greedy(scorer, model, tok):
    context = scorer.encode("one two")
    (written,) = generate.generate(*model, [context], max_new_tokens=6)
    assert scorer.score([(context, written)])[0][1]
    other = [(written[0] + 1) % tok.vocab_size, *written[1:]]
    assert not scorer.score([(context, other)])[0][1]


def test_a_context_that_is_too_long_is_cut_on_the_left(model, tok):
    short = Scorer(*model, tok, batch_size=1, max_length=16)
    context = list(range(10, 50))
    ((nats, _),) = short.score([(context, [5, 6])])
    assert nats == pytest.approx(plainly(model, context[-15:], [5, 6])[0], rel=1e-4)
    assert isinstance(short.complete(["xyz " * 50], stop=[], max_new_tokens=4)[0], str)


def test_the_context_is_the_models_own(model, tok):
    params, config = model
    config = dataclasses.replace(config, max_length=48)
    assert Scorer(params, config, tok).max_length == 48
    for wrong in (49, 1, 0, -1):
        with pytest.raises(InputError, match=f"max_length={wrong}: .* at most 48"):
            Scorer(params, config, tok, max_length=wrong)


def test_a_continuation_longer_than_the_context_is_scored_in_pieces(model, tok):
    """Each token once: pieces of 8, the last after as much as fits."""
    short, seen = Scorer(*model, tok, batch_size=2, max_length=8), {}
    text = list(range(20, 41))
    results = short.score([([0, 1], text), ([2], text[:3])], seen.__setitem__)
    whole = [0, 1, *text]
    pieces = [(whole[1:2], text[:8]), (whole[9:10], text[8:16]), (whole[14:18], text[16:])]
    expected = sum(plainly(model, *piece)[0] for piece in pieces)
    assert results[0][0] == pytest.approx(expected, rel=1e-4)
    assert results[1][0] == pytest.approx(plainly(model, [2], text[:3])[0], rel=1e-4)
    assert seen == dict(enumerate(results))


# asked: new tokens. kept: of the prompt's 40 in a context of 16.
@pytest.mark.parametrize(
    ("asked", "kept", "new"), [(4, 12, 4), (8, 8, 8), (15, 8, 8), (16, 8, 8), (99, 8, 8)]
)
def test_a_prompt_keeps_room_and_nothing_is_written_beyond_the_context(
    model, tok, monkeypatch, asked, kept, new
):
    prompts = []

    def write(_params, _config, rows, *, max_new_tokens, **_):
        prompts.extend(rows)
        return [[70 + i for i in range(max_new_tokens)] for _ in rows]

    monkeypatch.setattr(generate, "generate", write)
    monkeypatch.setattr(Scorer, "encode", lambda _, text: [ord(c) for c in text])
    monkeypatch.setattr(tokenizer.Tokenizer, "decode", lambda _, ids: "x" * len(ids))
    short = Scorer(*model, tok, batch_size=2, max_length=16)
    long, little = short.complete(["." * 28 + "a" * 12, "ab"], stop=[], max_new_tokens=asked)
    assert prompts == [([46] * 28 + [97] * 12)[-kept:], [97, 98]]
    # The other prompt of the batch has more room and gets it.
    assert (len(long), len(little)) == (new, min(asked, 14))


def test_what_fits_is_what_is_neither_cut_nor_shortened(model, tok, monkeypatch):
    monkeypatch.setattr(Scorer, "encode", lambda _, text: [ord(c) for c in text])
    short = Scorer(*model, tok, max_length=16)
    assert short.fits("a" * 10, 6)
    assert not short.fits("a" * 10, 7)
    assert short.fits("a" * 10, "b" * 7)  # the last token is scored, not read
    assert not short.fits("a" * 10, "b" * 8)


def test_a_stop_string_ends_a_text(scorer):
    (whole,) = scorer.complete(["one two"], stop=[], max_new_tokens=12)
    stop = whole[len(whole) // 2 :][:2]
    done = []
    (cut,) = scorer.complete(
        ["one two"], stop=[stop], max_new_tokens=12, done=lambda *d: done.append(d)
    )
    assert cut == whole[: whole.find(stop)]
    assert done == [(0, cut)]


def test_sharded_over_eight_devices_the_scores_are_the_same(scorer, model, tok):
    mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)
    params, config = model
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        config = dataclasses.replace(config, batch_axes=sharding.BATCH_AXES)
        spread = Scorer(params, config, tok, batch_size=8, max_length=64)
        results = spread.score(pairs_of(tok))
        texts = spread.complete(TEXTS, stop=["\n"], max_new_tokens=5)
    alone = scorer.score(pairs_of(tok))
    np.testing.assert_allclose([r[0] for r in results], [r[0] for r in alone], rtol=1e-4)
    assert texts == scorer.complete(TEXTS, stop=["\n"], max_new_tokens=5)


def test_batches_hold_everything_once_and_the_longest_first():
    lengths = [3, 9, 1, 7, 7]
    batches = list(scorer_file._batches(lengths, 2))
    assert sorted(sum(batches, [])) == list(range(5))
    assert batches[0] == [1, 3]
