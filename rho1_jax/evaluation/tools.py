"""Tool-integrated reasoning (ToRA, arXiv 2309.17452): the model writes Python, a sandbox runs it.

A model's code is hostile until proven otherwise. It runs in a process that has no network, can
change no file, start no process, send no signal, and sees no environment, no open file and none of
this machine's files but Python's own, under limits of time, memory and output.

What enforces that, and what is lost where it is absent:

- Namespaces, through bubblewrap (`bwrap`) or util-linux (`unshare`, `mount`, `chroot`). Without
  either, or where the system forbids user namespaces (many containers), code can *read* whatever
  this user can, and see other processes.
- A system call filter, through libseccomp. Without it, code is held back by the namespaces and by
  limits only: it could use the kernel's whole interface, and as root start processes.
- With neither nothing is run: `Sandbox` raises InputError.
"""

import dataclasses
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rho1_jax.errors import InputError
from rho1_jax.evaluation import snippet_server

_START_SECONDS = 120.0  # for importing sympy on a busy machine
_GRACE_SECONDS = 5.0  # beyond the wall time, before the sandbox as a whole is killed
_ENVIRONMENT = ("LANG=C.UTF-8", "OPENBLAS_NUM_THREADS=1", "PYTHONHASHSEED=0")
_SETUP = """set -e
root=$1; shift
mount -t tmpfs -o mode=755,size=1m none "$root"
mkdir "$root/dev"
for device in null urandom; do
  : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
while [ "$1" != -- ]; do
  mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"; shift
done
shift
mount -o remount,ro "$root"
cd "$root"
exec chroot "$root" "$@"
"""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program: seconds of CPU and wall time, bytes of address space and of output."""

    cpu: int = 5
    wall: float = 10.0
    memory: int = 2**31
    output: int = 10_000


class Ran(NamedTuple):
    text: str  # what was printed, and the error's last line
    status: str  # ok | error | time limit | output limit | crashed


class Sandbox:
    """Runs programs one after another, each in a process of its own. A context manager.

    `isolation` names what holds them back: "bwrap" or "unshare", "seccomp".
    """

    def __init__(self, limits: Limits = Limits()):
        self.limits = limits
        self.isolation: tuple[str, ...] = ()
        self._server: subprocess.Popen[bytes] | None = None
        self._root = tempfile.mkdtemp(prefix="sandbox-")

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_exc) -> None:
        self._stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def run(self, code: str) -> Ran:
        """Run a program and return what it printed. Never raises for what the program does."""
        if self._server is None:
            self._start()
        limits = dataclasses.asdict(self.limits)
        reply = self._ask({"code": code} | limits, self.limits.wall + _GRACE_SECONDS)
        if reply is None or reply["status"] == "not confined":
            self._stop()
            return Ran("", "crashed")
        return Ran(reply["text"], reply["status"])

    def _start(self) -> None:
        for name, command in _commands(self._root):
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
                start_new_session=True,
            )
            hello = self._ask(None, _START_SECONDS)
            if hello is not None and (name or hello["seccomp"]):
                self.isolation = tuple(filter(None, (name, hello["seccomp"] and "seccomp")))
                if not name:
                    print("tools: WARNING: no namespaces, so code can read this user's files.")
                return
            self._stop()
        raise InputError(
            "This system gives no way to confine a model's code (neither namespaces through bwrap "
            "or unshare, nor libseccomp): install bubblewrap, or run where user namespaces work."
        )

    def _ask(self, request: Any, seconds: float) -> Any:
        """The server's reply, or None if it does not come in time."""
        server: Any = self._server
        try:
            if request is not None:
                server.stdin.write(json.dumps(request).encode() + b"\n")
                server.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(server.stdout, selectors.EVENT_READ)
                return json.loads(server.stdout.readline()) if ready.select(seconds) else None
        except (OSError, ValueError):  # it has died
            return None

    def _stop(self) -> None:
        if self._server is not None:
            self._server.kill()  # and with it its PID namespace
            self._server.communicate()
            self._server = None


def _commands(root: str) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of each way to start the server, the strongest first."""
    source = Path(snippet_server.__file__).read_text()
    python = [sys.executable, "-I", "-c", source]
    folders = _readable_folders()
    if bwrap := shutil.which("bwrap"):
        binds = [word for folder in folders for word in ("--ro-bind", folder, folder)]
        devices = [w for d in ("null", "urandom") for w in ("--dev-bind", f"/dev/{d}", f"/dev/{d}")]
        settings = [w for pair in _ENVIRONMENT for w in ("--setenv", *pair.split("="))]
        yield (
            "bwrap",
            [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1"]
            + ["--clearenv", "--cap-drop", "ALL", *settings, *binds, *devices]
            + ["--remount-ro", "/", "--chdir", "/", "--", *python],
        )
    if unshare := shutil.which("unshare"):
        yield (
            "unshare",
            [unshare, "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts"]
            + ["--cgroup", "--pid", "--fork", "--kill-child", "--", "sh", "-c", _SETUP, "sh", root]
            + [*folders, "--", "env", "-i", *_ENVIRONMENT, *python],
        )
    yield "", ["env", "-i", *_ENVIRONMENT, *python]


def _readable_folders() -> list[str]:
    """Python, its packages and the system's libraries; none inside another."""
    paths = sysconfig.get_paths()
    wanted = [sys.prefix, sys.base_prefix, paths["purelib"], paths["platlib"], paths["stdlib"]]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/bin", "/bin"]
    wanted += [os.path.realpath(p) for p in wanted]  # where links lead must be there, too
    folders = sorted({os.path.abspath(p) for p in wanted if os.path.isdir(p)}, key=len)
    return [f for i, f in enumerate(folders) if not any(f.startswith(g + "/") for g in folders[:i])]


# The loop

_PROGRAM = re.compile(r"```python\n(.*?)```\s*\Z", re.S)
OUTPUT_HEAD = "```output\n"


def solve(
    prompts: Sequence[str],
    generate: Callable[[list[str]], list[str]],
    run: Callable[[str], Ran],
    *,
    max_calls: int = 4,
) -> list[str]:
    """The solution to each prompt, with the output of its programs written into it.

    generate: texts -> continuations, each ended before OUTPUT_HEAD (or at its own end). A
      continuation that ends with a ```python block is answered with the block's output, up to
      `max_calls` times, and continued.
    """
    texts = [""] * len(prompts)
    active = list(range(len(prompts)))
    for call in range(max_calls + 1):
        going_on = []
        continued = generate([prompts[i] + texts[i] for i in active])
        for i, more in zip(active, continued, strict=True):
            texts[i] += more
            program = _PROGRAM.search(more)
            if program and call < max_calls:
                texts[i] = texts[i].rstrip() + f"\n{OUTPUT_HEAD}{_said(run(program[1]))}\n```\n"
                going_on.append(i)
        active = going_on
        if not active:
            break
    return texts


def _said(ran: Ran) -> str:
    """What the model is shown: the output, and why it ended if not by itself."""
    text = ran.text.strip().replace("```", "'''")  # no output can close its own block
    return text if ran.status in ("ok", "error") else f"{text}\n({ran.status})".strip()
