"""Packing is exact, and bound to what it was made from."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from stand_in import SEQ_LEN, SOURCE, Words, prepare, rows_of, write_corpus

from rho1_jax.data import builder, corpora, loader, packing, tokens
from rho1_jax.data.corpora import Source
from rho1_jax.data.tokens import token_bytes
from rho1_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def expected_stream(source, split, root, tokenizer):
    """(id, bytes, useful) of each token of a split, found the slow and obvious way."""
    stream = []
    for text, useful, _ in corpora.documents(source, split, root=root):
        ids, starts = tokenizer.encode([text])[0]
        for i, start, stop in zip(ids, starts, [*starts[1:], len(text)], strict=True):
            inside = any(first <= start < last for first, last in useful or ())
            stream.append((int(i), len(text[start:stop].encode()), inside))
        stream.append((tokenizer.separator_id, 0, False))
    return stream


@pytest.mark.parametrize("seq_len", [1, 16, 5000])
def test_every_token_is_a_target_once(tmp_path, seq_len, capsys):
    write_corpus(tmp_path)
    manifest = prepare(tmp_path, seq_len=seq_len)
    for split in ("train", "val"):
        stream = expected_stream(SOURCE, split, tmp_path, Words())
        rows = rows_of(tmp_path / "out", split)
        targets = [t for row in rows for t in row["tokens"][1 : row["length"] + 1].tolist()]
        assert [rows[0]["tokens"][0], *targets] == [token for token, _, _ in stream]
        for i, row in enumerate(rows):
            part = stream[i * seq_len : (i + 1) * seq_len + 1]
            assert row["tokens"].shape == (seq_len + 1,)
            assert row["tokens"].dtype == np.int32
            assert row["tokens"][: len(part)].tolist() == [token for token, _, _ in part]
            assert (row["tokens"][len(part) :] == Words.separator_id).all()
            assert row["length"] == len(part) - 1
            assert row["bytes"] == sum(size for _, size, _ in part[1:])
            assert "useful" not in row
        texts = [d.text for d in corpora.documents(SOURCE, split, root=tmp_path)]
        in_text = sum(len(text.encode()) for text in texts)
        assert sum(row["bytes"] for row in rows) == in_text - stream[0][1]
        assert manifest["splits"][split] == {
            "documents": len(texts),
            "tokens": len(stream),
            "rows": len(rows),
            "bytes": in_text - stream[0][1],
        }
    assert "web: built (train 51 documents, " in capsys.readouterr().out
    assert "tensorflow" not in sys.modules


def test_batches_do_not_change_the_rows(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    prepare(tmp_path, out="at once")
    monkeypatch.setattr(tokens, "BATCH", 50)
    monkeypatch.setattr(packing, "_SHARD", 10 * SEQ_LEN)
    prepare(tmp_path, out="in parts")
    for split in ("train", "val"):
        a, b = (rows_of(tmp_path / out, split) for out in ("at once", "in parts"))
        np.testing.assert_equal(a, b)
    files = [p.name for p in builder.rows_folder(tmp_path / "in parts", "web").iterdir()]
    assert sum("train.array_record" in name for name in files) > 5


def test_useful_tokens_begin_in_a_useful_span(tmp_path, monkeypatch):
    documents = [
        ("menu  x = 1, so 2x = 2.  foot", ((6, 23),)),
        ("all of it", ((0, 9),)),
        ("none of it", ()),
        ("é two spans é here too", ((0, 5), (14, 18))),
    ] * 60
    monkeypatch.setattr(corpora.builtin, "documents", lambda _: iter(documents))
    monkeypatch.setattr(corpora, "_hash_split", lambda text: "val" if "none" in text else "train")
    source = Source("builtin:problems")
    prepare(tmp_path, source)
    for split in ("train", "val"):
        stream = expected_stream(source, split, tmp_path, Words())
        for i, row in enumerate(rows_of(tmp_path / "out", split)):
            targets = stream[i * SEQ_LEN + 1 : (i + 1) * SEQ_LEN + 1]
            wanted = [useful for _, _, useful in targets] + [False] * (SEQ_LEN - len(targets))
            assert row["useful"].tolist() == wanted


def test_nothing_is_done_twice(tmp_path, capsys):
    write_corpus(tmp_path)
    first = prepare(tmp_path)
    print_of = lambda: loader.open_rows(tmp_path / "out", "web", "train").fingerprint  # noqa: E731
    original = print_of()
    assert loader.open_rows(tmp_path / "out", "web", "val").fingerprint != original
    capsys.readouterr()

    assert prepare(tmp_path) == first
    assert "web: up to date, skipped (train 51 documents" in capsys.readouterr().out
    os.utime(tmp_path / "a.jsonl", (1, 1))
    touched = prepare(tmp_path)
    assert "skipped" in capsys.readouterr().out
    assert touched["files"][0]["mtime_ns"] == 10**9
    assert print_of() == original

    seen = {original}
    changes = [
        {"tokenizer": Words("other")},
        {"seq_len": 17},
        {"source": Source("files:a.jsonl", split_field=None)},
        {"source": Source("files:a.jsonl", text="{split} {text}")},
    ]
    for change in changes:
        prepare(tmp_path, **change)
        assert "web: built" in capsys.readouterr().out, change
        seen.add(print_of())
    prepare(tmp_path)
    assert print_of() == original
    write_corpus(tmp_path, n=61)
    prepare(tmp_path)
    assert len(seen | {print_of()}) == 6
    capsys.readouterr()
    prepare(tmp_path, Source("files:a.jsonl", split_field="split", weight=3.0))
    assert "skipped" in capsys.readouterr().out


def test_the_hash_of_an_unchanged_file_is_taken_as_known(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    hashed = []

    def counted(path):
        hashed.extend([path] if path.name == "a.jsonl" else [])  # not of the rows
        return "0" * 64

    monkeypatch.setattr(builder, "sha256", counted)
    prepare(tmp_path)
    prepare(tmp_path)
    assert len(hashed) == 1
    os.utime(tmp_path / "a.jsonl", (1, 1))
    prepare(tmp_path)
    prepare(tmp_path)
    assert len(hashed) == 2


def test_other_errors(tmp_path):
    write_corpus(tmp_path)
    with pytest.raises(InputError, match="seq_len must be at least 1, not 0"):
        prepare(tmp_path, seq_len=0)
    with pytest.raises(InputError, match="No file matches"):
        prepare(tmp_path, Source("files:b.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "", "split": "train"}\n')
    with pytest.raises(InputError, match="no usable text"):
        prepare(tmp_path)


def test_bytes_before_the_first_token_count_to_it():
    """Some tokenizers strip the leading space; the sum must stay that of the text."""
    assert token_bytes("  hé wörld", np.array([2, 4, 4])).tolist() == [5, 0, 7]
    assert token_bytes("  he world", np.array([2, 4])).tolist() == [4, 6]
    assert token_bytes("", np.array([], np.int32)).tolist() == []


def test_real_tokenizer(tmp_path):
    """Bytes that tokens split, digits, special tokens spelt out in the text, and no text lost."""
    from rho1_jax.models import tokenizer as real

    write_corpus(tmp_path)
    texts = [d.text for d in corpora.documents(SOURCE, "train", root=tmp_path)]
    tokenizer = real.train(texts, 300)
    hard = ["<|endoftext|> naïve \U0001f469\u200d\U0001f680 123", " \n\t", "é", "\u202e三三三" * 50]
    for text, encoded in zip(texts + hard, tokenizer.encode(texts + hard), strict=True):
        sizes = token_bytes(text, encoded.starts)
        assert sizes.min() >= 0
        assert sizes.sum() == len(text.encode())
        assert len(sizes) == len(encoded.ids)
    manifest = prepare(tmp_path, tokenizer=tokenizer)
    rows = rows_of(tmp_path / "out", "train")
    ids = [int(t) for row in rows for t in row["tokens"][1 : row["length"] + 1]]
    whole = "".join(text + "<|endoftext|>" for text in texts)
    assert tokenizer.decode([rows[0]["tokens"][0], *ids]) == whole
    assert len(ids) + 1 == manifest["splits"]["train"]["tokens"]
