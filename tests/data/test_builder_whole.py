"""Prepared rows are whole or not there: after a kill, on a full disk, beside damage."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from stand_in import Words, prepare, rows_of, write_corpus

from rho1_jax.data import builder, loader, packing
from rho1_jax.errors import InputError

ROOT = Path(__file__).parents[2]


KILLED = """
import sys, time
from stand_in import Words
from rho1_jax.data import builder, packing, tokens
from rho1_jax.data.corpora import Source

class Slow(Words):
    calls = 0
    def encode(self, texts):
        Slow.calls += 1
        if Slow.calls == 6:
            print("half way", flush=True)
            time.sleep(600)
        return super().encode(texts)

tokens.BATCH = 500
packing._SHARD = 5 * 16
builder.prepare("web", Source("files:a.jsonl", split_field="split"), root=sys.argv[1],
                tokenizer=Slow(), seq_len=16, out=sys.argv[1] + "/out")
"""


def test_a_killed_build_is_begun_again(tmp_path, capsys):
    write_corpus(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    assert list((tmp_path / "out").rglob("*train.array_record*"))  # some rows are written
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(InputError, match="no rows of 'web' under .*: run the stage 'prepare'"):
        loader.open_rows(tmp_path / "out", "web", "train")

    prepare(tmp_path)
    assert "web: built" in capsys.readouterr().out
    prepare(tmp_path, out="straight")
    for split in ("train", "val"):
        np.testing.assert_equal(
            rows_of(tmp_path / "out", split), rows_of(tmp_path / "straight", split)
        )
    left = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")}
    assert left == {
        p.relative_to(tmp_path / "straight") for p in (tmp_path / "straight").rglob("*")
    }


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("write: No space left on device")]
)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, error):
    write_corpus(tmp_path)
    prepare(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(packing.SequentialWriter, "add_examples", fail)
    with pytest.raises(InputError, match="The disk is full: free some space under"):
        prepare(tmp_path, seq_len=8)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path):
    write_corpus(tmp_path)

    class Meddler(Words):
        def encode(self, texts):
            write_corpus(tmp_path, n=90)
            return super().encode(texts)

    with pytest.raises(InputError, match="changed while it was read"):
        prepare(tmp_path, tokenizer=Meddler())
    with pytest.raises(InputError, match="no rows of 'web'"):
        loader.open_rows(tmp_path / "out", "web", "train")


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def written(tmp_path):
    return sorted(p for p in (tmp_path / "out" / "web" / "packed_rows").rglob("*") if p.is_file())


def test_a_damaged_or_missing_file_is_named_and_made_again(tmp_path, caplog):
    write_corpus(tmp_path)
    first = prepare(tmp_path)
    rows = rows_of(tmp_path / "out", "train")
    damages = {"is damaged": [flipped, lambda p: p.write_bytes(p.read_bytes()[:-1])]}
    damages["is missing"] = [Path.unlink]
    assert len(written(tmp_path)) == 4  # a shard of each split, and two descriptions
    for i, path in enumerate(written(tmp_path)):
        for problem, damage in [(what, how) for what, ways in damages.items() for how in ways]:
            damage(path)
            assert dict(builder.verify(tmp_path / "out" / "web"))[path] == problem
            with pytest.raises(InputError, match=f"{path} {problem}: run the stage 'prepare'"):
                loader.open_rows(tmp_path / "out", "web", "train")
            assert prepare(tmp_path) == first
            assert f"web: {path} {problem}, built again" in caplog.text, i
    np.testing.assert_equal(rows_of(tmp_path / "out", "train"), rows)
    assert {problem for _, problem in builder.verify(tmp_path / "out" / "web")} == {None}


def test_a_damaged_manifest_is_named(tmp_path):
    write_corpus(tmp_path)
    first = prepare(tmp_path)
    path = tmp_path / "out" / "web" / "manifest.json"
    text = path.read_text().replace('"rows": ', '"rows": 1')
    for damaged in (text, text[:50], ""):
        path.write_text(damaged)
        with pytest.raises(InputError, match="manifest.json .*is damaged .*delete it"):
            loader.open_rows(tmp_path / "out", "web", "train")
        assert "damaged" in dict(builder.verify(tmp_path / "out" / "web"))[path]
    path.unlink()
    assert prepare(tmp_path) == first


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    prepare(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())
