"""Names and sizes of meshes, what lies where, and the messages about what is wrong."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from unlearnjax.distributed.mesh import choose_mesh, default_sizes, describe_sizes, make_mesh, mesh_of, parse_mesh
from unlearnjax.distributed.rules import filled, idle, of_candidates, of_params, partition
from unlearnjax.errors import UserError
from unlearnjax.models.abstract import abstract_params
from unlearnjax.models.config import ModelConfig

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, "rms")


def test_sizes_are_read_and_written():
    assert parse_mesh("candidate=2, fsdp=4") == {"candidate": 2, "fsdp": 4}
    assert describe_sizes(make_mesh({"candidate": 2, "fsdp": 4}).shape) == "candidate=2,fsdp=4"
    assert parse_mesh(describe_sizes({})) == {"candidate": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("candidates=2", "did you mean 'candidate'"), ("fsdp", "whole number above 0"), ("fsdp=0", "above 0"),
        ("fsdp=2,fsdp=4", "given twice"), ("tensor=x", "not 'x'"), ("", "unknown axis"),
    ],
)  # fmt: skip
def test_a_wrong_mesh_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_mesh(text)


def test_a_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(UserError, match=r"--mesh candidate=3: is for 3 devices, and there are 8"):
        make_mesh({"candidate": 3})


def test_by_default_the_base_is_cut_no_finer_than_it_must_be():
    gib = 2**30
    sizes = lambda *x: tuple(default_sizes(*x).values())  # noqa: E731
    assert sizes(8, 4, 2 * gib, 16 * gib) == (4, 2, 1, 1)
    assert sizes(8, 4, 14 * gib, 16 * gib) == (2, 1, 4, 1)
    assert sizes(8, 3, 2 * gib, None) == (1, 8, 1, 1)
    assert sizes(8, 3, 2 * gib, None, 4) == (1, 4, 1, 2)  # what rows do not divide among, heads do
    assert sizes(256, 8, 14 * gib, 16 * gib, 8) == (8, 2, 4, 4)  # fsdp cuts rows too
    assert sizes(4, 8, 999 * gib, 16 * gib) == (1, 1, 4, 1)


def test_devices_that_would_do_the_same_work_are_named():
    mesh = make_mesh({"candidate": 2, "data": 4})
    assert idle(mesh, 4, 8) == []
    assert "candidate=2 does not divide 3 candidates" in idle(mesh, 3, 8)[0]
    assert "data=4 does not divide the 6 rows" in idle(mesh, 4, 6)[0]


def test_a_stack_is_filled_up_for_the_candidate_axis():
    mesh = make_mesh({"candidate": 4, "fsdp": 2})
    params = jax.device_put({"w": jnp.ones(8)}, jax.sharding.NamedSharding(mesh, P("fsdp")))
    pair = {"a": jnp.ones((5, 2, 3, 8)), "b": jnp.ones((5, 2, 6, 3))}
    found = filled(params, {"q": pair})["q"]
    assert found["a"].shape[0] == found["b"].shape[0] == 8 and float(found["a"][5:].sum()) == 0
    assert found["a"].sharding.spec == P("candidate", None, None, "fsdp")
    assert filled({"w": jnp.ones(8)}, pair) is pair


def test_one_machines_cpu_devices_are_one_device_unless_a_mesh_is_asked_for():
    assert choose_mesh(None, 8, 1000) is None
    assert choose_mesh({"candidate": 8}, 8, 1000).shape["candidate"] == 8


def test_what_divides_is_cut_and_what_does_not_is_whole():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert partition(("rows", None), (8, 3), mesh) == P(("data", "fsdp"))
    assert partition(("rows", None), (2, 3), mesh) == P("data")
    assert partition(("rows",), (3,), mesh) == P()
    assert partition(("layers", "mlp", "embed"), (2, 48, 32), mesh) == P(None, "tensor", "fsdp")
    assert partition(("embed", "features"), (32, 32), mesh) == P("fsdp", "tensor")  # an axis is used once


def test_every_weight_and_every_part_of_a_state_has_its_place():
    mesh = make_mesh({"candidate": 2, "fsdp": 2, "tensor": 2})
    abstract = abstract_params(CONFIG)
    places = of_params(mesh, abstract)
    assert places["layers"]["mlp"]["down"]["weight"].spec == P(None, "fsdp", "tensor")
    assert places["embed"]["weight"].spec == P("tensor", "fsdp")
    shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)  # noqa: E731
    states = {
        "moments": {"layers": {"mlp": {"up": {"a": shape(4, 2, 8, 32), "b": shape(4, 2, 48, 8)}}}},
        "whole": {"layers": {"mlp": {"up": {"weight": shape(4, 1, 48, 32)}}}},
        "loss": shape(4),
    }
    found = {name: of_candidates(mesh, abstract, states[name]) for name in states}
    pair = found["moments"]["layers"]["mlp"]["up"]
    assert pair["a"].spec == P("candidate", None, None, ("fsdp", "tensor"))
    assert pair["b"].spec == P("candidate", None, ("fsdp", "tensor"))
    assert found["whole"]["layers"]["mlp"]["up"]["weight"].spec == P("candidate", None, "tensor", "fsdp")
    assert found["loss"].spec == P("candidate")


def test_arrays_tell_their_mesh():
    mesh = make_mesh({"fsdp": 8})
    x = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, P("fsdp")))
    assert mesh_of({"a": jnp.ones(3), "b": x}) == mesh
    assert mesh_of({"a": jnp.ones(3)}) is None
