"""Rows tokenized by Beam's workers are the rows of one process, file by file and bit for bit."""

import json

import numpy as np
import pytest

from rho1_jax.data import builder, loader, tokens
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError
from rho1_jax.models import tokenizer
from tests.tiny_config import write_texts

pytest.importorskip("apache_beam", reason="apache-beam is not installed (pip install apache-beam)")
SOURCE = Source("files:*.jsonl", split_field="split")
# The in-process runner of Beam itself: DirectRunner would first fetch a program from the network.
RUNNER = "FnApiRunner --direct_num_workers=2 --direct_running_mode=multi_threading"


def prepare(root, out, runner, source=SOURCE):
    tok = tokenizer.train(["one two three plus minus times equals 0 1 2 3"], 300)
    return builder.prepare(
        "web", source, root=root, tokenizer=tok, seq_len=16, out=root / out, beam_runner=runner
    )


def test_same_rows_counts_and_files(tmp_path, monkeypatch):
    root = write_texts(tmp_path)
    (root / "more.jsonl").write_text('{"text": "thus four", "split": "val"}\nnot json\n')
    monkeypatch.setattr(tokens, "BATCH", 5000)
    plain, beam = (prepare(root, out, how) for out, how in (("plain", ""), ("beam", RUNNER)))
    assert plain == beam
    assert plain["counts"]["malformed"] == 1
    for split in ("train", "val"):
        a, b = (loader.open_rows(root / out, "web", split) for out in ("plain", "beam"))
        assert len(a) == plain["splits"][split]["rows"] > 100
        np.testing.assert_equal([a[i] for i in range(len(a))], [b[i] for i in range(len(b))])
    assert not (root / "beam" / "web" / "scratch").exists()


def test_bad_input_is_still_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"txt": "one"}) + "\n")
    with pytest.raises(InputError, match="has no field 'split', only txt"):
        prepare(tmp_path, "out", RUNNER)


def test_the_embedded_corpus_is_one_part(tmp_path):
    source = Source("builtin:problems")
    plain, beam = (prepare(tmp_path, out, how, source) for out, how in (("a", ""), ("b", RUNNER)))
    assert plain["splits"] == beam["splits"]
