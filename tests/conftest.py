"""Every test runs under the strictest JAX there is: 8 CPU devices, no silent dtype or rank promotion, no warnings.

Most of the suite's time is XLA compiling small programs, so tests compile at the lowest optimisation level and share a
cache of compiled programs for the session's lifetime.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# pytest-xdist's workers share the session's folder; alone, the process has its own.
_programs = os.path.join(
    tempfile.gettempdir(), f"unlearnjax-tests-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
)
jax.config.update("jax_compilation_cache_dir", _programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def key():
    return jax.random.key(0)
