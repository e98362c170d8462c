"""Every file of a run damaged in turn: said in a sentence, made again, found by check, or unread.

Nothing damaged may be used in silence, and nothing may end in a traceback.
"""

import collections
import contextlib
import fnmatch
import io
import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rho1_jax import check, main

# What of a finished run is taken away before its files are damaged, and which are, so that they
# must be read again: by the last stages, by evaluation, by training.
STATES = {
    "finished": ((), ("*",)),
    "trained": (
        ("eval.json", "samples.npz", ".samples.npz.sha256", "report.html", ".report.html.sha256"),
        ("data/*", "reference/*", "checkpoints/*"),
    ),
    "scored": (
        ("checkpoints", "eval.json", "samples.npz", ".samples.npz.sha256", "report.html",
         ".report.html.sha256", "metrics.csv", ".metrics.csv.sha256", "heldout.csv",
         ".heldout.csv.sha256"),
        ("data/*", "scores/*"),
    ),
}  # fmt: skip
LEFT_OUT = ("compiled/*", "in_use")  # JAX's own cache; who holds the folder, written at each start
NOBODY_READS = {
    "*tensorboard/*": "TensorBoard alone, whose records have their own checksums",
    "*/commit_success.txt": "a mark of Orbax for file systems without renaming",
    "*/_sharding": "where arrays lay; ours are placed by the mesh of today",
    "*/ocdbt.process_*/manifest.ocdbt": "what one process wrote, before Orbax merged all parts",
    "*/array_metadatas/*": "how arrays were cut; the arrays say it themselves",
    "*.sha256": "the checksum of a file that is whole; without it the file is taken as it is",
    "environment.json": "people; it is no input of anything",
}


class Outcome(NamedTuple):
    """What came of one damage; verdict: one of WELL, or SILENT, or TRACEBACK."""

    state: str
    file: str
    damage: str
    verdict: str
    said: str


WELL = ("a sentence", "made again", "found by check", "read by nobody")
BAD = ("SILENT", "TRACEBACK")


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    """Of a byte that says something: rows that no step reads have no scores, only zeros."""
    content = bytearray(path.read_bytes())
    written = [i for i, byte in enumerate(content) if byte]
    content[written[len(written) * 2 // 3]] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate, "a bit flipped": flip_a_bit, "gone": Path.unlink,
}  # fmt: skip


def files_of(run: Path, patterns: Iterable[str] = ("*",)) -> list[str]:
    """The files of a run that may be damaged."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return [
        name
        for name in names
        if any(fnmatch.fnmatch(name, p) for p in patterns)
        and not any(fnmatch.fnmatch(name, p) for p in LEFT_OUT)
        and (run / name).stat().st_size
    ]


def outcomes(
    run: Path,
    scratch: Path,
    command: Sequence[str],
    *,
    states: Iterable[str] = tuple(STATES),
    patterns: Iterable[str] = (),
    damages: Iterable[str] = tuple(DAMAGES),
) -> Iterator[Outcome]:
    """What comes of damages to files of the finished run: each to a copy of its own in `scratch`.

    command: the options that made the run, without its folder. patterns: of the files; the
    state's own if there are none.
    """
    for state in states:
        taken_away, of_state = STATES[state]
        for name in files_of(run, patterns or of_state):
            if any(name == gone or name.startswith(f"{gone}/") for gone in taken_away):
                continue
            for damage in damages:
                folder = scratch / "copy"
                shutil.copytree(run, folder, ignore=shutil.ignore_patterns("compiled"))
                for gone in taken_away:
                    _remove(folder / gone)
                DAMAGES[damage](folder / name)
                verdict, said = _judged(run, folder, name, command)
                yield Outcome(state, name, damage, verdict, said)
                shutil.rmtree(folder)


def _judged(run: Path, folder: Path, name: str, command: Sequence[str]) -> tuple[str, str]:
    """The verdict on one damaged file, and the sentence that it follows from."""
    damaged = _content(folder / name)
    status, said = _tried(lambda: main.main(["main", *command, f"--workdir={folder}"]))
    lines = [line for line in said.splitlines() if str(folder) in line]
    if status is None:
        return "TRACEBACK", said[-1500:]
    if status:
        return "a sentence", said.strip().splitlines()[-1]
    if other := _other_results(run, folder):
        return "SILENT", f"other results: {other}"
    found, checked = _tried(lambda: check.main(["check", str(folder)]))
    if found is None:
        return "TRACEBACK", checked[-1500:]
    if found:
        return "found by check", "".join(x for x in checked.splitlines() if x.startswith(" "))
    if _content(folder / name) != damaged:
        return "made again", lines[0] if lines else ""
    for pattern, reader in NOBODY_READS.items():
        if fnmatch.fnmatch(name, pattern):
            return "read by nobody", reader
    return "SILENT", "neither the command nor check says anything"


def _tried(do: Callable[[], int]) -> tuple[int | None, str]:
    """The status, None after an exception or a traceback, and all that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status: int | None = do()
        except BaseException:
            traceback.print_exc(file=said)
            status = None
    return (None if "Traceback" in said.getvalue() else status), said.getvalue()


def _other_results(run: Path, folder: Path) -> str:
    """Which results are not those of the whole run."""
    ours, theirs = (json.loads((place / "eval.json").read_text()) for place in (folder, run))
    other = [key for key in theirs if key not in ("seal", "binding") and ours[key] != theirs[key]]
    with np.load(folder / "samples.npz") as mine, np.load(run / "samples.npz") as whole:
        other += [key for key in whole if mine[key].tobytes() != whole[key].tobytes()]
    return ", ".join(other)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def table(found: Sequence[Outcome]) -> str:
    """What came of each file, and how often in all, in Markdown."""
    lines = ["| state | file | " + " | ".join(DAMAGES) + " |", "| --- " * 5 + "|"]
    by_file: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for this in found:
        by_file[this.state, this.file][this.damage] = this.verdict
    for (state, name), verdicts in by_file.items():
        cells = [state, name, *(verdicts.get(damage, "") for damage in DAMAGES)]
        lines.append(f"| {' | '.join(cells)} |")
    counts = collections.Counter(this.verdict for this in found)
    lines += ["", *(f"{verdict}: {counts[verdict]}" for verdict in (*WELL, *BAD))]
    return "\n".join(lines)
