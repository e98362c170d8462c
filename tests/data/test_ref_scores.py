"""Scores on disk are those that were written, belong to their rows, and survive a kill."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rho1_jax.data import ref_scores
from rho1_jax.errors import InputError

ROOT = Path(__file__).parents[2]
N, S = 10, 3
EVERY = np.arange(N)
FIELDS = ("ref_loss", "ref_entropy")
BINDING = {"rows": "r", "reference": "m"}


def create(folder, **changes):
    settings = {"n_rows": N, "seq_len": S, "fields": FIELDS, "binding": BINDING}
    return ref_scores.create(folder, **(settings | changes))


def values(row_ids):
    loss = np.asarray(row_ids, np.float32)[:, None] + np.arange(S, dtype=np.float32) / 4
    return {"ref_loss": loss, "ref_entropy": -loss}


def write(writer, *row_ids):
    writer.write(np.array(row_ids), values(row_ids))


def open_scores(folder, row_ids=EVERY, fields=FIELDS, binding=BINDING):
    return ref_scores.open_scores(folder, fields=fields, row_ids=row_ids, binding=binding)


def test_what_is_written_is_read(tmp_path):
    writer = create(tmp_path / "a" / "b")
    for row_ids in ([7, 2], [0, 1, 9], [3, 4, 5, 6, 8]):
        write(writer, *row_ids)
        writer.flush()
    scores = open_scores(tmp_path / "a" / "b")
    assert set(scores) == set(FIELDS)
    for field, expected in values(EVERY).items():
        assert scores[field].dtype == np.float16
        np.testing.assert_array_equal(scores[field], expected)
        assert not scores[field].flags.writeable
    assert set(open_scores(tmp_path / "a" / "b", fields=["ref_loss"])) == {"ref_loss"}


def test_several_numbers_a_token_and_ids_of_tokens(tmp_path):
    settings = {"fields": ("ref_loss", "ref_top", "ref_top_ids")}
    settings["widths"] = {"ref_top": 2, "ref_top_ids": 2}
    written = {"ref_loss": values(EVERY)["ref_loss"], "ref_top": np.arange(N * S * 2.0) / 8}
    written["ref_top_ids"] = np.arange(N * S * 2) + 100_000
    flat = {name: x.reshape(N, -1) for name, x in written.items()}
    for part in (EVERY[:6], EVERY[6:]):  # as if killed between
        writer = create(tmp_path, **settings)
        writer.write(part, {name: x[part] for name, x in flat.items()})
        writer.flush()
    found = open_scores(tmp_path, fields=settings["fields"])
    assert {name: (x.shape, x.dtype.str) for name, x in found.items()} == {
        "ref_loss": ((N, S), "<f2"), "ref_top": ((N, S, 2), "<f2"),
        "ref_top_ids": ((N, S, 2), "<i4"),
    }  # fmt: skip
    for name, x in found.items():
        np.testing.assert_array_equal(x.reshape(-1), written[name].reshape(-1))
    with pytest.raises(InputError, match="have widths .*'ref_top': 2.* delete the folder"):
        create(tmp_path, **settings | {"widths": {"ref_top": 3, "ref_top_ids": 3}})


def test_only_the_rows_asked_for_need_scores(tmp_path):
    writer = create(tmp_path)
    write(writer, 8, 3)
    writer.flush()
    assert open_scores(tmp_path, np.array([3, 8]))["ref_loss"][8, 0] == 8
    with pytest.raises(InputError, match="unfinished .2 of 3 rows.: run the stage 'score' again"):
        open_scores(tmp_path, np.array([3, 4, 8]))
    with pytest.raises(InputError, match="unfinished .0 of 2 rows."):
        open_scores(tmp_path, np.array([4, 5]))  # as many rows are done, but not these


def test_resumes_at_the_last_flush(tmp_path):
    writer = create(tmp_path)
    write(writer, 5, 0)
    writer.flush()
    write(writer, 4, 6)
    again = create(tmp_path)  # the first writer died before its second flush
    assert again.missing(np.array([6, 5, 4, 1, 0])).tolist() == [6, 4, 1]
    with pytest.raises(InputError, match="unfinished .2 of 10 rows"):
        open_scores(tmp_path)
    write(again, *again.missing(EVERY))
    again.flush()
    np.testing.assert_array_equal(open_scores(tmp_path)["ref_loss"], values(EVERY)["ref_loss"])
    assert not create(tmp_path).missing(EVERY).size


def test_rows_count_as_done_only_after_their_values_are_on_the_disk(tmp_path, monkeypatch):
    writer = create(tmp_path)
    write(writer, 0, 1)

    def die(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    assert create(tmp_path).missing(EVERY).size == N


KILLED = """
import sys, time
import numpy as np
from rho1_jax.data import ref_scores
writer = ref_scores.create(sys.argv[1], n_rows=10, seq_len=3, fields=["x"], binding={"a": "b"})
writer.write(np.arange(4), {"x": np.ones((4, 3))})
writer.flush()
writer.write(np.arange(4, 8), {"x": np.ones((4, 3))})
print("written", flush=True)
time.sleep(600)
"""


def test_a_killed_writer_leaves_what_it_flushed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    writer = create(tmp_path, fields=["x"], binding={"a": "b"})
    assert writer.missing(EVERY).tolist() == [4, 5, 6, 7, 8, 9]
    assert (np.load(tmp_path / "x.npy")[:4] == 1).all()


def test_a_kill_before_the_first_manifest_begins_again(tmp_path):
    writer = create(tmp_path)
    write(writer, 0, 1)
    writer.flush()
    (tmp_path / "manifest.json").unlink()
    assert create(tmp_path).missing(EVERY).size == N
    assert not np.load(tmp_path / "ref_loss.npy").any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"binding": BINDING | {"rows": "other"}}, "belong to other rows: delete"),
        ({"binding": BINDING | {"reference": "x", "rows": "y"}}, "other reference and rows"),
        ({"binding": {"rows": "r"}}, "belong to other reference"),
        ({"n_rows": 11}, "have n_rows 10, not 11"),
        ({"seq_len": 4}, "have seq_len 3, not 4"),
        ({"fields": ["ref_loss"]}, "have fields .*'ref_entropy', 'ref_loss'., not"),
    ],
)
def test_scores_of_something_else_are_refused(tmp_path, changes, message):
    writer = create(tmp_path)
    write(writer, *EVERY)
    writer.flush()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        create(tmp_path, **changes)
    if "binding" in changes:
        with pytest.raises(InputError, match=message):
            open_scores(tmp_path, binding=changes["binding"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_missing_scores_are_said(tmp_path):
    with pytest.raises(InputError, match="no scores in .*: run the stage 'score'"):
        open_scores(tmp_path)
    create(tmp_path, fields=["ref_loss"])
    with pytest.raises(InputError, match="hold .'ref_loss'., not .'ref_entropy', 'ref_loss'."):
        open_scores(tmp_path)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"ref_loss": np.array([[0, np.nan, 0], [0, 0, 0]])}, "ref_loss of row 5 is not finite"),
        ({"ref_loss": np.array([[0, 0, 0], [0, 0, 7e4]])}, "ref_loss of row 2 is not finite"),
        ({"other": np.zeros((2, S))}, "Scores need .'ref_entropy', 'ref_loss'., not"),
        ({"ref_entropy": np.zeros((2, S + 1))}, "ref_entropy .2, 4. is not one row of 3"),
        ({"ref_entropy": np.zeros((1, S))}, "ref_entropy .1, 3. is not one row .* 2 row numbers"),
    ],
)
def test_bad_values_are_refused_and_not_counted(tmp_path, block, message):
    writer = create(tmp_path)
    with pytest.raises(InputError, match=message):
        writer.write(np.array([5, 2]), values([5, 2]) | block)
    writer.flush()
    assert create(tmp_path).missing(EVERY).size == N


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def complete(folder):
    writer = create(folder)
    write(writer, *range(N - 2))  # a folder that is not finished is checked as well
    writer.flush()
    return EVERY[: N - 2]


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_bit_is_found_and_its_row_scored_again(tmp_path, caplog, field):
    rows = complete(tmp_path)
    assert {problem for _, problem in ref_scores.verify(tmp_path)} == {None}
    assert len(dict(ref_scores.verify(tmp_path))) == 4
    path = tmp_path / f"{field}.npy"
    flip(path, path.stat().st_size - (N - 3) * S * 2)  # of row 3
    assert dict(ref_scores.verify(tmp_path))[path] == "is damaged in 1 rows, the first is 3"
    with pytest.raises(InputError, match=f"{path} is damaged .* run the stage 'score' again"):
        open_scores(tmp_path, rows)
    assert open_scores(tmp_path, rows[:3])  # what is not read is not checked
    again = create(tmp_path)
    assert "are damaged in 1 rows: made anew" in caplog.text
    assert again.missing(rows).tolist() == [3]
    write(again, 3)
    again.flush()
    np.testing.assert_array_equal(open_scores(tmp_path, rows)[field][rows], values(rows)[field])


@pytest.mark.parametrize("name", ["ref_loss.npy", "ref_entropy.npy", "checks.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "header", "dtype"])
def test_a_damaged_or_missing_file_is_named_and_made_anew(tmp_path, caplog, name, damage):
    rows = complete(tmp_path)
    path = tmp_path / name
    raw = path.read_bytes()
    changes = {"cut": raw[:-1], "header": raw[:10] + b"?" + raw[11:]}
    changes["dtype"] = raw.replace(b"'<", b"'>")
    path.unlink() if damage == "gone" else path.write_bytes(changes[damage])
    problem = dict(ref_scores.verify(tmp_path))[path]
    assert re.match("is missing" if damage == "gone" else "is damaged", problem)
    with pytest.raises(InputError, match=f"{path} is .*: run the stage 'score' again"):
        open_scores(tmp_path, rows)
    assert create(tmp_path).missing(EVERY).size == N
    assert f"are begun anew ({path} is" in caplog.text


def test_a_check_that_changed_means_that_the_row_is_scored_again(tmp_path):
    rows = complete(tmp_path)
    flip(tmp_path / "checks.npy", -1 - 8 * 2 - 8)  # of row 6
    with pytest.raises(InputError, match="ref_entropy.npy|ref_loss.npy"):
        open_scores(tmp_path, rows)
    assert create(tmp_path).missing(rows).size == 1


def test_a_damaged_manifest_is_said(tmp_path):
    complete(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"reference": "m"', '"reference": "n"'))
    assert "damaged" in dict(ref_scores.verify(tmp_path))[path]
    with pytest.raises(InputError, match="manifest.json is damaged .* delete it"):
        open_scores(tmp_path)
    path.unlink()
    assert create(tmp_path).missing(EVERY).size == N


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        writer = create(tmp_path, n_rows=1000, seq_len=500, fields=["x"])
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            writer.write(np.arange(1000), {"x": np.ones((1000, 500))})
        assert create(tmp_path, n_rows=1000, seq_len=500, fields=["x"]).missing(EVERY).size == N
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
