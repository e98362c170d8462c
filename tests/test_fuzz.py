"""Corpora and models made of anything: each is one sentence, or a right result. Never a traceback.

Configs and command lines are tried in test_config_schema.py.
"""

import contextlib
import gzip
import io
import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rho1_jax.data import corpora, records
from rho1_jax.errors import InputError
from rho1_jax.models import llama, tokenizer
from rho1_jax.models.architecture import Architecture
from rho1_jax.models.formats import gguf_file, huggingface, load, orbax_reads
from rho1_jax.slm import step
from rho1_jax.training import checkpoint, optimizer
from rho1_jax.training.checkpoint import Checkpoints
from tests.models.formats import test_gguf_file

SHAPE = Architecture(
    vocab_size=264, width=16, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=4, ffn_width=24
)


def tries(n):
    """The same n examples every time; what hypothesis found once becomes an `@example`."""
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def require_one_sentence(error):
    text = str(error)
    assert "\n" not in text.strip()
    assert 10 < len(text) < 900, text


# A corpus: records of odd values, written as this or that, and then damaged.

ODD = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(-(10**30), 10**30),
    st.text(max_size=20), st.sampled_from(["", " ", "\ud800", "\0", "train", "val", "x" * 3000]),
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "x", 5]),
                                        "content": VALUES}), max_size=3,
)  # fmt: skip
RECORDS = st.one_of(
    st.fixed_dictionaries({}, optional={"text": VALUES, "split": ODD, "q": VALUES, "a": VALUES,
                                        "messages": TURNS | VALUES}),
    st.fixed_dictionaries({"text": st.text(min_size=1, max_size=30)}),
    VALUES,
)  # fmt: skip
ENCODINGS = ("ascii", "utf-8", "utf-8-sig", "utf-16", "utf-32")
SOURCES = st.builds(
    dict,
    text=st.sampled_from(["text", "{q}\n{a}", "messages", "{q} | text", "absent"]),
    prompt=st.sampled_from(["", "", "{q}"]),
    split_field=st.sampled_from([None, None, "split"]),
)
HARMS = st.tuples(
    st.sampled_from(["none", "none", "cut", "write", "insert", "flip", "twice"]),
    st.floats(0, 1), st.binary(min_size=1, max_size=12),
)  # fmt: skip


def harmed(raw, harm):
    """The bytes with one harm done at a place, given as a share of their length."""
    kind, share, noise = harm
    at = int(share * len(raw))
    if kind == "cut":
        return raw[:at]
    if kind == "write":
        return raw[:at] + noise + raw[at + len(noise) :]
    if kind == "insert":
        return raw[:at] + noise + raw[at:]
    if kind == "flip" and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ (noise[0] or 1)]) + raw[at + 1 :]
    return raw * 2 if kind == "twice" else raw


def as_lines(found, encoding):
    text = "\n".join(json.dumps(record, ensure_ascii=encoding == "ascii") for record in found)
    return text.encode("utf-8" if encoding == "ascii" else encoding, "surrogatepass")


def as_parquet(found):
    texts = [record.get("text") if isinstance(record, dict) else record for record in found]
    for column in (texts, [repr(text) for text in texts]):
        out = io.BytesIO()
        # Mixed kinds, half pairs, structures without fields: pyarrow writes none of these.
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            pyarrow.parquet.write_table(pa.table({"text": pa.array(column)}), out)
            return out.getvalue()
    return b""


@st.composite
def corpus_files(draw):
    """(a file's name, its bytes)"""
    suffix = draw(st.sampled_from(records.SUFFIXES))
    if draw(st.integers(0, 9)) == 0:
        return suffix, draw(st.binary(max_size=200))
    found = draw(st.lists(RECORDS, max_size=4))
    if suffix == ".parquet":
        return suffix, harmed(as_parquet(found), draw(HARMS))
    raw = as_lines(found, draw(st.sampled_from(ENCODINGS)))
    if draw(st.integers(0, 4)) == 0:
        raw = b"[" + raw.replace(b"\n", b",") + b"]"
    raw = harmed(raw, draw(HARMS))
    if suffix.endswith(".gz"):
        raw = gzip.compress(raw, 1)
    if suffix.endswith(".zst"):
        raw = pa.compress(raw, "zstd", asbytes=True) if raw else raw
    return suffix, harmed(raw, draw(HARMS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@tries(800)
@given(file=corpus_files(), how=SOURCES)
def test_a_corpus_is_text_or_one_sentence(file, how, folder):
    suffix, raw = file
    path = folder / f"corpus{suffix}"
    path.write_bytes(raw)
    source = corpora.Source(f"files:{path}", **how)
    try:
        found = list(corpora.split_documents(source))
    except InputError as error:
        require_one_sentence(error)
        return
    finally:
        path.unlink()
    for split, document in found:
        assert split in ("train", "val")
        assert document.text.strip()
        document.text.encode()  # half a surrogate pair is no text
        for start, end in document.trained or ():
            assert 0 <= start <= end <= len(document.text)


# A model: right, and then damaged in one file.


@pytest.fixture(scope="module")
def params():
    return llama.init(SHAPE, jax.random.key(0))


@pytest.fixture(scope="module")
def models(params, tmp_path_factory):
    """A model folder of ours, one of Hugging Face's kind, and a GGUF file."""
    place, tok = tmp_path_factory.mktemp("models"), tokenizer.train(["some text"] * 3, 264)
    tx = optimizer.of("adamw", lambda _: 1e-2, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0)
    checkpoint.write_model_file(place / "ours", SHAPE, tok)
    with Checkpoints(place / "ours", keep=2) as checkpoints:
        checkpoints.save(1, step.init_state(params, tx), {"rows": "a"})
    (place / "theirs").mkdir()
    huggingface.save(place / "theirs", params, SHAPE, dtype="float32", more={})
    tok.save(place / "theirs")
    (place / "gguf").mkdir()
    test_gguf_file.write(place / "gguf" / "m.gguf", params, SHAPE)
    return place


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b))


def tried(models, scratch, name, data, read):
    """What is read of a model with one damaged file; None after one sentence."""
    copy = scratch / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(models / name, copy)
    files = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
    path = copy / data.draw(st.sampled_from(files))
    path.write_bytes(harmed(path.read_bytes(), data.draw(HARMS)))
    try:
        return read(copy)
    except InputError as error:
        require_one_sentence(error)
        return None


@tries(60)
@given(data=st.data())
def test_a_checkpoint_has_its_bits_or_is_refused(data, models, params, folder, monkeypatch_module):
    monkeypatch_module.setattr(orbax_reads, "_LAST_READS", 0.02)
    found = tried(models, folder, "ours", data, load.load)
    assert found is None or same(found[0], params)


@tries(240)
@given(data=st.data())
def test_a_model_of_others_is_finite_or_refused(data, models, params, folder):
    """Their files have no checksums: a weight may be another, but never infinite or elsewhere."""
    found = tried(models, folder, "theirs", data, load.load)
    if found is not None:
        assert jax.tree.map(np.shape, found[0]) == jax.tree.map(np.shape, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[0]))


@tries(60)
@given(data=st.data())
def test_a_gguf_file_is_read_or_refused(data, models, params, folder):
    found = tried(models, folder, "gguf", data, lambda copy: gguf_file.load(copy / "m.gguf"))
    if found is not None:
        assert jax.tree.map(np.shape, found[0]) == jax.tree.map(np.shape, params)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch
