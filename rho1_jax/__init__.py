"""Selective Language Modeling (Rho-1, arXiv 2404.07965) in JAX."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # PCI vendor
_OF_A_VIRTUAL_MACHINE = ("0x01", "0x02")  # PCI classes: its disk, its network card


def _may_have_tpu(root: Path = Path("/")) -> bool:
    """Whether a device of this machine may be a TPU, of whatever generation."""
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    for device in root.glob("sys/bus/pci/devices/*"):
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        if vendor == _GOOGLE and not kind.startswith(_OF_A_VIRTUAL_MACHINE):
            return True
    return False


def _keep_libtpu_quiet() -> None:
    """Without a TPU, JAX still asks an installed libtpu for one, which prints ten lines of errors.

    Where the CPU is all that is left for JAX to find, it is told to look for nothing else.
    """
    said = (
        "JAX_PLATFORMS",
        "JAX_FORCE_TPU_INIT",
        "TPU_LIBRARY_PATH",
        "PJRT_NAMES_AND_LIBRARY_PATHS",
    )
    if any(name in os.environ for name in said) or not importlib.util.find_spec("libtpu"):
        return
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    )
    if not plugins and not _may_have_tpu():
        os.environ["JAX_PLATFORMS"] = "cpu"


_keep_libtpu_quiet()
