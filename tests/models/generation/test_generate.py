"""The cache equals the full forward pass; rows end where they should; draws follow the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.formats import convert
from rho1_jax.models.generation import decoding, generate
from rho1_jax.models.generation.decoding import Sampling
from rho1_jax.models.llama import LlamaConfig
from rho1_jax.models.rotary import RopeScaling
from rho1_jax.training import sharding

PLAIN = LlamaConfig(
    vocab_size=64, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_width=48
)
SPECIAL = dataclasses.replace(
    PLAIN, tied_head=False, qkv_bias=True, qk_norm=True, window=6, nope_layers=(1,),
    rope_scaling=RopeScaling("yarn", 4.0, 8, high=32.0, attention_factor=1.2),
)  # fmt: skip
RAGGED = [[5, 3, 60], list(range(1, 21)), [7]]


def randomised(config: LlamaConfig):
    params = llama.init(config, jax.random.key(0))
    key = jax.random.key(1)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), params)


@pytest.fixture(scope="module", params=["plain", "special"])
def model(request):
    config = {"plain": PLAIN, "special": SPECIAL}[request.param]
    return randomised(config), config


@functools.partial(jax.jit, static_argnames="config")
def all_logits(params, tokens, config):
    hidden, head = llama.apply(params, tokens, config=config)
    return hidden @ head.T


def slow_logits(params, config, row):
    """Logits after a row, from the whole of it; what is padded behind it is not seen."""
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(row)] = row
    return all_logits(params, padded, config)[0, len(row) - 1]


def slowly(params, config, prompt, n):
    """Greedy continuation, the whole sequence anew for every token."""
    row = list(prompt)
    for _ in range(n):
        row.append(int(slow_logits(params, config, row).argmax()))
    return row[len(prompt) :]


def test_cache_equals_the_full_forward_pass(model):
    """Ragged prompts together, past the window and over several chunks, as each one alone."""
    params, config = model
    new = generate.generate(params, config, RAGGED, max_new_tokens=19)
    assert new == [slowly(params, config, prompt, 19) for prompt in RAGGED]
    assert len({tuple(row) for row in new}) == 3


def prefilled(params, config):
    tokens, lengths = decoding.padded(RAGGED, config)
    state, _ = decoding.prefill(
        params, None, tokens, lengths, jnp.zeros(0, jnp.int32), jax.random.key(0),
        config=config, sampling=decoding.GREEDY, n_slots=tokens.shape[1] + 8,
    )  # fmt: skip
    return state, tokens


def test_logits_of_cached_steps(model):
    """Not only the best token: all logits, after a prefill and 5 steps."""
    params, config = model
    state, tokens = prefilled(params, config)
    unstacked = decoding.unstack(params, config)
    step = jax.jit(decoding.step, static_argnums=2)
    rows = [list(prompt) for prompt in RAGGED]
    for n, token in enumerate((9, 8, 7, 6, 5)):
        state = state._replace(token=jnp.full(3, token, jnp.int32), n=jnp.array(n))
        logits, cache = step(unstacked, state, config, tokens.shape[1])
        state = state._replace(cache=cache)
        for i, row in enumerate(rows):
            row.append(token)
            np.testing.assert_allclose(logits[i], slow_logits(params, config, row), atol=2e-5)


def test_dynamic_scaling_goes_by_the_length_of_each_row():
    config = dataclasses.replace(PLAIN, rope_scaling=RopeScaling("dynamic", 4.0, 8))
    params = randomised(config)
    together = generate.generate(params, config, RAGGED, max_new_tokens=8)
    alone = [generate.generate(params, config, [p], max_new_tokens=8)[0] for p in RAGGED]
    assert together == alone
    # Within the trained length it changes nothing.
    assert together[2][:6] == slowly(params, PLAIN, RAGGED[2], 6)


def test_bfloat16_runs_and_begins_alike():
    params, config = randomised(PLAIN), dataclasses.replace(PLAIN, dtype="bfloat16")
    first = generate.generate(params, config, RAGGED, max_new_tokens=1)
    assert first == generate.generate(params, PLAIN, RAGGED, max_new_tokens=1)


def test_rows_stop_at_stop_tokens_and_all_stop_early(model, monkeypatch):
    params, config = model
    whole = generate.generate(params, config, RAGGED, max_new_tokens=40)
    stop = whole[0][4]
    chunks = []
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *a, **k: chunks.append(1) or decode(*a, **k))
    rows = generate.generate(params, config, RAGGED[:1], max_new_tokens=40, stop_ids={stop, 70})
    assert rows == [whole[0][: whole[0].index(stop)]]
    assert len(chunks) == 1
    rows = generate.generate(params, config, RAGGED, max_new_tokens=40, stop_ids={stop})
    assert rows == [w[: w.index(stop)] if stop in w else w for w in whole]


def test_rows_stop_when_they_are_finished(model):
    params, config = model
    whole = generate.generate(params, config, RAGGED, max_new_tokens=40)
    rows = generate.generate(
        params, config, RAGGED, max_new_tokens=40, finished=lambda row: row[0] == whole[1][0]
    )
    short = [w[0] == whole[1][0] for w in whole]
    assert [len(row) for row in rows] == [1 if s else 40 for s in short]
    assert any(short)
    assert [w[: len(r)] for w, r in zip(whole, rows, strict=True)] == rows


def test_nothing_to_do():
    params = randomised(PLAIN)
    assert generate.generate(params, PLAIN, [], max_new_tokens=5) == []
    assert generate.generate(params, PLAIN, [[1], [2]], max_new_tokens=0) == [[], []]
    with pytest.raises(InputError, match="prompt has no tokens"):
        generate.generate(params, PLAIN, [[1], []], max_new_tokens=5)


def choices(logits, sampling, rows=4000):
    logits = jnp.tile(jnp.array(logits), (rows, 1))
    tokens = decoding.choose(logits, jnp.array(3), jax.random.key(0), sampling)
    return np.bincount(np.asarray(tokens), minlength=logits.shape[1]) / rows


def test_samples_follow_temperature_and_top_p():
    logits = np.log([0.5, 0.25, 0.15, 0.1], dtype="f4")
    np.testing.assert_allclose(choices(logits, Sampling(1.0)), [0.5, 0.25, 0.15, 0.1], atol=0.03)
    flat = np.sqrt([0.5, 0.25, 0.15, 0.1])
    np.testing.assert_allclose(choices(logits, Sampling(2.0)), flat / flat.sum(), atol=0.03)
    # 0.5 + 0.25 reaches 0.7, so the third is out; 0.5 alone reaches 0.4.
    np.testing.assert_allclose(choices(logits, Sampling(1.0, 0.7)), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_array_equal(choices(logits, Sampling(1.0, 0.4)), [1, 0, 0, 0])
    np.testing.assert_array_equal(choices(logits, Sampling()), [1, 0, 0, 0])


def test_seeds_and_rows_draw_differently_and_repeatably():
    params = randomised(PLAIN)
    prompts = [[5, 3, 60]] * 2

    def sample(seed):
        sampling = Sampling(1.0, 1.0, seed)
        return generate.generate(params, PLAIN, prompts, max_new_tokens=12, sampling=sampling)

    a, b = sample(0)
    assert a != b
    assert sample(0) == [a, b]
    assert sample(1) != [a, b]


@pytest.mark.parametrize("change", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling_is_refused(change):
    with pytest.raises(InputError, match="temperature is at least 0"):
        Sampling(**change)


def test_eight_devices_write_what_one_does():
    params, config = randomised(SPECIAL), SPECIAL
    expected = generate.generate(params, config, RAGGED, max_new_tokens=9)
    config = dataclasses.replace(config, batch_axes=sharding.BATCH_AXES)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.parameter_shardings(params, mesh))
        state, tokens = prefilled(params, config)
        assert len(tokens) == 4
        k, _ = state.cache[0]
        assert k.sharding.shard_shape(k.shape)[0] == 1  # four rows over data x fsdp
        assert generate.generate(params, config, RAGGED, max_new_tokens=9) == expected


@pytest.fixture(scope="module")
def writer():
    """A model over characters' tokens, with its tokenizer."""
    tok = tokenizer.train(["one two three four five six seven"] * 3, 300)
    config = dataclasses.replace(PLAIN, vocab_size=tok.vocab_size)
    return randomised(config), config, tok


def test_text_ends_before_a_stop_string(writer):
    texts = ["one two", "three", ""]
    whole = generate.complete(*writer, texts, max_new_tokens=30)
    stop = whole[1][7:9]
    assert len(stop) == 2
    cut = generate.complete(*writer, texts, max_new_tokens=30, stop=["no such", stop])
    assert cut == [text.split(stop)[0] for text in whole]


def test_streamed_pieces_are_the_text(writer):
    (whole,) = generate.complete(*writer, ["one"], max_new_tokens=30)
    pieces = list(generate.stream_text(*writer, "one", max_new_tokens=30))
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 2
    stop = whole[9:12]
    pieces = list(generate.stream_text(*writer, "one", max_new_tokens=30, stop=[stop]))
    assert "".join(pieces) == whole.split(stop)[0]


def test_the_document_ends_at_the_separator(writer):
    params, config, tok = writer
    (row,) = generate.generate(params, config, tok_ids(tok, "one"), max_new_tokens=30)
    ended = dataclasses.replace(tok, separator_id=row[5])
    (text,) = generate.complete(params, config, ended, ["one"], max_new_tokens=30)
    assert text == tok.decode(row[: row.index(row[5])])


def tok_ids(tok, text):
    return [tok.encode([text])[0].ids.tolist()]


def test_command_line(writer, tmp_path, capsys):
    params, config, tok = writer
    folder = str(tmp_path / "model")
    convert.export(tmp_path / "model", params, config, tok, card="")
    flags = ["", f"--checkpoint={folder}", "--prompt=one two", "--max_new_tokens=12"]
    assert generate.main(flags) == 0
    (text,) = generate.complete(*writer, ["one two"], max_new_tokens=12)
    assert capsys.readouterr().out == text + "\n"
    assert generate.main([*flags, "--top_p=7"]) == 2
    assert "top_p" in capsys.readouterr().err


def test_rounded_sizes_are_few_and_near():
    sizes = {n: decoding.rounded(n) for n in range(1, 2049)}
    assert all(n <= size <= max(1.25 * n, n + 1) for n, size in sizes.items())
    assert len(set(sizes.values())) < 50
