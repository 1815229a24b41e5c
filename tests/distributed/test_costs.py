"""Counting in a program's text: loops as often as they run, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unlearnjax.distributed.costs import costs, group_size, sent_bytes
from unlearnjax.distributed.hlo import parse, turns
from unlearnjax.distributed.mesh import make_mesh

LAYERS, ROWS, WIDTH = 6, 16, 32
SPELLINGS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": 4,
    "replica_groups=[2,4]<=[8]": 4,
    "replica_groups=[4,2]<=[2,4]T(1,0)": 2,
    "replica_groups=mesh['a'=2,'b'=4] {'b'}": 4,
    "replica_groups=mesh['a'=2,'b'=4] {'a','b'}": 8,
    "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={1}": 4,
    "replica_groups=mesh['a'=8] {'a':(2)2}": 2,
    "replica_groups={}, dimensions={0}": 16,
    "": 16,
}  # fmt: skip


def text_of(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile().as_text()


def layers(weights, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def shape(*size, place=None):
    return jax.ShapeDtypeStruct(size, jnp.float32, sharding=place)


def test_a_loops_body_counts_as_often_as_it_runs():
    found = costs(text_of(layers, shape(LAYERS, WIDTH, WIDTH), shape(ROWS, WIDTH)))
    assert found.flops == 2 * LAYERS * ROWS * WIDTH * WIDTH
    assert found.unknown == 0 and found.collectives == {}
    weights = LAYERS * WIDTH * WIDTH * 4
    assert weights < found.bytes < LAYERS * weights  # each turn reads its own layer of the stack


def test_loops_in_loops_multiply():
    def twice(weights, x):
        return jax.lax.fori_loop(0, 3, lambda _, y: layers(weights, y), x)

    found = costs(text_of(twice, shape(LAYERS, WIDTH, WIDTH), shape(ROWS, WIDTH)))
    assert found.flops == 3 * 2 * LAYERS * ROWS * WIDTH * WIDTH


def test_a_loop_of_unknown_length_is_told_and_counts_once():
    def until(weights, x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) > 1.0, lambda y: layers(weights, y), x)

    found = costs(text_of(until, shape(LAYERS, WIDTH, WIDTH), shape(ROWS, WIDTH)))
    assert found.unknown == 1
    assert found.flops == 2 * LAYERS * ROWS * WIDTH * WIDTH


def test_one_devices_share_and_what_it_sends():
    mesh = make_mesh({"candidate": 2, "fsdp": 4})
    weights = shape(LAYERS, WIDTH, WIDTH, place=NamedSharding(mesh, P(None, None, "fsdp")))
    rows = NamedSharding(mesh, P(("candidate", "fsdp")))

    def run(w, x):
        def body(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(body, x, w)[0]

    found = costs(text_of(run, weights, shape(ROWS, WIDTH, place=rows)))
    assert found.flops == 2 * LAYERS * ROWS * WIDTH * WIDTH / 8
    gathers = found.collectives["all-gather"]
    assert gathers.times == LAYERS
    assert gathers.bytes == LAYERS * WIDTH * WIDTH * 4 * 3 / 4


@pytest.mark.parametrize(("text", "size"), SPELLINGS.items())
def test_groups_in_every_spelling(text, size):
    assert group_size(text, 16) == size


def test_groups_in_a_spelling_that_is_not_known_are_no_group_of_one():
    with pytest.raises(ValueError, match="spelling"):
        group_size("replica_groups=new")


COLLECTIVES = """HloModule m, num_partitions=8

ENTRY %main (p: f32[1000], q: f32[1000]) -> f32[8000] {
  %p = f32[1000]{0} parameter(0)
  %q = f32[1000]{0} parameter(1)
  %both = (f32[1000]{0}, f32[1000]{0}) all-reduce(%p, %q), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %begun = (f32[1000]{0}, f32[8000]{0}) all-gather-start(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %ended = f32[8000]{0} all-gather-done(%begun)
}
"""


def test_collectives_of_several_arrays_and_those_that_begin_and_end():
    found = costs(COLLECTIVES).collectives
    assert found["all-reduce"].bytes == 2 * 7 / 8 * (4000 + 4000)
    assert found["all-gather"].bytes == 7 / 8 * 32000 and found["all-gather"].times == 1


# A layer of a stack, sliced in a fusion within the fusion of its product; a row of a buffer, replaced likewise.
NESTED = """HloModule m

%sliced (s: f32[12,100,100], n: s32[]) -> bf16[100,100] {
  %s = f32[12,100,100]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %narrow = bf16[12,100,100]{2,1,0} convert(%s)
  %one = bf16[1,100,100]{2,1,0} dynamic-slice(%narrow, %n, %zero, %zero), dynamic_slice_sizes={1,100,100}
  ROOT %layer = bf16[100,100]{1,0} bitcast(%one)
}

%replaced (b: f32[12,100], r: f32[1,100], m: s32[]) -> f32[12,100] {
  %b = f32[12,100]{1,0} parameter(0)
  %r = f32[1,100]{1,0} parameter(1)
  %m = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %with = f32[12,100]{1,0} dynamic-update-slice(%b, %r, %m, %none)
}

%multiplied (stack: f32[12,100,100], x: bf16[100,100], buffer: f32[12,100], i: s32[]) -> f32[12,100] {
  %stack = f32[12,100,100]{2,1,0} parameter(0)
  %x = bf16[100,100]{1,0} parameter(1)
  %buffer = f32[12,100]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %w = bf16[100,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %y = f32[1,100]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %made = f32[12,100]{1,0} fusion(%buffer, %y, %i), kind=kLoop, calls=%replaced
}

ENTRY %main (p: f32[12,100,100], q: bf16[100,100], t: f32[12,100], i: s32[]) -> f32[12,100] {
  %p = f32[12,100,100]{2,1,0} parameter(0)
  %q = bf16[100,100]{1,0} parameter(1)
  %t = f32[12,100]{1,0} parameter(2)
  %i = s32[] parameter(3)
  ROOT %out = f32[12,100]{1,0} fusion(%p, %q, %t, %i), kind=kOutput, calls=%multiplied
}
"""


def test_a_fusion_reads_and_writes_the_slices_of_the_fusions_within_it():
    layer, x, row, index = 100 * 100 * 4, 100 * 100 * 2, 100 * 4, 2 * 4  # the index is read twice
    assert costs(NESTED).bytes == pytest.approx(layer + x + row + index, abs=index)


def test_bytes_on_a_ring():
    assert sent_bytes("all-gather", 800, 8) == 700
    assert sent_bytes("all-reduce", 800, 8) == 1400
    assert sent_bytes("collective-permute", 800, 8) == 800
    assert sent_bytes("all-gather", 800, 1) == 0


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not the text of an HLO module"):
        parse("nothing")


LOOP = """HloModule m

%stepped (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %more = s32[] add(s32[] %x, s32[] %two)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %b = s32[] parameter(1)
  %a = s32[] parameter(0)
  ROOT %lt = pred[] compare(s32[] %a, s32[] %b), direction=LT
}

%body (state: (f32[8], s32[])) -> (f32[8], s32[]) {
  %state = (f32[8], s32[]) parameter(0)
  %v = f32[8] get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %both = s32[] add(%one, %one)
  %next = s32[] ADVANCED
  ROOT %out = (f32[8], s32[]) tuple(%v, %next)
}

%condition (state.1: (f32[8], s32[])) -> pred[] {
  %state.1 = (f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=1
  %limit = s32[] constant(7)
  ROOT %go = pred[] TESTED
}

ENTRY %main (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %p = (f32[8], s32[]) parameter(0)
  ROOT %loop = (f32[8], s32[]) while(%p), condition=%condition, body=%body
}
"""
PLAIN_TEST, FUSED_TEST = "compare(%j, %limit), direction=LT", "fusion(%j, %limit), kind=kLoop, calls=%less"


@pytest.mark.parametrize(
    ("advanced", "tested", "expected"),
    [
        ("add(%i, %one)", PLAIN_TEST, 7),
        ("add(%one, %i)", FUSED_TEST, 7),
        ("add(%i, %both)", PLAIN_TEST, 4),  # XLA takes two turns of a loop in one
        ("fusion(%i), kind=kLoop, calls=%stepped", FUSED_TEST, 4),
        ("multiply(%i, %both)", PLAIN_TEST, None),
        ("subtract(%i, %one)", PLAIN_TEST, None),
        ("add(%i, %i)", PLAIN_TEST, None),
        ("add(%i, %one)", "compare(%j, %limit), direction=NE", None),
        ("add(%i, %one)", "compare(%limit, %j), direction=LT", None),
    ],
)
def test_how_often_a_loop_runs(advanced, tested, expected):
    module = parse(LOOP.replace("ADVANCED", advanced).replace("TESTED", tested))
    assert turns(module, module.computations["main"]["loop"]) == expected
