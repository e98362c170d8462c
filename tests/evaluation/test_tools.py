"""The sandbox holds against attacks, is fast for ordinary programs; the loop of text and tools."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from rho1_jax.errors import InputError
from rho1_jax.evaluation import tools
from rho1_jax.evaluation.tools import Limits, Ran, Sandbox, solve

LIMITS = Limits(cpu=1, wall=1.5, memory=2**30, output=1000)
WAYS = ("bwrap", "unshare", "")  # namespaces by either tool, or the system call filter alone


def only(way):
    """The one command of this way to start the sandbox."""
    return lambda root, all_of_them=tools._commands: (c for c in all_of_them(root) if c[0] == way)


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way or "seccomp alone")
def sandbox(request):
    if request.param and not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    with pytest.MonkeyPatch.context() as patch, Sandbox(LIMITS) as sandbox:
        patch.setenv("SECRET", "open sesame")
        patch.setattr(tools, "_commands", only(request.param))
        try:
            sandbox.run("")
        except InputError:
            pytest.skip(f"this system does not let {request.param or 'seccomp'} work")
        yield sandbox


@pytest.fixture
def namespaces(sandbox):
    if "seccomp" in sandbox.isolation[:1]:
        pytest.skip("without namespaces this is not promised")
    return sandbox


def test_it_says_what_isolates(sandbox):
    assert "seccomp" in sandbox.isolation


def test_output_and_errors(sandbox):
    assert sandbox.run("print(6 * 7)") == Ran("42\n", "ok")
    ran = sandbox.run("print('so far')\n1 / 0")
    assert ran == Ran("so far\nZeroDivisionError: division by zero\n", "error")
    assert sandbox.run("x = (").text.startswith("SyntaxError")
    assert sandbox.run("import sys; print('gone'); sys.exit(3)") == Ran("gone\n", "ok")
    assert sandbox.run("").text == ""


def test_programs_share_nothing(sandbox):
    sandbox.run("import math; math.pi = 3; leftover = 1")
    assert sandbox.run("import math; print(math.pi > 3, 'leftover' in globals())").text == (
        "True False\n"
    )


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


@pytest.mark.parametrize("attack", BLOCKED)
def test_attack_fails(sandbox, attack, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        code = BLOCKED[attack].replace("FOLDER", str(tmp_path)).replace("PORT", port)
        ran = sandbox.run(code)
    assert "pwned" not in ran.text, ran
    assert file.read_text() == "precious"
    assert os.listdir(tmp_path) == ["file"]
    assert sandbox.run("print('alive')") == Ran("alive\n", "ok")


@pytest.mark.parametrize("attack", HANGING)
def test_nothing_hangs(sandbox, attack):
    start = time.monotonic()
    ran = sandbox.run(HANGING[attack])
    assert time.monotonic() - start < LIMITS.wall + 2.0
    assert ran.status != "ok"
    assert len(ran.text) <= LIMITS.output
    assert sandbox.run("print('alive')") == Ran("alive\n", "ok")


@pytest.mark.parametrize("crash", ["import os; os.abort()", "import ctypes; ctypes.string_at(0)"])
def test_a_crash_is_reported(sandbox, crash):
    assert sandbox.run(crash).status == "crashed"
    assert sandbox.run("print('alive')").text == "alive\n"


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/proc/1/environ", __file__])
def test_files_are_not_there(namespaces, path):
    ran = namespaces.run(f"print('pwned', open({path!r}).read())")
    assert "pwned" not in ran.text
    assert ran.status == "error"


def test_only_python_is_there(namespaces):
    top = namespaces.run("import os; print(*os.listdir('/'))").text.split()
    assert not {"etc", "proc", "home", "var", "work"} & set(top)
    assert str(Path(__file__).parents[2]) not in tools._readable_folders()


def test_nothing_runs_unconfined(monkeypatch):
    commands = list(tools._commands("/"))
    broken = [(name, ["false"]) for name, _ in commands]
    monkeypatch.setattr(tools, "_commands", lambda _: iter(broken))
    with Sandbox() as sandbox, pytest.raises(InputError, match="install bubblewrap"):
        sandbox.run("print(1)")


def test_a_sandbox_that_died_is_started_again(sandbox):
    sandbox._server.kill()
    sandbox._server.wait()
    assert sandbox.run("print(1)").status == "crashed"
    assert sandbox.run("print(1)") == Ran("1\n", "ok")


@pytest.mark.slow
def test_a_thousand_ordinary_programs():
    """Twenty a second on two cores."""
    kinds = (
        ("def f():\n    return {i} * 12 - 5\n\nprint(f())", "{}", lambda i: 12 * i - 5),
        ("from sympy import *\nx = symbols('x')\nprint(solve(x - {i}, x))", "[{}]", lambda i: i),
        ("import math\nprint(math.comb({i} + 2, 2))", "{}", lambda i: (i + 2) * (i + 1) // 2),
        ("import numpy as np\nprint(np.arange({i} + 1).sum())", "{}", lambda i: i * (i + 1) // 2),
    )  # fmt: skip
    with Sandbox() as sandbox:
        sandbox.run("")
        start = time.monotonic()
        for i in range(1000):
            code, text, value = kinds[i % 4]
            assert sandbox.run(code.format(i=i)) == Ran(text.format(value(i)) + "\n", "ok")
        assert 1000 / (time.monotonic() - start) >= 20


def test_solve_runs_programs_and_goes_on():
    seen = []
    replies = {
        "Q1": ["Think.\n```python\nprint(2)\n```\n", r"So $\boxed{2}$."],
        "Q2": [r"At once: \boxed{7}"],
    }

    def generate(texts):
        seen.append(texts)
        return [replies[text[:2]].pop(0) for text in texts]

    out = solve(["Q1", "Q2"], generate, lambda code: Ran(code.upper(), "ok"))
    assert out == [
        "Think.\n```python\nprint(2)\n```\n```output\nPRINT(2)\n```\nSo $\\boxed{2}$.",
        r"At once: \boxed{7}",
    ]
    assert [len(texts) for texts in seen] == [2, 1]


def test_solve_stops_after_four_calls():
    calls = []
    block = "```python\nprint(1)\n```"

    def run(code):
        calls.append(code)
        return Ran("```\nescape", "time limit")

    (text,) = solve(["Q"], lambda texts: [block] * len(texts), run)
    assert len(calls) == 4
    assert text.count("```python") == 5
    assert "'''\nescape\n(time limit)\n```" in text
