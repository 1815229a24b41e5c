"""One checkpoint on disk: a part per process with a checksum per array, and one manifest.

    part-00000.safetensors   what this process holds of the training states
    part-00000.json          of each array there: its leaf, where it lies in it, and its SHA-256; SHA-256 of the file's
                             header and of this text
    manifest.json            step, fingerprint, history so far; dtype and shape of each leaf; SHA-256 of each
                             part-*.json and of the manifest

Any number of processes reads it, each from every part what its own devices need, and uses no array whose checksum is
not right. The folder is written beside its place, flushed to disk and renamed: it is there whole or not at all.

The arrays are not written by Orbax: 0.12 restores flipped bits without a word, writes host arrays in the first process
alone, and on its way to device arrays in several processes makes them all wait for each other with the devices.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from unlearnjax.distributed.processes import follows
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import explain, flush, flush_tree
from unlearnjax.io.safetensors import Entry, open_file, write_file
from unlearnjax.training.loop import Clock, Curve, Snapshot
from unlearnjax.training.pieces import Gathering, Pieces, held

FORMAT = 2
ARRAYS, PART, MANIFEST = ".safetensors", ".json", "manifest.json"
FAILED = ".failed"  # why a process could not write its part


class Damaged(Exception):
    """A checkpoint that is not what was written. The message says in a few words how that shows."""


class Unreadable(Damaged):
    """A file that the system refuses to read, such as on a mount that has gone: what is in it may be whole."""


def leaf_names(tree: PyTree) -> dict[str, Any]:
    """A pytree's leaves by name, such as `trainable.layers.attention.q.a`, in the tree's order."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def checksum(leaf: np.ndarray) -> str:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(leaf).view(np.uint8).data if leaf.size else b"").hexdigest()


def canonical(value: Any) -> str:
    """Plain data as text; what that reads back as gives the same text. NaN and infinities are allowed."""
    return json.dumps(value, separators=(",", ":"))


def write_checkpoint(
    folder: Path, snapshot: Snapshot, fingerprint: Mapping[str, Any], meet: Callable[[str], None] = lambda key: None
) -> None:
    """Write a checkpoint as `folder`, whole or not at all.

    Args:
      snapshot: its states' leaves are numpy arrays or `Pieces`, which nobody changes meanwhile.
      fingerprint: plain data that says which run this belongs to.
      meet: waits for all processes of the job, which all write the same checkpoint, at a place of that name.

    Raises:
      UserError, OSError: it could not be written; nothing is left behind.
    """
    leaves = {name: x if isinstance(x, Pieces) else held(x) for name, x in leaf_names(snapshot.states).items()}
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "fingerprint": fingerprint,
        "leaves": {name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in leaves.items()},
        "history": {
            "curves": [curve._asdict() for curve in snapshot.curves],
            "pending": snapshot.pending,
            "diverged_at": snapshot.diverged_at,
            "clock": snapshot.clock._asdict(),
        },
    }
    _write_together(folder, leaves, manifest, meet)


def _write_together(
    folder: Path, leaves: Mapping[str, Pieces], manifest: Mapping[str, Any], meet: Callable[[str], None]
) -> None:
    """As `staged_folder`, by all processes of the job: each comes to every meeting, whatever happened to it."""
    beside = folder.with_name(f".{folder.name}.0.part")
    error: Exception | None = None
    if not follows():
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        except OSError as failed:
            error = failed
    meet("made")
    own = beside / _part(jax.process_index())
    try:
        _write_part(own, leaves)
        for kind in (ARRAYS, PART):
            flush(own.with_suffix(kind))
    except Exception as failed:
        error = error or failed
        with contextlib.suppress(OSError):
            own.with_suffix(PART).unlink(missing_ok=True)
            own.with_suffix(ARRAYS).unlink(missing_ok=True)
            own.with_suffix(FAILED).write_text(_short(failed), encoding="utf-8")
    try:
        meet("written")
        if error is None and not follows():
            try:
                _write_manifest(beside, manifest, jax.process_count())
                flush_tree(beside)
                beside.rename(folder)
                flush(folder.parent)
            except Exception as failed:
                error = failed
    finally:
        if not follows():
            shutil.rmtree(beside, ignore_errors=True)
    meet("ended")
    if error is not None:
        explain(error, folder)
        raise error
    if not folder.exists():
        raise UserError("the first process could not finish it")


def _part(process: int) -> str:
    return f"part-{process:05d}"


def _write_part(part: Path, leaves: Mapping[str, Pieces]) -> None:
    """This process's pieces."""
    arrays, about = {}, {}
    for name, leaf in leaves.items():
        for i, (region, values) in enumerate(leaf.parts.items()):
            key = name if i == 0 else f"{name}#{i}"
            arrays[key] = values
            about[key] = {"leaf": name, "region": [list(span) for span in region], "sha256": checksum(values)}
    write_arrays(part.with_suffix(ARRAYS), arrays)
    record = {"format": FORMAT, "arrays": about, "header": _header_digest(part.with_suffix(ARRAYS))}
    part.with_suffix(PART).write_text(seal(record), encoding="utf-8")


def _write_manifest(folder: Path, manifest: Mapping[str, Any], count: int) -> None:
    parts = [folder / _part(i) for i in range(count)]
    for i, part in enumerate(parts):
        if not part.with_suffix(PART).exists():
            said = part.with_suffix(FAILED)
            reason = said.read_text(encoding="utf-8") if said.exists() else "it could not say why"
            raise UserError(f"process {i} could not write its part ({reason})")
    digests = {part.name: _digest(part.with_suffix(PART)) for part in parts}
    (folder / MANIFEST).write_text(seal({**manifest, "parts": digests}), encoding="utf-8")


def seal(record: Mapping[str, Any]) -> str:
    """Plain data as JSON text that holds its own SHA-256."""
    text = canonical(record)
    return canonical({**record, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` made a text of, from a file.

    Raises:
      Damaged: it is missing, or is not what was written.
      Unreadable: the system refuses to read it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wanted = record.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _unread(path, error) from None
    if hashlib.sha256(canonical(record).encode()).hexdigest() != wanted:
        raise Damaged(f"the checksum of {path.name} is wrong")
    if record.get("format") != FORMAT:
        raise Damaged(f"{path.name} has format {record.get('format')!r}, this version reads {FORMAT}")
    return dict(record)


def read_checkpoint(folder: Path, manifest: Mapping[str, Any], like: PyTree) -> Snapshot:
    """The snapshot in `folder`, every array verified.

    Args:
      manifest: of the same checkpoint.
      like: a pytree of the states' structure whose leaves have their shapes and dtypes, and those that are to lie on a
        mesh their shardings.

    Returns:
      A snapshot whose states are on the host, or on this process's devices where `like` has shardings.

    Raises:
      Damaged: a leaf is missing, or is not what was written or asked for.
      Unreadable: the system refuses to read a file.
    """
    expected = leaf_names(like)
    recorded = manifest["leaves"]
    if set(expected) != set(recorded):
        odd = sorted(set(expected) ^ set(recorded))[0]
        raise Damaged(f"leaf {odd} is {'missing' if odd in expected else 'not one of this run'}")
    for name, leaf in expected.items():
        if recorded[name] != {"dtype": str(np.dtype(leaf.dtype)), "shape": list(leaf.shape)}:
            raise Damaged(f"leaf {name} is not {leaf.dtype} {list(leaf.shape)}")
    found = {name: Gathering(leaf) for name, leaf in expected.items()}
    for part, digest in manifest["parts"].items():
        _read_part(folder / part, digest, found)
    for name, own in found.items():
        if not own.complete():
            raise Damaged(f"leaf {name} is not whole")
    states = jax.tree.unflatten(jax.tree.structure(like), [own.array() for own in found.values()])
    history = manifest["history"]
    return Snapshot(
        manifest["step"],
        states,
        [Curve(**curve) for curve in history["curves"]],
        history["pending"],
        history["diverged_at"],
        Clock(**history["clock"]),
    )


def _read_part(part: Path, digest: str, leaves: Mapping[str, Gathering]) -> None:
    """Add to `leaves` what they need of one process's pieces."""
    about, file = part.with_suffix(PART), part.with_suffix(ARRAYS)
    record = unseal(about)
    try:
        if _digest(about) != digest:
            raise Damaged(f"{about.name} is not the one that was written with {MANIFEST}")
        arrays = open_file(file)
        if _header_digest(file) != record["header"]:
            raise Damaged(f"the header of {file.name} is not what was written")
        for key, piece in record["arrays"].items():
            region = tuple((begin, end) for begin, end in piece["region"])
            if leaves[piece["leaf"]].needs(region):
                slot = arrays.slots[key]
                values = np.empty(slot.shape, slot.dtype)
                arrays.read_into(values.reshape(-1), key)
                if checksum(values) != piece["sha256"]:
                    raise Damaged(f"the checksum of leaf {piece['leaf']} in {file.name} is wrong")
                leaves[piece["leaf"]].add(region, values)
    except (OSError, UserError) as error:
        raise _unread(file, error) from None


def _unread(file: Path, error: BaseException) -> Damaged:
    """What an error of reading a file, or the error behind it, says of that file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is None or isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return Damaged(f"{file.name} cannot be read ({_short(error)})")
    return Unreadable(f"{file.name} cannot be read ({cause.strerror or _short(cause)})")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One process's arrays as a file."""
    write_file(path, [Entry(name, x.shape, x.dtype, x) for name, x in arrays.items()])


def _header_digest(path: Path) -> str:
    """SHA-256 of a safetensors file up to its data."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(int.from_bytes(prefix, "little"))).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
