"""What runs inside the sandbox (tools.py starts it): each request is a program, run in a fork.

Only the standard library, and of this package `confinement`. The fork has libraries loaded already,
so that a program takes milliseconds, and shares no open file with anything but its output and a
socket to this server, on which its end is told.
A request is JSON after its length in ten digits: {"code", "checked", "cpu", "wall", "memory",
"output"}. If `checked`, more follows: a password, and code to run in the program's `__main__` when
the program has ended. Both stay unread, outside of the program's memory, until then; the password
sent back is the verdict. The reply is one JSON line: {"text", "status", "passed", "clean"}.
"""

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import types
from typing import NamedTuple

from rho1_jax.evaluation import confinement

_CONTROL = 3  # the socket, in the program's process
_MOST_THREADS, _MOST_FILES = 256, 1000  # started, made; in all, by one program
_FILE_SIZE = 2**20
PASSWORD = 32  # bytes before the code of the checks
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # ioctl of a filter's listener

# What programs commonly use, so that no fork must import it (sympy imports half of itself late).
_WARM_UP = (
    "import math, fractions, itertools, collections, datetime, random, re, statistics, decimal",
    "import numpy",
    """from sympy import *
x, y = symbols("x y")
solve([x**2 - 2 * y, x - y]), solve(x**2 < 2), simplify(sin(x) ** 2 + cos(x) ** 2)
factor(x**2 - 1), integrate(x * exp(x), x), diff(x**3, x), limit(sin(x) / x, x, 0)
summation(x, (x, 1, 10)), factorint(360), Matrix([[1, 2], [3, 4]]).det(), expand((x + 1) ** 3)
nsimplify("0.25"), N(pi), latex(x / y), Rational(1, 3) + sqrt(12)""",
)


class Walls(NamedTuple):
    """What each program is put behind."""

    filter: bytes
    counted: bytes  # the filter that asks, or b""
    rules: int  # Landlock's file, or -1
    scratch: str  # the folder a program may write, or ""


def walls(readable, scratch, namespaces):
    """The strongest that this kernel has. OSError if it has no system call filter."""
    landlock = confinement.landlock_version() > 0
    counted = confinement.counted()
    if not _works(counted, listen=True):
        counted, scratch = b"", ""  # nothing to count with: no threads, no files
    if not (landlock or namespaces):
        scratch = ""
    filter = confinement.allowed(writing=bool(scratch), threads=bool(counted))
    if not _works(filter):
        raise OSError("no system call filter")
    rules = confinement.ruleset(readable, scratch) if landlock else -1
    return Walls(filter, counted, rules, scratch)


def _works(filter, *, listen=False):
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(OSError):
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
            confinement.load(filter, listen=listen)
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _confine(request, output, control, walls):
    """Give up everything but `output` and `control`, before any of the program runs."""
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if walls.scratch:
        os.chdir(walls.scratch)
    if walls.rules >= 0:
        confinement.restrict(walls.rules)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(control, 100)
    for source, target in ((null, 0), (output, 1), (output, 2), (100, _CONTROL)):
        os.dup2(source, target)
    os.closerange(_CONTROL + 1, 65536)
    limits = {"AS": request["memory"], "CORE": 0, "NOFILE": 64, "MSGQUEUE": 0, "MEMLOCK": 0}
    limits["FSIZE"] = _FILE_SIZE if walls.scratch else 0
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"] + 1))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset: none left
    libc.capset(header, (ctypes.c_uint32 * 6)())
    files = []
    if walls.counted:
        files = [confinement.load(walls.counted, listen=True)]
    channel = socket.socket(fileno=_CONTROL)
    socket.send_fds(channel, [b"confined"], files)
    for file in files:
        os.close(file)
    confinement.load(walls.filter)
    if not request["checked"]:
        channel.close()
    return channel


def _run(request, output, control, walls):
    """In the fork: run the program, then its checks, and end. Its error is the last line said."""
    try:
        channel = _confine(request, output, control, walls)
    except BaseException:
        os._exit(99)
    status = 1
    try:
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        _execute(request["code"], main)
        if request["checked"]:
            password, checks = _checks(channel)
            _execute(checks, main)
            channel.send(password)
        status = 0
    except SystemExit:
        status = 0
    except BaseException as error:
        said = str(error).strip().splitlines()
        print(type(error).__name__ + (f": {said[-1]}" if said else ""))
    try:
        sys.stdout.flush()
    finally:
        os._exit(status)


def _execute(code, main):
    exec(compile(code, "<program>", "exec", dont_inherit=True), main.__dict__)


def _checks(channel):
    """Password and code of the checks, after the program's means to skip lines of it are gone."""

    def refuse(event, _):
        if event in ("sys.settrace", "sys.setprofile"):
            raise RuntimeError("no tracing while the checks run")

    sys.settrace(None)
    sys.setprofile(None)
    sys.addaudithook(refuse)
    channel.settimeout(None)
    channel.send(b"ready")
    length = int(_exactly(channel.recv, 10))
    message = _exactly(channel.recv, length)
    return message[:PASSWORD], message[PASSWORD:].decode()


def _exactly(read, n):
    data = b""
    while len(data) < n:
        more = read(n - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _message(file):
    """The next message of the sandbox's owner: bytes."""
    length = int(_exactly(lambda n: os.read(file, n), 10))
    return _exactly(lambda n: os.read(file, n), length)


def serve_one(request, walls, requests=0):
    """The reply to one request; when it is given, nothing of the program runs any more."""
    readable, output = os.pipe()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        _run(request, output, theirs.fileno(), walls)
    os.close(output)
    theirs.close()
    deadline = time.monotonic() + request["wall"]
    ours.settimeout(request["wall"])
    try:
        hello, listeners, *_ = socket.recv_fds(ours, 8, 1)
    except OSError:
        hello, listeners = b"", []
    watch = _Watch(readable, ours, listeners, request, requests)
    status = watch.until(deadline) if hello else ""
    exited = None if status else _wait(child, deadline)
    if exited is None:
        status = status or "time limit"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif not hello:
        status = "not confined"
    elif os.WIFSIGNALED(exited):
        status = "time limit" if os.WTERMSIG(exited) == signal.SIGXCPU else "crashed"
    else:
        status = "error" if os.WEXITSTATUS(exited) else "ok"
    for file in (readable, *listeners):
        os.close(file)
    ours.close()
    if watch.checks_left:
        _message(requests)
    return {
        "text": watch.text.decode("utf-8", "replace"),
        "status": status,
        "passed": status == "ok" and watch.said == b"ready" + watch.password,
        "clean": _emptied(walls.scratch),
    }


class _Watch:
    """What comes from a program while it runs, and what is answered to it."""

    def __init__(self, readable, control, listeners, request, requests):
        self.readable, self.control, self.requests = readable, control, requests
        self.listeners = list(listeners)
        self.limit, self.checks_left = request["output"], request["checked"]
        self.stops_at_limit = not request["checked"]  # a verdict does not hang on what is printed
        self.text = self.said = self.password = b""
        self.threads = self.files = 0

    def until(self, deadline):
        """Until all writers are gone: "". Otherwise the limit that was hit."""
        control = [self.control]
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self.readable, *control, *self.listeners], [], [], left)
            if self.listeners and self.listeners[0] in ready:
                self._answer()
            if self.control in ready and not self._hear():
                control = []
            if self.readable not in ready:
                continue
            chunk = os.read(self.readable, 65536)
            if not chunk:
                while control and select.select(control, [], [], 0)[0] and self._hear():
                    pass
                return ""
            self.text += chunk
            if len(self.text) > self.limit:
                self.text = self.text[: self.limit]
                if self.stops_at_limit:
                    return "output limit"
        return "time limit"

    def _hear(self):
        try:
            said = self.control.recv(64)
        except OSError:
            return False
        self.said = (self.said + said)[:64]
        if self.said == b"ready" and self.checks_left:
            self.checks_left = False
            checks = _message(self.requests)
            self.password = checks[:PASSWORD]
            with contextlib.suppress(OSError):  # it is gone, or does not read
                self.control.sendall(b"%10d" % len(checks) + checks)
        return bool(said)

    def _answer(self):
        """Grant a thread or a file, or say that there are enough."""
        asked = bytearray(80)
        listener = self.listeners[0]
        try:
            fcntl.ioctl(listener, _RECEIVE, asked)
        except OSError as error:
            if error.errno == errno.ENOENT:  # all who could ask are gone, or this one is
                self.listeners = [] if _hung_up(listener) else self.listeners
            return
        number, call = struct.unpack_from("Q", asked)[0], struct.unpack_from("i", asked, 16)[0]
        if confinement.starts_thread(call):
            self.threads += 1
            refused = errno.EAGAIN if self.threads > _MOST_THREADS else 0
        else:
            self.files += 1
            refused = errno.ENOSPC if self.files > _MOST_FILES else 0
        answer = struct.pack("QqiI", number, 0, -refused, 0 if refused else _CONTINUE)
        with contextlib.suppress(OSError):  # it was killed meanwhile
            fcntl.ioctl(listener, _SEND, bytearray(answer))


def _hung_up(file):
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _wait(child, deadline):
    """Its exit status, or None if it goes on to the deadline without any output."""
    while time.monotonic() < deadline:
        pid, exited = os.waitpid(child, os.WNOHANG)
        if pid:
            return exited
        time.sleep(0.001)
    return None


def _emptied(folder):
    """Whether the folder holds nothing for the next program to find."""
    if not folder or not os.listdir(folder):
        return True
    for at, folders, _ in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(at, name), 0o700)  # before it is entered
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
    return not os.listdir(folder)


def main(settings):
    """settings: JSON, {"readable": folders, "scratch": folder, "namespaces": whether}."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as process 1 of a namespace, then deaf to it
    for program in _WARM_UP:
        with contextlib.suppress(ImportError):
            exec(program, {})
    gc.freeze()  # the forks then share these pages for longer
    sys.argv[:] = ["program"]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    behind = walls(**json.loads(settings))
    hello = {"landlock": behind.rules >= 0, "scratch": bool(behind.scratch)}
    print(json.dumps(hello), file=replies, flush=True)
    while True:
        try:
            request = json.loads(_message(0))
        except EOFError:
            return
        print(json.dumps(serve_one(request, behind)), file=replies, flush=True)
