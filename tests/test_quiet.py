"""A machine without a TPU is not told so ten times, and a TPU is never hidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rho1_jax

ROOT = Path(__file__).parents[1]


def run(code, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_nothing_is_printed_before_the_first_word():
    if rho1_jax._may_have_tpu():
        pytest.skip("this machine may have a TPU")
    said = run("import rho1_jax, jax; print(len(jax.devices()))")
    assert (said.stdout.strip().isdigit(), said.stderr) == (True, "")


def test_what_the_user_says_is_kept():
    code = "import os, rho1_jax; print(os.environ.get('JAX_PLATFORMS'))"
    assert run(code, JAX_PLATFORMS="tpu").stdout == "tpu\n"
    assert run(code, JAX_FORCE_TPU_INIT="1").stdout == "None\n"


def pci(root, vendor, kind):
    device = root / "sys/bus/pci/devices/0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x1ae0", "0xff0000", True),
        ("0x1ae0", "0x120000", True),
        ("0x1ae0", "0x020000", False),  # the network card of a virtual machine without TPU
        ("0x10de", "0x030000", False),
    ],
)
def test_which_devices_may_be_a_tpu(tmp_path, vendor, kind, expected):
    assert not rho1_jax._may_have_tpu(tmp_path)
    pci(tmp_path, vendor, kind)
    assert rho1_jax._may_have_tpu(tmp_path) == expected


@pytest.mark.parametrize("name", ["dev/accel0", "dev/vfio/0"])
def test_a_device_file_may_be_a_tpu(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert rho1_jax._may_have_tpu(tmp_path)
