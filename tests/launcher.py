"""Several processes of main on this machine, as if each were a host: gloo over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(n_devices: int, **more: str) -> dict[str, str]:
    """A plain machine with that many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more


def start(n: int, *args: str, n_devices: int = 1) -> list[subprocess.Popen]:
    """main in n processes of n_devices each; several are told how to find each other."""
    command = [sys.executable, "-m", "rho1_jax.main", *args]
    if n == 1:
        return [_process(command, environment(n_devices))]
    command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={n}"]
    return [_process([*command, f"--process_id={i}"], environment(n_devices)) for i in range(n)]


def _process(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        found.append((process.returncode, out, err))
    return found
