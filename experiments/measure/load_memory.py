"""Host memory while a Hugging Face folder is loaded straight into its shards.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    MALLOC_MMAP_THRESHOLD_=1000000 python -m experiments.measure.load_memory --layers=6

Writes a folder with Mistral-7B's matrices (bfloat16, `--layers` of its 32 layers) to a temporary
place, loads it over a mesh of all devices (fsdp), and prints the process's anonymous memory: after
loading, at the peak, and the difference, beside the largest stored matrix.
"""

import functools
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rho1_jax import command_line, jsonfile
from rho1_jax.models import presets
from rho1_jax.models.formats import hf_config, huggingface, weights
from rho1_jax.training import sharding


def main(argv: Sequence[str]) -> None:
    layers = command_line.parse(argv, {"layers": 4}).layers
    config = presets.get("mistral-7b", n_layers=layers)
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    place = functools.partial(sharding.parameter_shardings, mesh=mesh)
    jnp.zeros(8).block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), config)
        before = anonymous()
        peak, stop = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(peak, stop))
        watcher.start()
        params, _ = huggingface.load(Path(folder), place)
        jax.block_until_ready(params)
        stop.set()
        watcher.join()
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    largest = 4 * max(np.prod(shape) for *_, shape in weights.stored_shapes(config))
    print(f"parameters {held / 1e6:.0f} MB on {mesh.size} devices")
    print(f"after loading {(anonymous() - before) / 1e6:.0f} MB, at the peak "
          f"{(peak[0] - before) / 1e6:.0f} MB")  # fmt: skip
    print(f"beyond the parameters {(peak[0] - before - held) / 1e6:.0f} MB; the largest matrix has "
          f"{largest / 1e6:.0f} MB as float32")  # fmt: skip


def write(folder: Path, config) -> None:
    index = {}
    for i, (name, layer, shape) in enumerate(weights.stored_shapes(config)):
        stored = huggingface.stored_name(name, layer)
        index[stored] = f"{i}.safetensors"
        save_file({stored: np.zeros(shape, ml_dtypes.bfloat16)}, folder / index[stored])
    jsonfile.write(folder / huggingface.INDEX_FILE, {"weight_map": index})
    jsonfile.write(folder / "config.json", hf_config.describe(config))


def watch(peak: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)


def anonymous() -> int:
    """Bytes of memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv, __doc__))
