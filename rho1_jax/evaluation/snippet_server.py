"""What runs inside the sandbox (tools.py starts it): each request is a program, run in a fork.

Only the standard library: none of this package is visible in there. The fork has libraries loaded
already, so that a program takes milliseconds, and shares no open file with anything but its output.
One JSON line in, {"code", "cpu", "wall", "memory", "output"}; one out, {"text", "status"}.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time

_CLONE_THREAD = 0x10000
_MASKED_EQUAL = 7  # the argument, masked, is the value
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
_DENIED = """fork vfork execve execveat kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
pidfd_open pidfd_send_signal pidfd_getfd ptrace process_vm_readv process_vm_writev socket socketpair
memfd_create memfd_secret shmget msgget semget mq_open mount umount2 pivot_root chroot unshare setns
open_tree move_mount fsopen mount_setattr bpf perf_event_open userfaultfd io_uring_setup keyctl
add_key request_key personality init_module finit_module kexec_load open_by_handle_at reboot
sched_setscheduler setpriority unlink unlinkat rename renameat renameat2 truncate creat mkdir
mkdirat mknod mknodat rmdir link linkat symlink symlinkat chmod fchmod fchmodat fchmodat2 chown
fchown fchownat lchown setxattr lsetxattr fsetxattr utimensat"""
_WRITING = ((3, 1), (3, 2), (os.O_CREAT, os.O_CREAT), (os.O_TRUNC, os.O_TRUNC))  # mask, flags


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


class _Argument(ctypes.Structure):
    _fields_ = [
        ("number", ctypes.c_uint),
        ("comparison", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


def system_call_filter():
    """A libseccomp filter and the library: no processes, signals, sockets, changes to files.

    None where the library is absent.
    """
    try:
        lib = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError:
        return None
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(_ALLOW)))

    def deny(name, action=_EPERM, arguments=()):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # a call that this library does not know, or this machine has not
            return
        array = (_Argument * max(len(arguments), 1))(*arguments)
        code = lib.seccomp_rule_add_array(
            context, ctypes.c_uint32(action), number, ctypes.c_uint(len(arguments)), array
        )
        if code:
            raise OSError(-code, f"seccomp rule for {name}")

    for name in _DENIED.split():
        deny(name)
    for mask, flags in _WRITING:
        deny("open", arguments=[_Argument(1, _MASKED_EQUAL, mask, flags)])
        deny("openat", arguments=[_Argument(2, _MASKED_EQUAL, mask, flags)])
    for name in ("openat2", "clone3"):  # their flags lie in memory; the C library has older ones
        deny(name, _ENOSYS)
    deny("clone", arguments=[_Argument(0, _MASKED_EQUAL, _CLONE_THREAD, 0)])  # threads may be
    return lib, context


def _confine(request, output, seccomp):
    """Give up everything but `output` in a new process, before any of the program runs."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 65536)
    limits = {"AS": request["memory"], "FSIZE": 0, "CORE": 0, "NOFILE": 64}
    if seccomp is None:
        limits["NPROC"] = 0
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"] + 1))
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset: none left
    libc.capset(header, (ctypes.c_uint32 * 6)())
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if seccomp is not None and seccomp[0].seccomp_load(seccomp[1]):
        os._exit(99)


def _run(request, output, seccomp):
    """In the fork: run the program and end. Its error is the last line of its output."""
    status = 1
    try:
        _confine(request, output, seccomp)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
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


def serve_one(request, seccomp):
    """The reply to one request; when it is given, nothing of the program runs any more."""
    readable, output = os.pipe()
    child = os.fork()
    if child == 0:
        _run(request, output, seccomp)
    os.close(output)
    deadline = time.monotonic() + request["wall"]
    text, status = _collect(readable, deadline, request["output"])
    exited = None if status else _wait(child, deadline)
    if exited is None:
        status = status or "time limit"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif os.WIFSIGNALED(exited):
        status = "time limit" if os.WTERMSIG(exited) == signal.SIGXCPU else "crashed"
    else:
        status = {0: "ok", 99: "not confined"}.get(os.WEXITSTATUS(exited), "error")
    os.close(readable)
    return {"text": text.decode("utf-8", "replace"), "status": status}


def _collect(readable, deadline, limit):
    """(what comes until all writers are gone, "") or (what came, the limit that was hit)."""
    text = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([readable], [], [], left)[0]:
            break
        chunk = os.read(readable, 65536)
        if not chunk:
            return text, ""
        text += chunk
        if len(text) > limit:
            return text[:limit], "output limit"
    return text, "time limit"


def _wait(child, deadline):
    """Its exit status, or None if it goes on to the deadline without any output."""
    while time.monotonic() < deadline:
        pid, exited = os.waitpid(child, os.WNOHANG)
        if pid:
            return exited
        time.sleep(0.001)
    return None


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as process 1 of a namespace, then deaf to it
    for program in _WARM_UP:
        with contextlib.suppress(ImportError):
            exec(program, {})
    gc.freeze()  # the forks then share these pages for longer
    seccomp = system_call_filter()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(
        json.dumps({"pid": os.getpid(), "seccomp": seccomp is not None}), file=replies, flush=True
    )
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line), seccomp)), file=replies, flush=True)


if __name__ == "__main__":
    main()
