"""Every kind of source; what is broken is counted; what cannot be read is said in a sentence."""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from stand_in import write_parquet

from rho1_jax.data import corpora, records
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def read(source, root, counts=None):
    return [(s, d.text) for s, d in corpora.split_documents(source, root=root, counts=counts)]


def texts(source, root, counts=None):
    return [text for _, text in read(source, root, counts)]


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_file_type_and_glob(tmp_path):
    line = '{"text": "%s"}\n'
    (tmp_path / "a.jsonl").write_text(line % "plain" + "\n" + line % "second")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((line % "gzip").encode()))
    frames = [zstd((line % name).encode()) for name in ("zstd", "zstd 2")]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    write_parquet(tmp_path / "deep" / "d.parquet", ["parquet", None])
    (tmp_path / "e.txt").write_text("text\n\nfile")
    counts = Counter()
    assert texts(Source("files:*.jsonl*, **/*.parquet,e.txt"), tmp_path, counts) == (
        ["plain", "second", "gzip", "zstd", "zstd 2", "parquet", "text\n\nfile"]
    )
    assert counts["missing"] == 1  # the null of the parquet file
    assert counts["documents"] == 7
    assert texts(Source(f"files:{tmp_path}/a.jsonl"), "/nowhere") == ["plain", "second"]
    assert texts(Source("files:a.jsonl,*.jsonl"), tmp_path) == ["plain", "second"]  # once


def test_json_under_all_its_names(tmp_path):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name in ("jsonl", "json", "ndjson"):
        (tmp_path / f"a.{name}").write_bytes(lines)
        (tmp_path / f"b.{name}.gz").write_bytes(gzip.compress(lines))
        (tmp_path / f"c.{name}.zst").write_bytes(zstd(lines))
    assert texts(Source("files:*.*"), tmp_path) == ["one", "two"] * 9


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [7, 2**16])
def test_a_json_array_is_read_element_by_element(tmp_path, monkeypatch, indent, piece):
    monkeypatch.setattr(records, "_PEEK", piece)
    array = [{"text": "one é, [x]"}, 12345678, {"text": "\ufffd two", "n": [1, {}]}, {"text": "3"}]
    raw = json.dumps(array, indent=indent, ensure_ascii=False).encode()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + raw + b"\n")
    counts = Counter()
    assert texts(Source("files:a.json"), tmp_path, counts) == ["one é, [x]", "\ufffd two", "3"]
    assert counts["malformed"] == 1
    assert not counts["invalid"]
    (tmp_path / "a.json").write_bytes(raw.replace("é".encode(), b"\xff"))
    assert texts(Source("files:a.json"), tmp_path, counts)[0] == "one \ufffd, [x]"
    assert counts["invalid"] == 1
    (tmp_path / "a.json").write_bytes(raw[:-5])
    with pytest.raises(InputError, match="a.json cannot be read .* damaged or cut short"):
        texts(Source("files:a.json"), tmp_path)
    (tmp_path / "a.json").write_bytes(raw + b'\n{"text": "more"}')
    with pytest.raises(InputError, match="a.json cannot be read .More follows the array"):
        texts(Source("files:a.json"), tmp_path)


def test_what_is_no_text_is_malformed(tmp_path):
    odd = ['{"text": NaN}', '{"text": 5}', '{"text": true}', '{"text": ["a"]}', '{"text": {}}']
    lines = ['{"text": "good"}', *odd, '{"text": "also good", "n": Infinity}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    counts = Counter()
    assert texts(Source("files:a.jsonl"), tmp_path, counts) == ["good", "also good"]
    assert (counts["malformed"], counts["missing"]) == (len(odd), 1)


def test_templates_join_fields(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"q": "2+2?", "a": 4}, {"q": "no answer"})
    counts = Counter()
    assert texts(Source("files:a.jsonl", text="{q}\n{a}"), tmp_path, counts) == ["2+2?\n4"]
    assert counts["missing"] == 1


def test_the_first_template_whose_fields_are_there(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "t", "q": "no"}, {"q": "2+2?", "a": 4}, {"a": 5})
    pyarrow.parquet.write_table(pyarrow.table({"q": ["1+1?"], "a": [2]}), tmp_path / "b.parquet")
    source = Source("files:a.jsonl,b.parquet", text="text | {q} is {a}")
    counts = Counter()
    assert texts(source, tmp_path, counts) == ["t", "2+2? is 4", "1+1? is 2"]
    assert counts["missing"] == 1


def test_what_is_broken_is_counted_and_never_fatal(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_LINE", 400)
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'["text"]',
        b'{"other": "field"}',
        b'{"text": null}',
        b'{"text": " \\n"}',
        b'{"text": "caf\xff"}',
        b'{"text": "half \\ud83d pair"}',
        b'{"text": "whole \\ud83d\\ude00 pair"}',
        b'{"text": "' + b"long" * 300 + b'"}',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    counts = Counter()
    assert texts(Source("files:a.jsonl"), tmp_path, counts) == (
        ["good", "caf\ufffd", "half \ufffd pair", "whole \U0001f600 pair", "last"]
    )
    assert counts == {
        "documents": 5,
        "characters": 4 + 4 + 11 + 12 + 4,
        "malformed": 3,
        "missing": 2,
        "empty": 1,
        "invalid": 2,
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_giant_documents_are_cut_at_borders(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "GIANT", 100)
    text = "\n\n".join(f"paragraph {i} " + "é" * (i % 30) for i in range(40)) + "x" * 150
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    else:
        write_lines(tmp_path / name, {"text": text}, {"text": "small"})
    counts = Counter()
    pieces = [t for t in texts(Source(f"files:{name}"), tmp_path, counts) if t != "small"]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert all(piece.endswith("\n\n") for piece in pieces[:-3])  # only the x's have no border
    assert counts["giant"] == 1
    assert counts["invalid"] == 0


def test_invalid_bytes_of_a_text_file_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and a real \xef\xbf\xbd")
    (tmp_path / "b.txt").write_bytes(b"a real \xef\xbf\xbd")
    counts = Counter()
    assert texts(Source("files:*.txt"), tmp_path, counts) == (
        ["caf\ufffd and a real \ufffd", "a real \ufffd"]
    )
    assert counts["invalid"] == 1


def test_split_field_and_hash_rule(tmp_path):
    names = ["train", "val", "Valid", "validation", "test", "dev", None, 3]
    write_lines(tmp_path / "a.jsonl", *({"text": str(n), "split": n} for n in names))
    splits = [s for s, _ in read(Source("files:a.jsonl", split_field="split"), tmp_path)]
    assert splits == ["train", "val", "val", "val", "val", "train", "train"]  # null says nothing

    write_lines(tmp_path / "b.jsonl", *({"text": f"document {i}"} for i in range(5000)))
    pairs = read(Source("files:b.jsonl"), tmp_path)
    val = {text for split, text in pairs if split == "val"}
    assert 25 <= len(val) <= 80  # 1 % of 5000, give or take four deviations
    write_lines(tmp_path / "b.jsonl", *({"text": f"document {i}"} for i in reversed(range(5000))))
    source = Source("files:b.jsonl")
    assert {d.text for d in corpora.documents(source, "val", root=tmp_path)} == val
    train = {d.text for d in corpora.documents(source, "train", root=tmp_path)}
    assert train | val == {text for _, text in pairs}
    assert not train & val


def test_tfds_by_name_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):  # noqa: ARG002
            return {name: self._generate_examples(name) for name in ("train", "validation")}

        def _generate_examples(self, split):
            for i in range(3):
                yield i, {"body": f"{split} {i} é"}

    TinyTexts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path)
    source = Source("tfds:tiny_texts", text="body")
    assert read(source, tmp_path) == (
        [("train", f"train {i} é") for i in range(3)]
        + [("val", f"validation {i} é") for i in range(3)]
    )
    names = [path.name for path, _ in corpora.source_files(source, tmp_path)]
    assert any(name.startswith("tiny_texts-train.array_record") for name in names)
    assert "tensorflow" not in sys.modules

    TinyTexts(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(InputError, match="TFDS cannot open 'no_such_set'"):
        texts(Source("tfds:no_such_set"), tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("files:absent*.jsonl", "No file matches 'absent\\*.jsonl' under"),
        ("files:", "No file matches ''"),
        ("files:a.csv", "a.csv has none of the known types"),
        ("ftp:a.jsonl", "'ftp:a.jsonl' begins with none of files:"),
        ("builtin:nothing", "no embedded corpus 'nothing'"),
        ("files:empty.jsonl", "has no usable text .1 records malformed, 0 without 'text', 1 empty"),
        ("files:other.jsonl", "has no field 'text', only title, body"),
        ("files:other.parquet", "other.parquet has no column 'text', only title"),
        ("files:list.jsonl", "'files:list.jsonl' holds list in its field 'text', not text"),
        ("files:list.parquet", "list.parquet holds list<.*string> in its column 'text', not text"),
        ("files:cut.jsonl.gz", "cut.jsonl.gz cannot be read .*damaged or cut short"),
        ("files:cut.jsonl.zst", "cut.jsonl.zst cannot be read .*damaged or cut short"),
        ("files:cut.parquet", "cut.parquet cannot be read .*damaged or cut short"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, spec, message):
    (tmp_path / "a.csv").write_text("text\nhello")
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\nnonsense\n')
    write_lines(tmp_path / "other.jsonl", *[{"title": "t", "body": "b"}] * 3)
    write_lines(tmp_path / "list.jsonl", *[{"text": ["t"]}] * 3)
    pyarrow.parquet.write_table(pyarrow.table({"text": [["t"]]}), tmp_path / "list.parquet")
    table = pyarrow.table({"title": ["t"]})
    pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
    lines = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(99)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:2000])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstd(lines)[:2000])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=message) as error:
        texts(Source(spec), tmp_path)
    assert str(error.value).count("\n") == 0


def test_an_absent_field_is_said_before_the_corpus_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_PATIENCE", 5)
    write_lines(tmp_path / "a.jsonl", *[{"body": "b"}] * 6, {"text": "too late"})
    with pytest.raises(InputError, match="'files:a.jsonl' has no field 'text', only body"):
        texts(Source("files:a.jsonl"), tmp_path)
    write_lines(tmp_path / "a.jsonl", {"text": "first"}, *[{"body": "b"}] * 9, {"text": "last"})
    assert texts(Source("files:a.jsonl"), tmp_path) == ["first", "last"]


def test_a_record_without_its_split_is_never_trained_on(tmp_path):
    source = Source("files:a.jsonl", split_field="split")
    write_lines(tmp_path / "a.jsonl", {"text": "v", "split": "val"}, {"text": "unknown"})
    counts = Counter()
    assert read(source, tmp_path, counts) == [("val", "v")]
    assert counts["missing"] == 1
    write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(InputError, match="'files:a.jsonl' has no field 'split', only text"):
        read(source, tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_costs_nothing(tmp_path, name):
    text = "text" if name == "a.txt" else '{"text": "text"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    counts = Counter()
    assert texts(Source(f"files:{name}"), tmp_path, counts) == ["text"]
    assert not counts["malformed"] + counts["invalid"]


@pytest.mark.parametrize("text", ["{a", "{}", "{a.b}", "{a[0]}"])
def test_malformed_templates(tmp_path, text):
    write_lines(tmp_path / "a.jsonl", {"a": "b"})
    with pytest.raises(InputError, match="must be a field, or a template"):
        texts(Source("files:a.jsonl", text=text), tmp_path)


def test_a_source_is_tried_before_it_is_read(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", {"text": "first"}, *[{"body": "b"}] * 9)
    corpora.require_readable(Source("files:a.jsonl"), tmp_path)
    corpora.require_readable(Source("builtin:problems"), tmp_path)
    monkeypatch.setattr(corpora, "_PATIENCE", 5)
    (tmp_path / "b.jsonl").write_text("nonsense\n" * 5 + '{"text": "too late"}\n')
    for spec, message in {
        "files:b.jsonl": "no usable text .5 records malformed",
        "files:absent.jsonl": "No file matches",
        "builtin:nothing": "no embedded corpus 'nothing'",
        "tfds:no_such_set": "TFDS cannot open",
    }.items():
        with pytest.raises(InputError, match=message):
            corpora.require_readable(Source(spec), tmp_path)
