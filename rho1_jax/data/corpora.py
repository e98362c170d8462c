"""Where text comes from: files, TFDS, a Hugging Face hub, or the embedded corpus, as a stream.

Memory stays flat whatever the size of a corpus: files are read in bounded pieces, and documents
longer than `records.GIANT` characters are cut. What cannot be used is counted, never fatal.
"""

import dataclasses
import glob
import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rho1_jax.data import builtin, dialogs, hub, records
from rho1_jax.data.dialogs import Spans
from rho1_jax.data.hub import VAL_NAMES
from rho1_jax.data.records import MESSAGES, SUFFIXES, Record, border, decoded, reason
from rho1_jax.errors import InputError

_PATIENCE = 1000  # records without text before that is an error


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
    source: Source,
    *,
    root: str | Path = ".",
    counts: Counter[str] | None = None,
    most: int | None = None,
) -> Iterator[tuple[str, Document]]:
    """Streams (split, document) over a whole source, in a fixed order.

    most: stop after so many records.

    root: what the globs of `files:` are relative to.
    counts: receives `documents` and `characters` yielded, and what was met on the way:
        `malformed` (not a JSON object, or no text in its text field), `missing` (without the text
        or split field), `empty` (nothing but white space), `invalid` (held what UTF-8 cannot, now
        U+FFFD), `giant` (cut up).

    Raises:
        InputError: an unknown scheme or type, absent or damaged files, no text field, no text.
    """
    counts = Counter() if counts is None else counts
    before = counts["documents"]
    for split, document in _whole_documents(source, Path(root), counts, most):
        for piece in _pieces(document, counts):
            counts["documents"] += 1
            counts["characters"] += len(piece.text)
            yield split or _hash_split(piece.text), piece
    if counts["documents"] == before:
        raise InputError(
            f"The source {source.spec!r} has no usable text ({counts['malformed']} records "
            f"malformed, {counts['missing']} without {source.text!r}, {counts['empty']} empty)."
        )


def require_readable(source: Source, root: str | Path = ".") -> None:
    """InputError unless a source can be opened and text is among its first records.

    Of a hub's dataset only whether it has files is asked: nothing is fetched.
    """
    if source.scheme == "hf":
        return hub.require_files(source.place)
    for path, _ in source_files(source, root):
        try:
            path.open("rb").close()
        except OSError as error:
            raise InputError(f"{path} cannot be opened ({reason(error)}).") from error
    next(split_documents(source, root=root, most=_PATIENCE))
    return None


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
            return hub.files(source.place)
        case "tfds":
            some = next(iter(_tfds_splits(source.place).values()))
            found = sorted(Path(some.dataset_info.data_dir).rglob("*"))
            return [(path, None) for path in found if path.is_file()]
    raise InputError(f"{source.spec!r} begins with none of files:, tfds:, hf: and builtin:.")


class _Layout(NamedTuple):
    """Where in a record a source's text lies."""

    templates: list[tuple[str, list[str]]]  # and the fields that each names
    prompt: str
    also: set[str]  # fields that are needed besides

    @property
    def choices(self) -> list[set[str]]:
        return [{*fields, *self.also} for _, fields in self.templates]


def _whole_documents(
    source: Source, root: Path, counts: Counter[str], most: int | None
) -> Iterator[tuple[str | None, Document]]:
    """Documents before they are cut, each with its split where one is named."""
    if source.scheme == "builtin":
        yield from ((None, Document(*pair)) for pair in builtin.documents(source.place))
        return
    prompt, asked = _template(source.prompt) if source.prompt else ("", [])
    also = {source.split_field, *asked} if source.split_field else {*asked}
    layout = _Layout([_template(part) for part in source.text.split(" | ")], prompt, also)
    met, tried, last = False, 0, None
    for record, split in islice(_records(source, root, layout.choices, counts), most):
        found = "malformed" if record is None else _read(record, source, layout, counts)
        if not isinstance(found, str):
            yield found[0] or split, found[1]
        else:
            counts[found] += 1
        met |= found not in ("malformed", "missing")
        tried, last = tried + 1, record or last
        if tried >= _PATIENCE and not met:
            break
    if last is not None and not met:
        _refuse(last, source, layout)


def _read(
    record: Record, source: Source, layout: _Layout, counts: Counter[str]
) -> tuple[str | None, Document] | str:
    """A record's split, if it says one, and document; or what it is counted as."""
    stored = {f: _encoded(record.get(f), source) for f in set().union(*layout.choices)}
    values = {f: text for f, v in stored.items() if (text := _string(v, counts)) is not None}
    chosen = next((i for i, some in enumerate(layout.choices) if some <= values.keys()), None)
    if chosen is None:
        known = [{f for f in some if stored[f] is not None} for some in layout.choices]
        return "malformed" if layout.choices[0] in known else "missing"
    template, fields = layout.templates[chosen]
    if not any(isinstance(stored[field], str | bytes) for field in fields):
        return "malformed"  # a number alone is no text
    if not any(values[field].strip() for field in fields):
        return "empty"
    split = _named_split(values[source.split_field]) if source.split_field else None
    text, trained = template.format_map(values), None
    if source.prompt:
        text, trained = dialogs.answered(layout.prompt.format_map(values), text)
    elif source.text == MESSAGES:
        conversation = dialogs.chat(text)
        if conversation is None:
            return "malformed"
        text, trained = _whole(conversation[0], counts), conversation[1]
    return split, Document(text, None, trained)


def _refuse(record: Record, source: Source, layout: _Layout) -> None:
    """InputError that says why a record has no text, where its fields say it."""
    for field in sorted(layout.choices[0]):
        if field not in record:
            raise InputError(f"{source.spec!r} has no field {field!r}, only {', '.join(record)}.")
    for field in layout.templates[0][1]:
        if not isinstance(record[field], str | bytes):
            kind = "null" if record[field] is None else type(record[field]).__name__
            raise InputError(
                f"{source.spec!r} holds {kind} in its field {field!r}, not text: "
                "name a field of strings, or a template over several."
            )


def _records(
    source: Source, root: Path, choices: Sequence[set[str]], counts: Counter[str]
) -> Iterator[tuple[Record | None, str | None]]:
    if source.scheme != "tfds":
        for path, split in source_files(source, root):
            yield from ((record, split) for record in records.records(path, choices, counts))
        return
    splits = _tfds_splits(source.place)
    named = not VAL_NAMES.isdisjoint(splits)
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
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _whole(str(value), counts)


def _whole(text: str, counts: Counter[str]) -> str:
    """The text; halves of surrogate pairs, which UTF-8 cannot hold, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
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
    return "val" if name.strip().lower() in VAL_NAMES else "train"


def _hash_split(text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") % 100 == 0 else "train"
