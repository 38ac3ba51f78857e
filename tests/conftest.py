"""Set before JAX starts: eight virtual CPU devices, strict rules, each program compiled once; and
Ctrl-C, which the background jobs of a shell are told to ignore, but not the runs that tests start.
"""

import atexit
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if not {"JAX_COMPILATION_CACHE_DIR", "PYTEST_XDIST_WORKER"} & set(os.environ):
    # Tests, and the commands that they start, compile many programs again and again. They keep them
    # as commands do, in a folder of this run of pytest: from one of JAX's own choosing XLA prints
    # errors beside what commands say, on CPUs with AVX-512 (aim_flax/compile_cache.py).
    cache = tempfile.mkdtemp(prefix="aim_flax_tests_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = cache

import jax
import pytest

from aim_flax import compile_cache

signal.signal(signal.SIGINT, signal.default_int_handler)
# With few cores, several steps with collectives in flight wait for each other without end.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
compile_cache.enable()


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles without XLA's optimisations: several times faster, for tests of tiny programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def standard_promotion():
    """For what uses optax's Adam or bfloat16 batch norms, which promote dtypes implicitly."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
