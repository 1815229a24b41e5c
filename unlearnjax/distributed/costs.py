"""What one device does in a compiled program, read from XLA's text of it: products, bytes, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and the layers of a model are a loop: here every body counts
as often as it runs.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from unlearnjax.distributed.hlo import Computation, Instruction, Module, parse, root_of, turns

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# These move no bytes of the device's memory: names for values, control, or the end of what began elsewhere.
_FREE = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
     "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"]
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "convert", "copy", "reshape", "transpose")  # within a fusion: the operand's entries, one by one


class Collective(NamedTuple):
    """Of one kind: how often, and the bytes that each device sends (of a ring's algorithm)."""

    times: float
    bytes: float


class Costs(NamedTuple):
    """Of one device in one call. `flops`: of matrix products, a multiply-add counted as two.

    `unknown`: loops whose number of turns does not stand in the program; they count once.
    """

    flops: float
    bytes: float
    collectives: dict[str, Collective]
    unknown: int

    @property
    def sent(self) -> float:
        """Bytes by all collectives."""
        return sum(own.bytes for own in self.collectives.values())


def _runs(module: Module) -> tuple[list[tuple[Computation, float, bool]], int]:
    """Every computation that runs: how often, and whether it is inside of a fusion; and the loops of unknown length.

    Of a conditional's branches all count.
    """
    found: list[tuple[Computation, float, bool]] = []
    unknown = 0
    waiting = [(module.entry, 1.0, False)]
    while waiting:
        name, times, fused = waiting.pop()
        own = module.computations.get(name, {})
        found.append((own, times, fused))
        for i in own.values():
            if i.opcode == "while":
                count = turns(module, i)
                unknown += count is None
                waiting += [(body, times * (1 if count is None else count), fused) for body in i.called("body")]
            elif i.opcode == "fusion" or i.opcode.startswith("async"):
                waiting += [(called, times, fused or i.opcode == "fusion") for called in i.called("calls")]
            elif i.opcode == "call":
                waiting += [(called, times, fused) for called in i.called("to_apply")]
            elif i.opcode == "conditional":
                branches = i.called("branch_computations", "true_computation", "false_computation")
                waiting += [(branch, times, fused) for branch in branches]
    return found, unknown


def _sizes(attributes: str, name: str) -> list[int]:
    match = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(x) for x in match[1].split(",") if x] if match else []


def _product(i: Instruction, own: Computation) -> float:
    """2 x the entries of a dot's result x the length of what is summed over."""
    left = own[i.operands[0]].shapes[0].dims
    contracted = math.prod(left[d] for d in _sizes(i.attributes, "lhs_contracting_dims"))
    return 2.0 * math.prod(i.shapes[0].dims) * contracted


def group_size(attributes: str, devices: int = 1) -> int:
    """Devices that a collective joins, of `replica_groups` in any of XLA's spellings.

    Args:
      devices: all that run the program, which no groups, or empty ones, stand for.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # part of an axis: 'a':(what is before)size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"replica_groups in a spelling that is not known: {attributes[:200]}")
    return devices


def sent_bytes(opcode: str, size: float, devices: int) -> float:
    """Bytes that each device sends in a collective among `devices` whose larger side (of operand and result) has
    `size` bytes, by the algorithms on a ring."""
    share = (devices - 1) / devices
    return size if opcode == "collective-permute" else size * share * (2 if opcode == "all-reduce" else 1)


def _collective(i: Instruction) -> str | None:
    base = i.opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def _carries(i: Instruction) -> bool:
    """Whether it hands values on, or begins or ends a collective that lies over other work and is counted by itself."""
    return i.opcode == "tuple" or _collective(i) is not None or "AsyncCollective" in i.attributes


def _users(own: Computation, name: str) -> Iterator[tuple[Instruction, str]]:
    """Users of a value, and of the same entries in another order or dtype, each with the name by which it knows it."""
    for user in own.values():
        if name in user.operands:
            if user.opcode in _SAME:
                yield from _users(own, user.name)
            else:
                yield user, name


def _reads(source: Instruction, own: Computation, module: Module, size: float) -> float:
    """Bytes that a fusion's computation reads of one of its parameters of so many: of one that it only slices, itself
    or in a fusion within it, the slices."""
    bytes_each = size / max(math.prod(source.shapes[0].dims), 1)
    total = 0.0
    for user, name in _users(own, source.name):
        if _carries(user) or (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            total += bytes_each * sum(math.prod(s.dims) for s in user.shapes)
        elif user.opcode == "fusion":
            called = module.computations[user.called("calls")[0]]
            places = {str(place) for place, operand in enumerate(user.operands) if operand == name}
            given = (i for i in called.values() if i.opcode == "parameter" and i.literal in places)
            total += sum(_reads(i, called, module, size) for i in given)
        else:
            return size
    return min(total, size)


def _made(result: Instruction, own: Computation, module: Module) -> tuple[Instruction, Computation]:
    """The instruction that computes a fusion's result, and where it stands."""
    while result.opcode == "bitcast" or (result.opcode == "fusion" and len(result.shapes) == 1):
        if result.opcode == "fusion":
            own = module.computations[result.called("calls")[0]]
            result = root_of(own)
        else:
            result = own[result.operands[0]]
    return result, own


def _of_fusion(i: Instruction, module: Module) -> float:
    """Bytes that a fusion reads and writes: of an operand that it only slices, the slices; of a result that is an
    operand with a part replaced, the part."""
    (called,) = i.called("calls")
    own = module.computations[called]
    given = [inner for inner in own.values() if inner.opcode == "parameter" and not inner.shapes[0].fast]
    total = sum(_reads(inner, own, module, inner.bytes) for inner in given)
    root = root_of(own)
    if _carries(root) and root.opcode != "tuple":
        return total
    results = [own[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for outer, shape in zip(results, i.shapes, strict=False):
        result, place = _made(outer, own, module)
        if shape.fast or (result.opcode == "parameter" and place is own) or _carries(result):
            continue
        replaced = result.opcode == "dynamic-update-slice"
        total += sum(s.bytes for s in place[result.operands[1]].shapes) if replaced else shape.bytes
    return total


def _moved(i: Instruction, own: Computation, module: Module) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or i.opcode == "async-start" or _carries(i):
        return 0.0  # what an async-start begins is a computation of its own
    if i.opcode == "fusion":
        return _of_fusion(i, module)
    if i.opcode in _SLICES:
        source = own.get(i.operands[0])
        return i.bytes + (sum(s.bytes for s in i.shapes) if source is not None and source.bytes else 0.0)
    if i.opcode == "dynamic-update-slice":
        return 2 * own[i.operands[1]].bytes if i.operands[1] in own else 0.0
    read = sum(own[name].bytes for name in i.operands if name in own)
    if i.opcode == "copy-start":
        return read + (0.0 if i.shapes[0].fast else i.shapes[0].bytes)
    return read if i.opcode.endswith("-start") else read + i.bytes


def costs(optimized: str, partitioned: str | None = None) -> Costs:
    """What one device does in one call.

    Args:
      optimized: the text of the program that runs: bytes and collectives are its.
      partitioned: its text after it was divided among the devices and before products became convolutions or library
        calls: products are counted there. Default: in `optimized`.
    """
    module = parse(optimized)
    counted = re.search(r"num_partitions=(\d+)", optimized[:10_000])
    devices = int(counted[1]) if counted else 1
    runs, unknown = _runs(module)
    moved, seen = 0.0, set()
    sums: dict[str, Collective] = {}
    for own, times, fused in runs:
        for i in own.values():
            kind = _collective(i)
            if kind is not None:
                # One collective may stand in several places: where it begins, goes on and ends.
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                key = channel[1] if channel else f"{id(own)} {i.name}"
                if key not in seen:
                    seen.add(key)
                    given = sum(s.bytes for name in i.operands if name in own for s in own[name].shapes)
                    made = sum(s.bytes for s in i.shapes)
                    if i.opcode.endswith("-start") and kind != "all-reduce":
                        made -= given  # its result holds the operands too
                    sent = sent_bytes(kind, max(given, made), group_size(i.attributes, devices))
                    before = sums.get(kind, Collective(0.0, 0.0))
                    sums[kind] = Collective(before.times + times, before.bytes + times * sent)
                    moved += times * (i.bytes + sum(own[name].bytes for name in i.operands if name in own))
            if not fused:
                moved += times * _moved(i, own, module)
    products = module if partitioned is None else parse(partitioned)
    if partitioned is not None:
        runs, more = _runs(products)
        unknown = max(unknown, more)
    flops = sum(times * _product(i, own) for own, times, _ in runs for i in own.values() if i.opcode == "dot")
    return Costs(flops, moved, dict(sorted(sums.items())), unknown)
