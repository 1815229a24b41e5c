"""What every kernel is held to, on every back end: numpy's result, alone, mapped and on shards; and that its Pallas
kernel compiles for TPUs that are not here."""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

BACKENDS = ("xla", "pallas_interpret")
DTYPES = ("float32", "bfloat16")


@functools.cache
def v5e() -> list[Any]:
    """Eight chips of TPU v5e that programs can be compiled for."""
    library = Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"  # where `make test` puts it
    if library.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
    elif importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two test workers, and no TPU to share
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)


class KernelTestBase:
    """Subclasses say what the kernel is called with; the tests are here."""

    shapes: ClassVar[dict[str, Any]]
    shard_shape: ClassVar[tuple[int, ...]]
    """A shape whose `shard_axis` is cut in eight."""
    shard_axis: ClassVar[int] = -1
    reduces = False
    """Whether the result is a sum over the shards (else the shards' results make up the whole)."""
    tolerance = 0.0

    def arguments(self, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, ...]:
        """The data, then whatever else the kernel takes."""
        raise NotImplementedError

    def call(self, implementation: str, data: Any, *rest: Any) -> jax.Array:
        raise NotImplementedError

    def at_shard(self, rest: tuple[Any, ...], axis: str, size: int) -> tuple[Any, ...]:
        """`rest` for a shard with `size` entries, inside shard_map."""
        return rest

    def close(self, found: Any, expected: Any) -> None:
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=self.tolerance)

    @pytest.fixture
    def no_cached_programs(self):
        """A program for a device that is not there can be kept, but not read back."""
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()

    @pytest.fixture(params=BACKENDS)
    def implementation(self, request):
        return request.param

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_numpy(self, implementation, dtype):
        for shape in self.shapes.values():
            arguments = self.arguments(shape, dtype)
            found = jax.jit(functools.partial(self.call, implementation))(*map(jnp.asarray, arguments))
            self.close(found, self.call("reference", *arguments))

    def test_mapped_equals_each_alone(self, implementation):
        several = [self.arguments(self.shard_shape, "float32") for _ in range(2)]
        several[1] = (several[1][0][..., ::-1].copy(), *several[1][1:])
        stacked = [jnp.stack(parts) for parts in zip(*several, strict=True)]
        found = jax.jit(jax.vmap(functools.partial(self.call, implementation)))(*stacked)
        for one, arguments in zip(found, several, strict=True):
            self.close(one, self.call("reference", *arguments))

    def test_shards_equal_the_whole(self, implementation):
        arguments = self.arguments(self.shard_shape, "float32")
        program = self.sharded(implementation, Mesh(np.array(jax.devices()), "d"))
        self.close(jax.jit(program)(*map(jnp.asarray, arguments)), self.call("reference", *arguments))

    def sharded(self, implementation: str, mesh: Mesh) -> Any:
        axes: list[str | None] = [None] * len(self.shard_shape)
        axes[self.shard_axis] = "d"

        def local(data: jax.Array, *rest: Any) -> jax.Array:
            found = self.call(implementation, data, *self.at_shard(rest, "d", data.size))
            return jax.lax.psum(found, "d") if self.reduces else found

        result = PartitionSpec() if self.reduces else PartitionSpec(*axes[-self.rank_of_result() :])
        number = len(self.arguments(self.shard_shape, "float32"))
        specs = (PartitionSpec(*axes), *[PartitionSpec()] * (number - 1))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)

    def rank_of_result(self) -> int:
        return len(self.shard_shape) - 1

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("how", ["alone", "mapped", "sharded"])
    @pytest.mark.usefixtures("no_cached_programs")
    def test_compiles_for_v5e(self, how, dtype):
        devices = v5e()
        lead = (2,) if how == "mapped" else ()
        arguments = self.arguments(self.shard_shape, dtype)
        call = functools.partial(self.call, "pallas")
        if how == "sharded":
            mesh = Mesh(np.array(devices), "d")
            program, where = self.sharded("pallas", mesh), NamedSharding(mesh, PartitionSpec())
        else:
            program, where = jax.vmap(call) if how == "mapped" else call, SingleDeviceSharding(devices[0])
        shapes = [jax.ShapeDtypeStruct((*lead, *x.shape), jnp.asarray(x).dtype, sharding=where) for x in arguments]
        assert "tpu_custom_call" in jax.jit(program).lower(*shapes).compile().as_text()
