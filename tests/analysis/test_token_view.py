"""Marked passages, the page around them, and the command that makes one of a text file."""

import dataclasses
import functools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rho1_jax.analysis import token_view
from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.slm import step
from rho1_jax.training import checkpoint

TEXT = "The farmer has 35 acres.\n\nUsing 2 acres gives 2 × 1.5 = 3 tonnes & more 🌽.\n"


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train([TEXT * 20, "acres of corn " * 20], 300)


@pytest.fixture(scope="module")
def config(tok):
    return llama.LlamaConfig(tok.vocab_size, 16, 1, 2, 1, 8, 32, dtype="bfloat16")


@functools.partial(jax.jit, static_argnums=0)
def random_params(config, key):
    return jax.tree.map(lambda x: 4.0 * x, llama.init(config, key))  # far from uniform


def save_model(folder, config, tok, seed):
    params = random_params(config, jax.random.key(seed))
    checkpoint.write_model_file(folder, config, tok)
    with checkpoint.Checkpoints(folder, keep=1) as saved:
        saved.save(1, step.init_state(params, optax.sgd(0.1)), {})
    return params


@pytest.fixture(scope="module")
def models(tmp_path_factory, config, tok):
    root = tmp_path_factory.mktemp("models")
    params = [save_model(root / name, config, tok, i) for i, name in enumerate(("policy", "ref"))]
    return root / "policy", root / "ref", *params


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(params, ids, *, config):
    hidden, head = llama.apply(params, ids[None, :-1], config=config)
    return jax.nn.log_softmax(hidden[0] @ head.T)


def losses_by_hand(params, config, ids):
    """-log softmax at the target, all logits at once, in float32."""
    exact = dataclasses.replace(config, dtype="float32")
    log_p = log_probabilities(params, jnp.asarray(ids), config=exact)
    return -np.asarray(log_p)[np.arange(len(ids) - 1), ids[1:]]


def test_losses_of_a_short_text(models, config, tok):
    ids = tok.encode([TEXT])[0].ids
    loss = token_view.text_losses(models[2], config, ids, label="policy")
    assert np.isnan(loss[0])
    np.testing.assert_allclose(loss[1:], losses_by_hand(models[2], config, ids), rtol=1e-4)


def test_windows_overlap_by_one_token_and_start_anew(models, config, tok, monkeypatch):
    monkeypatch.setattr(token_view, "WINDOW", 8)
    ids = tok.encode([TEXT])[0].ids[:20]  # 19 targets: two full windows and one of three
    loss = token_view.text_losses(models[2], config, ids, label="policy")
    for start in (0, 8, 16):
        alone = losses_by_hand(models[2], config, ids[start : start + 9])
        np.testing.assert_allclose(loss[start + 1 : start + 9], alone, rtol=1e-4)


def run(tmp_path, capsys, *args, text=TEXT):
    """(exit code, stdout, stderr, page or None) of the command on a file with `text`."""
    file, out = tmp_path / "text.txt", tmp_path / "pages" / "page.html"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code = token_view.main(["", *map(str, args), str(file), f"--out={out}"])
    page = out.read_text(encoding="utf-8") if out.exists() else None
    return code, *capsys.readouterr(), page


def test_command_marks_a_text_and_prints_its_losses(
    models, config, tok, tmp_path, capsys, tokens_of, assert_self_contained
):
    policy, ref, params, ref_params = models
    args = f"--policy={policy}", f"--reference={ref}", "--ratio=0.25"
    code, stdout, _, page = run(tmp_path, capsys, *args)
    assert code == 0

    ids = tok.encode([TEXT])[0].ids
    loss, ref_loss = (losses_by_hand(p, config, ids) for p in (params, ref_params))
    n_bytes = len(TEXT.encode()) - len(tok.decode(ids[:1]).encode())
    for name, x in (("policy", loss), ("reference", ref_loss)):
        nats, bits = re.search(rf"{name}: (\S+) nats per token, (\S+) bits", stdout).groups()
        assert float(nats) == pytest.approx(x.mean(), abs=2e-4)
        assert float(bits) == pytest.approx(x.sum() / math.log(2) / n_bytes, abs=2e-4)

    assert_self_contained(page)
    found = tokens_of(page)
    assert "".join(text for text, *_ in found) == TEXT
    marked = [i for i, (_, classes, _) in enumerate(found) if "on" in classes]
    best = np.argsort(-(loss - ref_loss), kind="stable")[: round(0.25 * loss.size)] + 1
    assert marked == sorted(best.tolist())


def test_command_without_a_reference_marks_nothing(models, tmp_path, capsys, tokens_of):
    code, stdout, _, page = run(tmp_path, capsys, f"--policy={models[0]}")
    assert code == 0
    assert "reference:" not in stdout
    assert not any("on" in classes for _, classes, _ in tokens_of(page))
    assert "No reference model was given" in page


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        ("", [], "holds no text"),
        (" \n", [], "holds no text"),
        (b"caf\xe9", [], "not UTF-8 text .byte 3"),
        ("a", [], "single token"),
        (TEXT, ["--ratio=0"], "ratio is 0"),
        (TEXT, ["--reference=absent.gguf"], "absent.gguf"),
    ],
)
def test_bad_input_is_one_sentence(models, tmp_path, capsys, text, extra, message):
    code, stdout, stderr, page = run(tmp_path, capsys, f"--policy={models[0]}", *extra, text=text)
    assert (code, stdout, page) == (2, "", None)
    assert re.search(message, stderr)
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1


def test_a_reference_with_another_vocabulary_is_refused(models, config, tok):
    other = tokenizer.train(["quite another text " * 30], 280)
    policy, reference = (models[2], config, tok), (models[3], config, other)
    with pytest.raises(InputError, match=f"{tok.vocab_size} and {other.vocab_size} tokens"):
        token_view.mark_text(TEXT, policy, reference, ratio=0.6)


def test_an_absent_file_ends_the_module_with_code_2():
    args = ["--policy=absent", "absent.txt", "--out=absent.html"]
    command = [sys.executable, "-m", "rho1_jax.analysis.token_view", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "absent.txt cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_read_text_names_a_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        token_view.read_text(tmp_path)
