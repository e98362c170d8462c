"""Eight simulated devices and checked shapes: both must be set before anything imports jax."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# In order: simulated devices are threads, and on busy cores they could come to two independent
# collectives in another order each, and wait for each other until XLA ends the process.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    # Compiling is most of what tests do, and their programs are small: a third less time. What a
    # user runs, and what is measured, is compiled as users compile it, in a process of its own.
    "--xla_backend_optimization_level=0",
)
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Tests and their subprocesses compile the same small programs over and over.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook  # noqa: E402

# Every jaxtyping annotation of the package is checked at run time while the tests run.
install_import_hook("rho1_jax", "beartype.beartype")

import pytest  # noqa: E402

from tests import tiny_config  # noqa: E402


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The folder of text that tests/tiny_config.py reads."""
    return tiny_config.write_texts(tmp_path_factory.mktemp("text"))
