"""XLA's text of a compiled program, as computations of instructions."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%?([\w.\-]+)$")
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape(NamedTuple):
    """An array. `fast`: it lies in a memory on the chip (TPU's VMEM), not in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0) / 8


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # several: a tuple
    operands: tuple[str, ...]
    attributes: str
    literal: str  # what stands between the parentheses
    root: bool

    @property
    def bytes(self) -> float:
        """In main memory."""
        return sum(shape.bytes for shape in self.shapes if not shape.fast)

    def called(self, *names: str) -> list[str]:
        """The computations that an attribute of one of these names holds."""
        found: list[str] = []
        for name in names:
            match = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            if match:
                found += re.findall(r"[\w.\-]+", match[1])
        return found


Computation = dict[str, Instruction]


class Module(NamedTuple):
    entry: str
    computations: dict[str, Computation]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"an instruction without its closing parenthesis: {text[:200]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, bool(re.search(r"S\([1-9]", layout))))
    return tuple(found)


def _split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    root = left.strip().startswith("ROOT ")
    name = _NAME.search(left.strip())
    if name is None:
        return None
    right = _COMMENT.sub("", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opcode, _, _ = right[end:].strip().partition("(")
    begin = right.index("(", end)
    close = _closing(right, begin)
    literal = right[begin + 1 : close]
    operands = tuple(m[1] for part in _split(literal) if (m := _NAME.search(part)))
    return Instruction(name[1], opcode, _shapes(right[:end]), operands, right[close + 1 :], literal, root)


def parse(text: str) -> Module:
    """An HLO module's text, as XLA prints it."""
    entry = ""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            # A header: `%name (parameters) -> shape {`, with ENTRY before the one that is run.
            if line.endswith("{") and "->" in line and not line.startswith((" ", "HloModule")):
                head = line.removeprefix("ENTRY ").split(" ", 1)[0].split("(", 1)[0].removeprefix("%")
                current = computations.setdefault(head, {})
                entry = head if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _instruction(line)
            if found is not None:
                current[found.name] = found
    if not entry:
        raise ValueError("no ENTRY computation: not the text of an HLO module")
    return Module(entry, computations)


Linear = tuple[dict[int, int], int]  # of the numbers in a loop's tuple: coefficients by place, and a constant


def _linear(module: Module, own: Computation, name: str, given: Sequence[Linear | None] | None) -> Linear | None:
    """An instruction's value as a linear function of the numbers in a loop's tuple; None: it is not one.

    Args:
      given: the values of the computation's parameters; None: its parameter is the tuple.
    """
    i = own.get(name)
    if i is None:
        return None
    inner = lambda place: _linear(module, own, i.operands[place], given)  # noqa: E731
    if i.opcode == "constant":
        return ({}, int(i.literal)) if re.fullmatch(r"-?\d+", i.literal) else None
    if i.opcode == "parameter":
        return given[int(i.literal)] if given is not None else None
    if i.opcode == "get-tuple-element":
        place = re.search(r"\bindex=(\d+)", i.attributes)
        whole = own.get(i.operands[0])
        of_loop = given is None and whole is not None and whole.opcode == "parameter"
        return ({int(place[1]): 1}, 0) if place and of_loop else None
    if i.opcode in ("copy", "bitcast", "convert", "reshape"):
        return inner(0)
    if i.opcode in ("add", "subtract"):
        left, right = inner(0), inner(1)
        if left is None or right is None:
            return None
        sign = 1 if i.opcode == "add" else -1
        places = {p: left[0].get(p, 0) + sign * right[0].get(p, 0) for p in left[0].keys() | right[0].keys()}
        return {p: n for p, n in places.items() if n}, left[1] + sign * right[1]
    if i.opcode == "fusion":
        called = module.computations[i.called("calls")[0]]
        return _linear(module, called, root_of(called).name, [inner(p) for p in range(len(i.operands))])
    return None


def root_of(own: Computation) -> Instruction:
    return next(i for i in own.values() if i.root)


def turns(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs, where its program says so, or counts a number from 0 by a constant up to another, as
    JAX's loops do; None: that is not to be seen."""
    known = re.search(r'known_trip_count[^}]*?"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (module.computations[loop.called(part)[0]] for part in ("condition", "body"))
    test, own, given = root_of(condition), condition, None
    if test.opcode == "fusion":
        given = [_linear(module, condition, name, None) for name in test.operands]
        own = module.computations[test.called("calls")[0]]
        test = root_of(own)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counted, limit = (_linear(module, own, name, given) for name in test.operands)
    if counted is None or limit is None or limit[0] or len(counted[0]) != 1 or counted[1]:
        return None
    (place,) = counted[0]
    after = _linear(module, body, root_of(body).operands[place], None)
    if after is None or after[0] != {place: 1} or after[1] < 1:
        return None
    return -(-limit[1] // after[1])
