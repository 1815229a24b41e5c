"""Every test runs under the strictest JAX there is: 8 CPU devices, no silent dtype or rank promotion, no warnings.

Most of the suite's time is XLA compiling small programs, so tests compile at the lowest optimisation level, with the
emitters that compile fastest, and keep their compiled programs in .pytest_cache, for each other and for the next run.
"""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

# A shell's background jobs ignore Ctrl-C, and their children with them: tests of what it does would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads spin while they wait, and two test workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_programs = Path(__file__).parent.parent / ".pytest_cache" / "programs"
jax.config.update("jax_compilation_cache_dir", str(_programs))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# These halve the time of what this process compiles. What does not know them aborts: TPUs' compiler, other versions.
_flags = os.environ["XLA_FLAGS"]
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
jax.devices()  # reads them
os.environ["XLA_FLAGS"] = _flags


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
    """Each compiled program is several memory mappings, and thousands of them can exceed Linux's vm.max_map_count: the
    process dies in the middle of whatever compiles next."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)
