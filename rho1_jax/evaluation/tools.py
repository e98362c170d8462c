"""Tool-integrated reasoning (ToRA, arXiv 2309.17452): the model writes Python, a sandbox runs it.

A model's code is hostile until proven otherwise. It runs in a process that has no network, can
change no file but in a folder of its own, start no process, send no signal, change no other
process, and sees no environment, no open file and none of this machine's files but Python's own,
under limits of time, memory, threads, files and output.

What enforces that, and what is lost where it is absent (docs/sandbox.md says more):

- A list of the system calls that are allowed (seccomp). Without it nothing is run.
- Namespaces, through bubblewrap (`bwrap`) or util-linux (`unshare`, `mount`, `chroot`). Without
  either, or where the system forbids user namespaces (many containers), code can learn the names,
  sizes and times of files by asking for them, and write 1 MiB a file to a folder on the disk.
- Landlock. Without it and without namespaces code can *read* whatever this user can.

A verdict (`passes`) is safe from programs that skip their checks, write it themselves, or return
what equals anything; not from one that searches its own process for the password of the checks.
"""

import ast
import copy
import dataclasses
import json
import logging
import os
import re
import secrets
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
from rho1_jax.evaluation import confinement, snippet_server

_log = logging.getLogger("rho1_jax")

_START_SECONDS = 120.0  # for importing sympy on a busy machine
_GRACE_SECONDS = 5.0  # beyond the wall time, before the sandbox as a whole is killed
_LIKE_NO_OTHER = "(lambda: 0)"
_TRIED = """try:
    assert {}
except Exception:
    pass
else:
    raise SystemError("this compares equal to anything")
"""
_REPLY = {"text", "status", "passed", "clean"}
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
mkdir "$root/tmp"; mount -t tmpfs -o mode=700,size=64m,nr_inodes=4096 none "$root/tmp"
mount -o remount,ro "$root"
cd "$root"
exec chroot "$root" "$@"
"""

# Defines the modules inside, where none of this package's files can be seen.
_BOOT = """import sys, types
for name, source in SOURCES:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
module.main(sys.argv[1])
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

    `isolation` names what holds them back: "bwrap" or "unshare", "landlock", "seccomp".
    """

    def __init__(self, limits: Limits = Limits()):
        self.limits = limits
        self.isolation: tuple[str, ...] = ()
        self._server: subprocess.Popen[bytes] | None = None
        self._root = ""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def close(self) -> None:
        """End the server and remove its folder. Another `run` starts anew."""
        if self._server is not None:
            self._server.kill()  # and with it its PID namespace
            self._server.communicate()
            self._server = None
        if self._root:
            subprocess.run(["rm", "-rf", self._root], stderr=subprocess.DEVNULL)
            self._root = ""

    def run(self, code: str) -> Ran:
        """Run a program and return what it printed. Never raises for what the program does."""
        reply = self._reply(code)
        return Ran(reply["text"], reply["status"])

    def passes(self, code: str, checks: str) -> bool:
        """Run a program, then `checks` in its `__main__`: do both end by themselves, unraised?

        The program gets to see the checks only after it has ended. One that passes is run again
        with `falsified` checks: what equals anything shows there.
        """
        if not self._reply(code, checks)["passed"]:
            return False
        twice = dataclasses.replace(self.limits, cpu=2 * self.limits.cpu, wall=2 * self.limits.wall)
        return self._reply(code, falsified(checks), twice)["passed"] is True

    def _reply(
        self, code: str, checks: str | None = None, limits: Limits | None = None
    ) -> dict[str, Any]:
        limits = limits or self.limits
        request = {"code": code, "checked": checks is not None, **dataclasses.asdict(limits)}
        messages = [json.dumps(request)]
        if checks is not None:
            messages.append(secrets.token_hex(snippet_server.PASSWORD // 2) + checks)
        for _ in range(2):
            if self._server is None:
                self._start()
            reply = self._ask(messages, limits.wall + _GRACE_SECONDS)
            if not isinstance(reply, dict) or not set(reply) >= _REPLY:
                break
            if reply["status"] != "not confined":  # else nothing of the program has run
                if not reply["clean"]:
                    self.close()
                return reply
            self.close()
        self.close()
        return {"text": "", "status": "crashed", "passed": False}

    def _start(self) -> None:
        self._root = tempfile.mkdtemp(prefix="sandbox-")
        for name, command in _commands(self._root):
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
                start_new_session=True,
            )
            hello = self._ask([], _START_SECONDS)
            if isinstance(hello, dict) and "landlock" in hello:
                parts = (name, hello["landlock"] and "landlock", "seccomp")
                self.isolation = tuple(filter(None, parts))
                if not name and not hello["landlock"]:
                    _log.warning(
                        "tools: WARNING: neither namespaces nor Landlock, so code can read this "
                        "user's files, and can write none."
                    )
                return
            self._server.kill()
            self._server.communicate()
            self._server = None
        self.close()
        raise InputError(
            "This system gives no way to confine a model's code: the kernel must have seccomp "
            "filters (on x86_64 or aarch64), and to hide files install bubblewrap."
        )

    def _ask(self, messages: list[str], seconds: float) -> Any:
        """The server's reply, or None if it does not come in time."""
        server: Any = self._server
        try:
            for message in (text.encode("utf-8", "replace") for text in messages):
                server.stdin.write(b"%10d" % len(message) + message)
            server.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(server.stdout, selectors.EVENT_READ)
                return json.loads(server.stdout.readline()) if ready.select(seconds) else None
        except (OSError, ValueError):  # it has died
            return None


def falsified(checks: str) -> str:
    """`checks` turned round: an honest program passes these, too, since no comparison may hold.

    In every `assert a == b` (or <, in, is) one side's values become objects like no other, so that
    only what compares equal to anything still compares equal.
    """
    try:
        return ast.unparse(_Falsify().visit(ast.parse(checks)))
    except (SyntaxError, ValueError, RecursionError):
        return checks


class _Falsify(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> Any:
        test = node.test
        negated = (ast.NotEq, ast.NotIn, ast.IsNot)
        if not isinstance(test, ast.Compare) or len(test.ops) > 1:
            return node
        if isinstance(test.ops[0], negated):
            return node
        left, right = test.left, test.comparators[0]
        pairs = [(left, _unlike(right))] if not _is_literal(left) else []
        pairs += [(_unlike(left), right)] if not _is_literal(right) else []
        comparisons = [ast.Compare(a, test.ops, [b]) for a, b in pairs]
        tried = "".join(_TRIED.format(ast.unparse(c)) for c in comparisons)
        return ast.parse(tried).body if tried else ast.Pass()


class _Values(ast.NodeTransformer):
    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, (ast.Constant, ast.UnaryOp, ast.BinOp)):  # also -1, 2 + 3j
            return ast.parse(_LIKE_NO_OTHER, mode="eval").body
        return self.generic_visit(node)


def _unlike(side: ast.expr) -> ast.expr:
    """A side of a comparison with no value left as it was."""
    changed = _Values().visit(copy.deepcopy(side)) if _is_literal(side) else side
    same = ast.dump(changed) == ast.dump(side)  # [] has no values
    return ast.parse(_LIKE_NO_OTHER, mode="eval").body if same else changed


def _is_literal(side: ast.expr) -> bool:
    try:
        ast.literal_eval(side)
    except (ValueError, TypeError):
        return False
    return True


def _commands(root: str) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of each way to start the server, the strongest first."""
    modules = (confinement, snippet_server)
    sources = [("rho1_jax.evaluation", "")]
    sources += [(m.__name__, Path(str(m.__file__)).read_text()) for m in modules]
    boot = _BOOT.replace("SOURCES", repr(sources))
    folders = _readable_folders()

    def python(scratch: str, namespaces: bool) -> list[str]:
        settings = {"readable": folders, "scratch": scratch, "namespaces": namespaces}
        return [sys.executable, "-I", "-c", boot, json.dumps(settings)]

    environment = [*_ENVIRONMENT, "TMPDIR=/tmp"]
    if bwrap := shutil.which("bwrap"):
        binds = [word for folder in folders for word in ("--ro-bind", folder, folder)]
        devices = [w for d in ("null", "urandom") for w in ("--dev-bind", f"/dev/{d}", f"/dev/{d}")]
        settings = [w for pair in environment for w in ("--setenv", *pair.split("="))]
        yield (
            "bwrap",
            [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1"]
            + ["--clearenv", "--cap-drop", "ALL", *settings, *binds, *devices]
            + ["--size", str(2**26), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/", "--"]
            + python("/tmp", True),
        )
    if unshare := shutil.which("unshare"):
        yield (
            "unshare",
            [unshare, "--user", "--map-root-user", "--mount", "--net", "--ipc", "--uts"]
            + ["--cgroup", "--pid", "--fork", "--kill-child", "--", "sh", "-c", _SETUP, "sh", root]
            + [*folders, "--", "env", "-i", *environment, *python("/tmp", True)],
        )
    scratch = os.path.join(root, "tmp")
    os.makedirs(scratch, exist_ok=True)
    command = ["env", "-i", *_ENVIRONMENT, f"TMPDIR={scratch}", *python(scratch, False)]
    yield "", command


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
