"""Programs for the sandbox: what must be refused, what must end, what must pass, what cheats."""

import os

# Each prints "pwned" if it gets what it wants.
BLOCKED = {
    "fork bomb": "import os\nwhile True: os.fork()\nprint('pwned')",
    "fork": "import os\nprint('pwned' if os.fork() >= 0 else '')",
    "subprocess": "import subprocess\nprint('pwned', subprocess.run(['/bin/sh', '-c', 'id']))",
    "system": "import os\nprint('pwned' if os.system('exit 0') == 0 else '')",
    "exec": "import os\nos.execv('/bin/echo', ['echo', 'pwned'])",
    "multiprocessing": "import multiprocessing as m\np = m.Process(target=print, args=['pwned'])\n"
    "p.start(); p.join()",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(10**7))\nprint('pwned')",
    "one giant": "x = 'x' * 10**12\nprint('pwned')",
    "tcp": "import socket\ns = socket.create_connection(('127.0.0.1', PORT), 2)\nprint('pwned')",
    "udp": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', PORT))\nprint('pwned')",
    "unix": "import socket\nsocket.socket(socket.AF_UNIX)\nprint('pwned')",
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nprint('pwned')",
    "kill everyone": "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('pwned')",
    "write": "open('FOLDER/new', 'w').write('x')\nprint('pwned')",
    "append": "open('FOLDER/file', 'a').write('x')\nprint('pwned')",
    "truncate": "import os\nos.open('FOLDER/file', os.O_RDONLY | os.O_TRUNC)\nprint('pwned')",
    "delete": "import os\nos.remove('FOLDER/file')\nprint('pwned')",
    "delete a tree": "import shutil\nshutil.rmtree('FOLDER')\nprint('pwned')",
    "write into python": "import os\nopen(os.__file__, 'a').write('x')\nprint('pwned')",
    "delete from python": "import os\nos.remove(os.__file__)\nprint('pwned')",
    "environment": "import os\nassert 'sesame' in str(os.environ)\nprint('pwned')",
    "descriptors": "import os\nfor fd in range(3, 4096):\n  try: os.fstat(fd); print('pwned', fd)\n"
    "  except OSError: pass",
    "read its input": "import sys\nassert sys.stdin.read()\nprint('pwned')",
    "own input again": "import os\nassert os.read(0, 10)\nprint('pwned')",
    "ctypes fork": "import ctypes\nprint('pwned' if ctypes.CDLL(None).fork() >= 0 else '')",
    "ctypes raw fork": "import ctypes\nr = ctypes.CDLL(None).syscall(57)\n"
    "print('pwned' if r >= 0 else '')",
    "ctypes system": "import ctypes\n"
    "print('pwned' if ctypes.CDLL(None).system(b'true') == 0 else '')",
    "ctypes io_uring": "import ctypes\nprint('pwned' if ctypes.CDLL(None).syscall(425, 1, "
    "ctypes.create_string_buffer(200)) >= 0 else '')",
    "ctypes unshare": "import ctypes\nprint('pwned' if ctypes.CDLL(None).unshare(0x10000000) == 0 "
    "else '')",
    "ctypes no filter": "import ctypes\nprint('pwned' if ctypes.CDLL(None).prctl(22, 0, 0) == 0 "
    "else '')",
    "more memory": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))\nprint('pwned')",
    "import again": "import importlib, os, sys\nfor m in ('os', 'posix', 'subprocess'): "
    "sys.modules.pop(m, None)\nimport posix\nprint('pwned' if posix.fork() >= 0 else '')",
    "reload": "import importlib, socket\nimportlib.reload(socket).socket()\nprint('pwned')",
    "builtins": "import builtins\nbuiltins.open('FOLDER/new', 'x')\nprint('pwned')",
    "the server's objects": "import sys\nm = sys._getframe(1).f_globals\nm['json'].dump({}, "
    "sys._getframe(3).f_locals['replies'])\nsys._getframe(3).f_locals['replies'].flush()\n"
    "print('pwned')",
}  # fmt: skip

HANGING = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "no output, then sleep": "import os, time; os.close(1); os.close(2); time.sleep(1000)",
    "deaf to signals": "import signal\nfor s in range(1, 32):\n  try: signal.signal(s, print)\n"
    "  except OSError: pass\nwhile True: pass",
    "uninterruptible": "10 ** 10 ** 10",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, "
    "args=[1000]).start()",
    "infinite output": "while True: print('x' * 1000)",
    "infinite errors": "import sys\nwhile True: sys.stderr.write('x' * 1000)",
}

BLOCKED |= {
    "limits of the parent": "import os, resource as r\n"
    "r.prlimit(os.getppid(), r.RLIMIT_AS, (2**28, 2**28))\nprint('pwned')",
    "owner of a pipe's signal": "import os, fcntl\na, b = os.pipe()\n"
    "fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())\nprint('pwned')",
    "signal of a pipe": "import os, fcntl\na, b = os.pipe()\nfcntl.fcntl(a, 10, 9)\nprint('pwned')",
    "affinity": "import os\nos.sched_setaffinity(os.getppid(), {0})\nprint('pwned')",
    "times of a file": "import os\nos.utime('FOLDER/file', (1, 1))\nprint('pwned')",
    "attributes": "import os\nos.removexattr('FOLDER/file', 'user.x')\nprint('pwned')",
}  # fmt: skip

RIGHT = {
    "tempfile": "import tempfile\nwith tempfile.NamedTemporaryFile('w') as f: f.write('x')",
    "asyncio": "import asyncio\nasyncio.run(asyncio.sleep(0))",
    "null": "open('/dev/null', 'w').write('x')",
    "pickle": "from __future__ import annotations\nimport pickle\nclass A: pass\n"
    "pickle.loads(pickle.dumps(A()))",
}  # fmt: skip

# By number, as a program without a C library would: of this machine's kind.
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine, 0)
NUMBER = {
    "prlimit64": (302, 261), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "utimensat": (280, 88), "fsetxattr": (190, 7),
}  # fmt: skip
SYSCALL = (
    "import ctypes, os, struct\nlibc = ctypes.CDLL(None)\n"
    "print('pwned' if libc.syscall({number}, {arguments}) == 0 else '')"
)


def by_number(name, arguments):
    return SYSCALL.format(number=NUMBER[name][_COLUMN], arguments=arguments)


BLOCKED |= {
    "time of the parent": "import os, resource as r\n"
    "r.prlimit(os.getppid(), r.RLIMIT_CPU, (10**6, -1))\nprint('pwned')",
    "time of another": "import resource as r\nr.prlimit(OWNER, r.RLIMIT_CPU, (10**6, -1))\n"
    "print('pwned')",
    "time of another, by number": by_number(
        "prlimit64", "OWNER, 0, struct.pack('QQ', 10**6, 2**64 - 1), None"),
    "scheduler": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_BATCH, "
    "os.sched_param(0))\nprint('pwned')",
    "scheduler of another": by_number(
        "sched_setattr", "OWNER, struct.pack('IIQiIQQQ', 48, 3, 0, 0, 0, 0, 0, 0), 0"),
    "its own scheduler": by_number(
        "sched_setattr", "0, struct.pack('IIQiIQQQ', 48, 3, 0, 0, 0, 0, 0, 0), 0"),
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\nprint('pwned')",
    "priority of its disk": by_number("ioprio_set", "1, OWNER, 3 << 13"),
    "its own priority of the disk": by_number("ioprio_set", "1, 0, 3 << 13"),
    "times by a descriptor": "import os\nos.utime(os.open('FOLDER/file', os.O_RDONLY), (1, 1))\n"
    "print('pwned')",
    "times by number": by_number("utimensat", "-100, b'FOLDER/file', None, 0"),
    "times of its own file": "import os\nopen('own', 'w')\nos.utime('own', (1, 1))\n"
    "print('pwned')",
    "mode": "import os\nos.chmod('FOLDER/file', 0o777)\nprint('pwned')",
    "mode of its own file": "import os\nopen('own', 'w')\nos.chmod('own', 0o4777)\nprint('pwned')",
    "new attributes": "import os\nos.setxattr('FOLDER/file', 'user.x', b'x')\nprint('pwned')",
    "attributes of its own file": by_number(
        "fsetxattr", "os.open('own', os.O_RDWR | os.O_CREAT), b'user.x', b'x', 1, 0"),
    "flags of a file": "import fcntl, os, struct\nfd = os.open('FOLDER/file', os.O_RDONLY)\n"
    "fcntl.ioctl(fd, 0x40086602, struct.pack('q', 0x80))\nprint('pwned')",
    "flags of its own file": "import fcntl, os, struct\n"
    "fd = os.open('own', os.O_RDWR | os.O_CREAT)\n"
    "fcntl.ioctl(fd, 0x40086602, struct.pack('q', 0))\nprint('pwned')",
    "a link": "import os\nos.symlink('FOLDER/file', 'link')\nprint('pwned')",
    "a hard link": "import os\nos.link('FOLDER/file', 'link')\nprint('pwned')",
    "a pipe in the folder": "import os\nos.mkfifo('pipe')\nprint('pwned')",
}  # fmt: skip

EQUAL = "class Equal:\n  def __eq__(self, other): return True\n  __lt__ = __contains__ = __eq__\n" \
    "  def __abs__(self): return self\n  def __sub__(self, other): return self\n"  # fmt: skip
CHEATS = {
    "equal to everything": (EQUAL + "def f(x): return Equal()", "assert f(1) == 2"),
    "in a list": (EQUAL + "def f(x): return [Equal()]", "def check(g):\n  assert g(1) == [-2]\n"
                  "check(f)"),
    "on the right": (EQUAL + "def f(x): return Equal()", "assert 2 == f(1)"),
    "after one right answer": (EQUAL + "def f(x): return 1 if x == 1 else Equal()",
                               "assert f(1) == 1\nassert f(2) == []"),
    "near everything": (EQUAL + "def f(x): return Equal()", "assert abs(f(1) - 2.5) < 1e-6"),
    "a stand-in of the library": ("from unittest.mock import ANY\ndef f(x): return ANY",
                                  "assert f(1) == 2"),
    "its own verdict": ("import os\nos.write(3, b'readypassed')\nos._exit(0)", "assert False"),
    "its own verdict, later": ("import os\ndef f(x): os.write(3, b'passed'); os._exit(0)",
                               "assert f(1) == 2"),
    "no checks": ("import os\nos._exit(0)", "assert False"),
}  # fmt: skip

HONEST = """
def f(x): return x
def check(g):
    assert g(1) == 1, "one"
    assert g([]) == []
    assert g({"a": (1, -2.5)}) == {"a": (1, -2.5)}
    assert g(2) != 3
    assert not g(2) == 3
    assert g(True)
    assert True, "true"
    assert abs(g(0.1) - 0.1) < 1e-6
    assert 1 < g(2) < 3
    assert g("b") in ("a", "b")
    assert 5 == g(5)
    assert g(None) is None
    assert g(0) == min(g(0), 1)
    try:
        g(1, 2)
        assert False
    except TypeError:
        pass
check(f)
"""
