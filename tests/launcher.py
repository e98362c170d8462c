"""Several processes of main on this machine, as if each were a host: gloo over loopback."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# What the clock says of a step.
MEASURED = ("seconds", "tokens_per_second", "matmul_utilization", "input_wait")


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(n_devices: int) -> dict[str, str]:
    """A plain machine with that many CPU devices, and a compiler that does not take long."""
    flags = (
        f"--xla_force_host_platform_device_count={n_devices}",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # as in conftest.py
    )
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def start(n: int, *args: str, n_devices: int = 1) -> list[subprocess.Popen]:
    """main in n processes of n_devices each; several are told how to find each other."""
    command = [sys.executable, "-m", "rho1_jax.main", *args]
    if n == 1:
        return [_process(command, n_devices)]
    command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={n}"]
    return [_process([*command, f"--process_id={i}"], n_devices) for i in range(n)]


def ended(processes: list[subprocess.Popen], timeout: float = 300) -> list[Ended]:
    """What came of each; none outlives this."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *s) for p, s in zip(processes, said, strict=True)]


def signal_when(
    processes: list[subprocess.Popen], which: int, signum: signal.Signals, happened: Callable
) -> None:
    """Send one process a signal as soon as `happened()`; fails if any ends first."""
    deadline = time.monotonic() + 200
    while not happened():
        if any(p.poll() is not None for p in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            raise AssertionError(ended(processes))
        time.sleep(0.01)
    processes[which].send_signal(signum)


def table(path: Path) -> list[dict[str, str]]:
    """The lines of a run's CSV, but for what the clock says."""
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _process(command: list[str], n_devices: int) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(n_devices), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
