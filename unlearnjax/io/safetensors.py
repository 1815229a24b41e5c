"""Safetensors files and sharded folders of them: headers checked by hand, tensors as views of the mapped file.

Format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}, "__metadata__":
{str: str}}, then the tensors' bytes, row-major and little-endian, without holes. Offsets count from the header's end.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from unlearnjax.distributed.processes import several
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.together import write_together

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
        "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READ = 1 << 30  # bytes at once: macOS refuses 2 GiB
_LONGEST_HEADER = 100_000_000  # the official reader's limit


class Slot(NamedTuple):
    """Where a tensor lies: its dtype, shape, and first and last-but-one byte counted from the header's end."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class _Descriptor:
    """An open file's number, closed with the last reference to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True)
class TensorFile:
    """One open safetensors file."""

    path: Path
    slots: dict[str, Slot]
    metadata: dict[str, str]
    descriptor: _Descriptor
    offset: int  # of the bytes after the header

    @cached_property
    def data(self) -> np.ndarray:
        """Those bytes, mapped into memory: uint8."""
        mapped = mmap.mmap(self.descriptor.number, 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, np.uint8)[self.offset :]

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file. Pages are read from disk as they are touched.

        Raises:
          UserError: the file has no tensor of that name.
        """
        slot = self._slot(name)
        return self.data[slot.begin : slot.end].view(slot.dtype).reshape(slot.shape)

    def read_into(self, out: np.ndarray, name: str, start: int = 0) -> None:
        """Copy the tensor's entries from the flat index `start` on into `out`, 1-D and of its dtype. Unlike reading
        the view, this maps no page of the file into memory, which takes longer than copying it.

        Raises:
          UserError: the file has no tensor of that name, is shorter than it was when opened, or cannot be read.
        """
        slot = self._slot(name)
        if not hasattr(os, "preadv"):
            out[:] = self.read(name).reshape(-1)[start : start + out.size]
            return
        rest = out.view(np.uint8).data
        place = self.offset + slot.begin + start * slot.dtype.itemsize
        while rest:
            try:
                got = os.preadv(self.descriptor.number, [rest[:_READ]], place)
            except OSError as error:
                raise UserError(f"{self.path}: tensor {name!r} cannot be read ({error.strerror})") from error
            if not got:
                raise UserError(f"{self.path}: became shorter while tensor {name!r} was read; fetch or write it again")
            rest, place = rest[got:], place + got

    def _slot(self, name: str) -> Slot:
        if name not in self.slots:
            raise UserError(f"{self.path}: holds no tensor {name!r}")
        return self.slots[name]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's tensors, each in one of its files."""

    folder: Path
    files: dict[str, TensorFile]  # by tensor name

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of its file."""
        return self.files[name].read(name)

    def read_into(self, out: np.ndarray, name: str, start: int = 0) -> None:
        """See `TensorFile.read_into`."""
        self.files[name].read_into(out, name, start)

    def only(self, names: Iterable[str]) -> "Checkpoint":
        """The checkpoint as if it held no other tensors."""
        return Checkpoint(self.folder, {name: self.files[name] for name in names})

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].slots[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.files[name].slots[name].dtype


def _no_duplicates(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{path}: names {name!r} twice; the file is broken, fetch or write it again")
            found[name] = value
        return found

    return build


def _slot(path: Path, name: str, entry: Any, size: int) -> Slot:
    """Check one header entry. `size`: how many bytes follow the header."""

    def broken(what: str) -> UserError:
        return UserError(f"{path}: tensor {name!r} {what}; the file is broken, fetch or write it again")

    def counts(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise broken("lacks dtype, shape or data_offsets in the header")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has dtype {kind!r}, which is not known; known: {', '.join(DTYPES)}")
    if not counts(shape):
        raise broken(f"has shape {shape!r}, which is not a list of sizes")
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"has offsets {offsets!r}, which are not a begin and an end")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != wanted:
        raise broken(f"takes {end - begin} bytes where {kind} {shape} takes {wanted}")
    if end > size:
        raise UserError(
            f"{path}: truncated: tensor {name!r} ends at byte {end} of the data and the file has {size}; fetch it again"
        )
    return Slot(DTYPES[kind], tuple(shape), begin, end)


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a safetensors file: its header is not JSON") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: not a safetensors file: its header is not a JSON object")
    return parsed


def open_file(path: str | Path) -> TensorFile:
    """Map a safetensors file and check its whole header.

    Raises:
      UserError: no such file; a truncated header or truncated data; a header that is no JSON object or names a tensor
        twice; a tensor of unknown dtype, whose bytes do not match its shape, lie outside the file, overlap another
        tensor's or leave a hole.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise UserError(f"{path}: truncated: {size} bytes are too few for a safetensors file; fetch it again")
            if length > _LONGEST_HEADER:
                raise UserError(f"{path}: not a safetensors file: it claims a header of {length} bytes")
            if 8 + length > size:
                raise UserError(f"{path}: truncated inside its header ({size} of {8 + length} bytes); fetch it again")
            header = _header(path, file.read(length))
            descriptor = _Descriptor(os.dup(file.fileno()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map strings to strings; the file is broken")
    size -= 8 + length
    slots = {name: _slot(path, name, entry, size) for name, entry in header.items()}
    place, before = 0, "the header"
    for name, slot in sorted(slots.items(), key=lambda item: item[1][2:]):
        if slot.begin != place:
            what = "overlaps" if slot.begin < place else "leaves a hole after"
            raise UserError(f"{path}: tensor {name!r} {what} {before}; the file is broken, fetch or write it again")
        place, before = slot.end, f"tensor {name!r}"
    if place != size:
        raise UserError(f"{path}: {size - place} bytes after {before} belong to no tensor; the file is broken")
    return TensorFile(path, slots, metadata, descriptor, 8 + length)


def _weight_map(path: Path) -> dict[str, str]:
    """The index's map from tensor to file, every file checked to be named inside the folder."""
    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise UserError(f"{path}: must hold an object 'weight_map' from tensor names to file names")
    for tensor, name in weights.items():
        # The hub's cache links each file to a blob store, so the name is judged, not where a link leads.
        place = PureWindowsPath(name)  # splits at / and \\, and knows drives
        if place.anchor or ".." in place.parts or place.suffix != ".safetensors":
            raise UserError(f"{path}: tensor {tensor!r} points to {name!r}, no .safetensors file inside the folder")
    return weights


def open_folder(folder: str | Path) -> Checkpoint:
    """Open a model folder's tensors: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
      UserError: no safetensors here (for a pickled checkpoint the message has the command that converts it); an index
        that is broken or points outside the folder; a missing shard; a tensor that its shard does not hold; a broken
        file (see `open_file`).
    """
    folder = Path(folder)
    if (folder / SINGLE).exists():
        file = open_file(folder / SINGLE)
        return Checkpoint(folder, dict.fromkeys(file.slots, file))
    if not (folder / INDEX).exists():
        raise UserError(_nothing_here(folder))
    weights = _weight_map(folder / INDEX)
    opened = {}
    for name in sorted(set(weights.values())):
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing, though {INDEX} names it; fetch the model again")
        opened[name] = open_file(folder / name)
    for tensor, name in weights.items():
        if tensor not in opened[name].slots:
            raise UserError(f"{folder / name}: holds no tensor {tensor!r}, though {INDEX} says so; fetch it again")
    return Checkpoint(folder, {tensor: opened[name] for tensor, name in weights.items()})


def conversion(source: str, target: str) -> str:
    """The shell command that writes a model's pickled weights as safetensors, for someone who trusts them."""
    model = f"M.from_pretrained({source!r}, dtype='auto').save_pretrained({target!r})"
    tokenizer = f"T.from_pretrained({source!r}).save_pretrained({target!r})"
    return f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; {model}; {tokenizer}"'


def _nothing_here(folder: Path) -> str:
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED) if folder.is_dir() else []
    if not pickled:
        return f"{folder}: holds neither {SINGLE} nor {INDEX}; give a model folder with safetensors weights"
    return (
        f"{folder}: holds pickled weights only ({pickled[0]}), which can run code when loaded and are refused; if you "
        f"trust them convert them once: {conversion(str(folder), str(folder) + '-safetensors')}"
    )


class Entry(NamedTuple):
    """A tensor to write: `value` is the array, or a function without arguments that makes it when its turn comes: the
    array, or an iterator of flat pieces that make it up."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    value: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def made(self) -> "Entry":
        """With the value itself."""
        return self._replace(value=self.value() if callable(self.value) else self.value)


def write_file(path: str | Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, holding one tensor at a time. Metadata defaults to {"format": "pt"}.

    Raises:
      UserError: a dtype that safetensors has no name for, or a name given twice.
      ValueError: a tensor that has not the shape and dtype announced for it.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    place = 0
    for entry in entries:
        kind = NAMES.get(np.dtype(entry.dtype))
        if kind is None:
            raise UserError(f"{path}: tensor {entry.name!r} has dtype {np.dtype(entry.dtype)}, which safetensors lacks")
        if entry.name in header:
            raise UserError(f"{path}: tensor {entry.name!r} is given twice")
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [place, place + entry.size]}
        place += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_entry(file, entry)


def _write_entry(file: BinaryIO, entry: Entry) -> None:
    """In a function of its own, so that nothing holds this tensor while the next one is made."""
    value = entry.made().value
    if isinstance(value, Iterator):
        _write_pieces(file, entry, value)
        return
    array = np.asarray(value)
    if array.shape != tuple(entry.shape) or array.dtype != np.dtype(entry.dtype):
        raise ValueError(f"{entry.name}: {array.dtype} {array.shape} instead of {entry.dtype} {entry.shape}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_pieces(file: BinaryIO, entry: Entry, pieces: Iterator[np.ndarray]) -> None:
    written = 0
    for piece in pieces:
        if piece.dtype != np.dtype(entry.dtype):
            raise ValueError(f"{entry.name}: a piece of {piece.dtype} instead of {entry.dtype}")
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        written += piece.nbytes
    if written != entry.size:
        raise ValueError(f"{entry.name}: pieces of {written} bytes instead of {entry.size}")


def shards(entries: Iterable[Entry], max_shard_bytes: int = 5_000_000_000) -> dict[str, list[Entry]]:
    """A model folder's files by name: one `model.safetensors`, or several of up to that many bytes (a larger tensor
    gets one of its own)."""
    found: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if found[-1] and size + entry.size > max_shard_bytes:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.size
    if len(found) == 1:
        return {SINGLE: found[0]}
    return {f"model-{i:05d}-of-{len(found):05d}.safetensors": shard for i, shard in enumerate(found, start=1)}


def is_whole(path: Path, entries: Iterable[Entry]) -> bool:
    """Whether the file is there and holds tensors of these names, shapes and dtypes."""
    try:
        slots = open_file(path).slots
    except UserError:
        return False
    wanted = {entry.name: (np.dtype(entry.dtype), tuple(entry.shape)) for entry in entries}
    return {name: (slot.dtype, slot.shape) for name, slot in slots.items()} == wanted


def write_sharded(
    folder: str | Path,
    tensors: Iterable[Entry | tuple[str, tuple[int, ...], Any, Any]],
    max_shard_bytes: int = 5_000_000_000,
    metadata: dict[str, str] | None = None,
    *,
    written: Container[str] = (),
) -> None:
    """Write a model folder's tensors in Hugging Face's naming: one `model.safetensors`, or shards and their index. Each
    file appears when it is whole. The processes of a job write the shards in turn (see `write_together`).

    Args:
      folder: an existing folder (stage it with `unlearnjax.io.atomic.staged_folder`).
      tensors: (name, shape, dtype, value) with value an array or a function that makes it; one is held at a time.
      max_shard_bytes: a shard grows up to this many bytes; a larger tensor gets a shard of its own.
      metadata: the files' metadata, {"format": "pt"} by default.
      written: names of files that are there already: their tensors' values are not asked for.
    """
    folder = Path(folder)
    files = shards([Entry(*t) for t in tensors], max_shard_bytes)
    wanted = {name: shard for name, shard in files.items() if name not in written}

    def write(place: Path, shard: Sequence[Entry]) -> None:
        with staged_file(place) as path:
            write_file(path, shard, metadata)

    if several():
        write_together(folder, wanted, Entry.made, write)
    else:
        for name, shard in wanted.items():
            write(folder / name, shard)
    if len(files) == 1:
        return
    weights = {entry.name: name for name, shard in files.items() for entry in shard}
    total = sum(entry.size for shard in files.values() for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
