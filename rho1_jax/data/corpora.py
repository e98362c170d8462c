"""Where text comes from: files, TFDS, a Hugging Face hub, or the embedded corpus, as a stream.

Memory stays flat whatever the size of a corpus: files are read in bounded pieces, and documents
longer than `records.GIANT` characters are cut. What cannot be used is counted, never fatal.
"""

import dataclasses
import glob
import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from rho1_jax.data import builtin, dialogs, records
from rho1_jax.data.dialogs import Spans
from rho1_jax.data.records import SUFFIXES, Record, border, decoded, reason
from rho1_jax.errors import InputError

MESSAGES = "messages"
_PATIENCE = 1000  # records without the text field before that is an error
_VAL_NAMES = frozenset({"val", "valid", "validation", "test"})


@dataclasses.dataclass(frozen=True)
class Source:
    """One corpus.

    spec: `files:GLOB[,GLOB]`, `tfds:NAME`, `hf:REPO[/FOLDER][@REVISION]` or `builtin:NAME`.
    text: the field that holds the text, or a template over fields, `"{question}\\n{answer}"`, or
        several of these separated by ` | `: a record's text is the first whose fields it has.
    prompt: a template of what comes before the text and carries no loss; nor does the output of
        tools in a text with a prompt. The text "messages" is a conversation (data/dialogs.py), of
        which only the answers carry loss.
    split_field: the field that says train or val. Without it the splits that a TFDS or hub
        dataset names itself decide; where no val is named, 1 % of the documents by their hash.
    weight: its share of a mixture's tokens, relative to the other sources' weights.
    """

    spec: str
    text: str = "text"
    split_field: str | None = None
    weight: float = 1.0
    prompt: str = ""

    @property
    def in_parts(self) -> bool:
        """Whether only some spans of a text carry loss."""
        return bool(self.prompt) or self.text == MESSAGES

    @property
    def scheme(self) -> str:
        return self.spec.partition(":")[0]

    @property
    def place(self) -> str:
        return self.spec.partition(":")[2]


class Document(NamedTuple):
    """`useful`: character spans worth learning where the source knows the truth, else None.
    `trained`: those that carry loss, None for all of the text."""

    text: str
    useful: Spans | None
    trained: Spans | None = None


def documents(
    source: Source, split: str, *, root: str | Path = ".", counts: Counter[str] | None = None
) -> Iterator[Document]:
    """Streams the documents of one split, "train" or "val"; see `split_documents`."""
    if split not in ("train", "val"):
        raise InputError(f"There is no split {split!r}: the splits are 'train' and 'val'.")
    return (doc for name, doc in split_documents(source, root=root, counts=counts) if name == split)


def split_documents(
    source: Source, *, root: str | Path = ".", counts: Counter[str] | None = None
) -> Iterator[tuple[str, Document]]:
    """Streams (split, document) over a whole source, in a fixed order.

    root: what the globs of `files:` are relative to.
    counts: receives `documents` and `characters` yielded, and what was met on the way:
        `malformed` (not a JSON object), `missing` (without the text or split field), `empty`
        (nothing but white space), `invalid` (held what UTF-8 cannot, now U+FFFD), `giant` (cut up).

    Raises:
        InputError: an unknown scheme or type, absent or damaged files, no text field, no text.
    """
    counts = Counter() if counts is None else counts
    before = counts["documents"]
    for split, document in _whole_documents(source, Path(root), counts):
        for piece in _pieces(document, counts):
            counts["documents"] += 1
            counts["characters"] += len(piece.text)
            yield split or _hash_split(piece.text), piece
    if counts["documents"] == before:
        raise InputError(
            f"The source {source.spec!r} has no usable text ({counts['malformed']} records "
            f"malformed, {counts['missing']} without {source.text!r}, {counts['empty']} empty)."
        )


def source_files(source: Source, root: str | Path) -> list[tuple[Path, str | None]]:
    """The local files a source is read from, in order, each with the split its name says, if any.

    Raises:
        InputError: an unknown scheme or file type, or nothing found.
    """
    match source.scheme:
        case "builtin":
            return []
        case "files":
            return [(path, None) for path in _glob_files(source.place, Path(root))]
        case "hf":
            return _hub_files(source.place)
        case "tfds":
            some = next(iter(_tfds_splits(source.place).values()))
            found = sorted(Path(some.dataset_info.data_dir).rglob("*"))
            return [(path, None) for path in found if path.is_file()]
    raise InputError(f"{source.spec!r} begins with none of files:, tfds:, hf: and builtin:.")


def _whole_documents(
    source: Source, root: Path, counts: Counter[str]
) -> Iterator[tuple[str | None, Document]]:
    """Documents before they are cut, each with its split where one is named."""
    if source.scheme == "builtin":
        yield from ((None, Document(*pair)) for pair in builtin.documents(source.place))
        return
    templates = [_template(part) for part in source.text.split(" | ")]
    prompt, asked = _template(source.prompt) if source.prompt else ("", [])
    also = {source.split_field, *asked} if source.split_field else {*asked}
    choices = [{*fields, *also} for _, fields in templates]
    met, seen = False, 0
    for record, split in _records(source, root, choices, counts):
        texts = {
            field: _string(_encoded(record.get(field), source), counts)
            for field in set().union(*choices)
        }
        values = {field: text for field, text in texts.items() if text is not None}
        chosen = next((i for i, fields in enumerate(choices) if fields <= values.keys()), None)
        if chosen is None:
            counts["missing"] += 1
            lacking = min(choices[0] - values.keys())
            seen += 1
            if seen >= _PATIENCE and not met:
                break
            continue
        met = True
        template, fields = templates[chosen]
        if not any(values[field].strip() for field in fields):
            counts["empty"] += 1
            continue
        if source.split_field is not None:
            split = _named_split(values[source.split_field])
        text, trained = template.format_map(values), None
        if source.prompt:
            text, trained = dialogs.answered(prompt.format_map(values), text)
        elif source.text == MESSAGES:
            conversation = dialogs.chat(text)
            if conversation is None:
                counts["malformed"] += 1
                continue
            text, trained = conversation
        yield split, Document(text, None, trained)
    if seen and not met:
        raise InputError(f"{source.spec!r} has no field {lacking!r}, only {', '.join(record)}.")


def _records(
    source: Source, root: Path, choices: Sequence[set[str]], counts: Counter[str]
) -> Iterator[tuple[Record, str | None]]:
    if source.scheme != "tfds":
        for path, split in source_files(source, root):
            yield from ((record, split) for record in records.records(path, choices, counts))
        return
    splits = _tfds_splits(source.place)
    named = not _VAL_NAMES.isdisjoint(splits)
    for name, examples in splits.items():
        for example in examples:
            yield example, _named_split(name) if named else None


def _glob_files(globs: str, root: Path) -> list[Path]:
    found: list[Path] = []
    for pattern in (part.strip() for part in globs.split(",")):
        full = root / Path(pattern).expanduser()
        matches = [full] if full.is_file() else map(Path, glob.glob(str(full), recursive=True))
        files = sorted(path for path in matches if path.is_file())
        if not files:
            raise InputError(f"No file matches {pattern!r} under {root.resolve()}.")
        found += files
    if other := [path for path in found if not path.name.endswith(SUFFIXES)]:
        raise InputError(f"{other[0]} has none of the known types {', '.join(SUFFIXES)}.")
    return list(dict.fromkeys(found))


def _tfds_splits(name: str) -> Mapping[str, Any]:
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name)
    except Exception as error:
        raise InputError(
            f"TFDS cannot open {name!r} without TensorFlow ({reason(error)}): check the name and "
            "the network, or prepare it elsewhere as array_record and set TFDS_DATA_DIR."
        ) from error


def _hub_files(place: str) -> list[tuple[Path, str | None]]:
    """A hub dataset's parquet files, fetched into the hub's cache."""
    place, _, revision = place.partition("@")
    owner, name, *folders = (place.strip("/") + "/").split("/")
    repo, folder = f"{owner}/{name}".strip("/"), "/".join(folders).strip("/")
    wanted: Any = {
        "revision": revision or None,
        "allow_patterns": f"{folder}/*.parquet".lstrip("/"),
    }
    try:
        snapshot = huggingface_hub.snapshot_download(repo, repo_type="dataset", **wanted)
    except Exception as error:
        raise InputError(
            f"The hub dataset {repo!r} cannot be fetched ({reason(error)}): check its name, the "
            "network and HF_ENDPOINT, or fetch it elsewhere and set HF_HUB_OFFLINE=1."
        ) from error
    files = sorted(Path(snapshot, folder).rglob("*.parquet"))
    if not files:
        raise InputError(f"The hub dataset {repo!r} has no parquet files in {folder or '/'}.")
    words = [set(re.split(r"[/_.-]", str(file.relative_to(snapshot)).lower())) for file in files]
    splits = ["train" if _VAL_NAMES.isdisjoint(some) else "val" for some in words]
    return [(f, s if "val" in splits else None) for f, s in zip(files, splits, strict=True)]


def _template(text: str) -> tuple[str, list[str]]:
    """The template, and the fields it names; a plain field name is the template of itself."""
    template = text if "{" in text else "{" + text + "}"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        fields = []
    if not fields or not all(re.fullmatch(r"[^.\[\]{}]+", field) for field in fields):
        raise InputError(f"The text {text!r} must be a field, or a template like '{{a}}\\n{{b}}'.")
    return template, fields


def _encoded(value: Any, source: Source) -> Any:
    """A conversation as JSON; anything else as it is."""
    return json.dumps(value) if source.text == MESSAGES and isinstance(value, list) else value


def _string(value: Any, counts: Counter[str]) -> str | None:
    if isinstance(value, bytes):
        return decoded(value, counts)
    if not isinstance(value, str | int | float):
        return None
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which UTF-8 cannot hold
        counts["invalid"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pieces(document: Document, counts: Counter[str]) -> Iterator[Document]:
    text, start = document.text, 0
    if len(text) <= records.GIANT:
        yield document
        return
    counts["giant"] += 1
    while start < len(text):
        stop = start + border(text[start : start + records.GIANT + 1])
        inside = [(max(a - start, 0), min(b, stop) - start) for a, b in document.trained or ()]
        trained = tuple((a, b) for a, b in inside if a < b)
        yield Document(text[start:stop], None, None if document.trained is None else trained)
        start = stop


def _named_split(name: str) -> str:
    return "val" if name.strip().lower() in _VAL_NAMES else "train"


def _hash_split(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % 100 == 0 else "train"
