"""One job of several processes: how they find each other, and what one of them says for all.

Every process runs the same program on the same input and comes to the same decisions. What only one may do (write a
file, look at a folder that changes) the first does, and the others take its word. Nothing here loads jax before it is
needed: the command line, and what reads files only, ask whether there are others too.
"""

import collections
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unlearnjax.errors import UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end
ALONE = "UNLEARNJAX_ALONE"
EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LEAVING = 15  # seconds that a process which has failed waits for the others
ENDING = 24 * 3600  # and one that has not
PATIENCE = 600  # seconds that a process waits for what others have to write
T = TypeVar("T")


def _has_tpus() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or Path("/dev/vfio/0").exists()


def launcher() -> str | None:
    """What started several processes of this job, if anything did, by its environment."""
    e = os.environ
    if e.get(ALONE):
        return None
    by_mpi = int(e.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    if EXPLICIT[0] in e and not (by_mpi and all(name not in e for name in EXPLICIT[1:])):
        return "environment"
    if int(e.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in e:
        return "srun"
    if by_mpi:
        return "mpirun"
    if "KUBERNETES_SERVICE_HOST" in e and "JOB_COMPLETION_INDEX" in e:
        return "Kubernetes"
    platforms = e.get("JAX_PLATFORMS", "tpu")
    if "," in e.get("TPU_WORKER_HOSTNAMES", "") or ("tpu" in platforms.split(",") and _has_tpus()):
        return "TPU slice"
    return None


def _has_devices_of_its_own() -> bool:
    """Whether a task need not share the GPUs it sees with others of its host."""
    e = os.environ
    tasks = e.get("SLURM_STEP_TASKS_PER_NODE") or e.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    alone = re.match(r"1(\D|$)", tasks) is not None  # Slurm writes 1(x4) of four nodes
    seen = e.get("CUDA_VISIBLE_DEVICES", e.get("ROCR_VISIBLE_DEVICES", ""))
    return alone or len([x for x in seen.split(",") if x]) == 1


def _by_open_mpi() -> dict[str, Any]:
    """What jax finds out by itself under Open MPI 4. It does not know 5, which calls the job prterun-HOST-NUMBER@1,
    HOST being mpirun's.

    Raises:
      UserError: the job is called otherwise, and JAX_COORDINATOR_ADDRESS not given.
    """
    e = os.environ
    address = e.get(EXPLICIT[0])
    if address is None:
        called = e.get("PMIX_NAMESPACE", "")
        found = re.fullmatch(r"[a-z]+-(?P<host>.+)-(?P<number>\d+)@\d+", called)
        if found is None:
            raise UserError(
                f"Open MPI's name of this job, {called!r}, does not tell its first host: start it with "
                f"mpirun -x {EXPLICIT[0]}=HOST:PORT, where HOST is the one of rank 0"
            )
        address = f"{found['host']}:{61440 + int(found['number']) % 4096}"
    return {
        "coordinator_address": address, "num_processes": int(e["OMPI_COMM_WORLD_SIZE"]),
        "process_id": int(e["OMPI_COMM_WORLD_RANK"]), "local_device_ids": [int(e["OMPI_COMM_WORLD_LOCAL_RANK"])],
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


APART = f"where each process is to work alone, set {ALONE}=1"


def join() -> None:
    """Join the job's other processes, where there are any; before anything touches a device.

    Under srun, Open MPI, Kubernetes (an indexed job; `pip install jax[k8s]`) and on TPU slices nothing needs to be
    said; elsewhere JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    UNLEARNJAX_ALONE=1 keeps processes apart that were started together.

    Raises:
      UserError: these are incomplete, or the others cannot be reached.
    """
    import jax

    by = launcher()
    if by is None or jax.distributed.is_initialized():
        return
    more: dict[str, Any] = {}
    if by == "environment":
        missing = [name for name in EXPLICIT if not os.environ.get(name)]
        if missing:
            raise UserError(f"{EXPLICIT[0]} is set, and so must be {', '.join(missing)}")
        try:
            count, index = (int(os.environ[name]) for name in EXPLICIT[1:])
        except ValueError:
            raise UserError(f"{EXPLICIT[1]} and {EXPLICIT[2]} must be whole numbers") from None
        if not 0 <= index < count:
            raise UserError(f"{EXPLICIT[2]} must be from 0 to {count - 1}, one less than {EXPLICIT[1]}, not {index}")
        more = {
            "coordinator_address": os.environ[EXPLICIT[0]], "num_processes": count, "process_id": index,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    elif by == "mpirun" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        more = _by_open_mpi()
    if by in ("srun", "mpirun") and _has_devices_of_its_own():
        more["local_device_ids"] = []  # all that it sees; jax would take the one of its number among the host's tasks
    if by == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError(f'in an indexed job of Kubernetes this needs its client: pip install "jax[k8s]"; {APART}')
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # CPU programs that overlap would meet in another order in each process, and wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT, **more)
    except (RuntimeError, ValueError) as error:
        if by == "TPU slice" and isinstance(error, ValueError) and "TPU_WORKER_HOSTNAMES" not in os.environ:
            return  # a device that looks like a TPU, and nothing that tells of other hosts
        reason = " ".join(str(error).split())[:200]
        said = f"started by {by}: the job's other processes cannot be reached ({reason}); {APART}"
        raise UserError(said) from None
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        found = ", ".join(f"process {index} {count}" for index, count in sorted(counts.items()))
        raise UserError(f"all processes of a job need the same number of devices, and these have: {found}")


def several() -> bool:
    """Whether this job has more than one process. Does not load jax: without it nobody has joined others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def follows() -> bool:
    """Whether another process is the one that speaks and writes for all."""
    if not several():
        return False
    import jax

    return jax.process_index() > 0


def agreed(say: Callable[[], T]) -> T:
    """What `say` returns in the first process, in all of them. Plain data; a `UserError` is raised in all too.

    All processes must call it at the same place.
    """
    if not several():
        return say()
    from jax.experimental import multihost_utils

    word, kept = b"", None
    if not follows():
        try:
            word = json.dumps({"value": say()}).encode()
        except UserError as error:
            word = json.dumps({"error": str(error)}).encode()
        except BaseException as error:  # the others must not wait for ever
            kept, word = error, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(word), np.int32)))
    sent = np.zeros(size, np.uint8) if follows() else np.frombuffer(word, np.uint8)
    got = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)))
    if kept is not None:
        raise kept
    if "error" in got:
        raise UserError(got["error"])
    return got["value"]


def largest(*numbers: int) -> list[int]:
    """Of each of the numbers the largest that any process has. All must call it at the same place."""
    if not several():
        return list(numbers)
    return _read(_everyones_largest(numbers))


def require_same(said: Mapping[str, Any]) -> None:
    """Make sure that all processes say the same: else they would compute one thing of several hosts' different files.

    All must call it at the same place.

    Args:
      said: plain data by a name for messages.

    Raises:
      UserError: in every process, with the names of what is not the same.
    """
    if not several():
        return
    from jax.experimental import multihost_utils

    names = [*agreed(lambda: list(said)), "what there is of these"]
    texts = [json.dumps(own, sort_keys=True) for own in (*map(said.get, names[:-1]), sorted(said))]
    own = np.frombuffer(b"".join(hashlib.sha256(text.encode()).digest() for text in texts), np.uint8)
    others = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(names), 32)
    odd = (others != others[:1]).any(axis=-1)
    if odd.any():
        what = ", ".join(name for name, own in zip(names, odd.any(axis=0), strict=True) if own)
        where = ", ".join(str(i) for i in np.flatnonzero(odd.any(axis=1)))
        raise UserError(
            f"process {where} of this job does not have what the first one has: {what}; the files and the options "
            "must be the same on all hosts"
        )


class Agreement:
    """`largest` of the same numbers again and again, without making devices wait for the answer.

    Several processes learn of each answer at the next call, when their devices have been given more to do; one process
    at once.
    """

    def __init__(self) -> None:
        self._asked: Any = None

    def __call__(self, numbers: Callable[[], tuple[int, ...]], last: bool) -> list[int]:
        """The largest of the numbers at the call before, or zeros; at the last call, those of now.

        Args:
          numbers: asked for unless the answer is one that its caller acts on: then they are about to change.
        """
        if not several() or last:
            return largest(*numbers())
        if self._asked is not None:
            found = _read(self._asked)
            self._asked = None
            if any(found):
                return found
        own = numbers()
        self._asked = _everyones_largest(own)
        return [0] * len(own)


def _everyones_largest(numbers: tuple[int, ...]) -> Any:
    """On the devices, and not waited for."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = Mesh(np.asarray(devices).reshape(jax.process_count(), -1), ("process", "device"))
    place, own = NamedSharding(mesh, PartitionSpec("process")), np.asarray(numbers, np.int32)[None]
    parts = jax.make_array_from_callback((jax.process_count(), len(numbers)), place, lambda _: own)
    return _column_maxima(NamedSharding(mesh, PartitionSpec()))(parts)


def _read(asked: Any) -> list[int]:
    return [int(x) for x in np.asarray(asked.addressable_data(0))]


@functools.cache
def _column_maxima(place: Any) -> Any:
    import jax

    return jax.jit(lambda x: x.max(axis=0), out_shardings=place)


_meetings = itertools.count()  # a barrier's name serves once


def meetings(name: str) -> Callable[[str], None]:
    """A function that waits until all processes of the job have called theirs with the same key, each key once.

    All must ask for it at the same place. Not through the devices: another thread than the one that runs programs may
    call it.
    """
    if not several():
        return lambda key: None
    from orbax.checkpoint import multihost

    meet, own = multihost.get_barrier_sync_fn(), next(_meetings)
    return lambda key: meet(key=f"{name} {own} {key}", timeout_ms=1000 * PATIENCE)


def leave(status: int) -> None:
    """Come to the end of this process, and wait for the others: the first may have much to write yet.

    After a failure, if they do not come to theirs soon, exit at once: jax would wait for them, they for an answer of
    this process, and nobody would end.
    """
    from orbax.checkpoint import multihost

    try:
        multihost.get_barrier_sync_fn()(key="leave", timeout_ms=1000 * (LEAVING if status else ENDING))
    except Exception:  # jax's errors of a barrier are many
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# Where the first process has what this one works on a copy of.
_firsts: dict[Path, Path] = {}


def firsts(path: Path) -> Path:
    """A place below the folder of `own_folder`, as the first process sees it."""
    for own, first in _firsts.items():
        if path.is_relative_to(own):
            return first / path.relative_to(own)
    return path


def _not_copied(root: Path, folder: str, names: list[str]) -> set[str]:
    """Locks, what is half-written, checkpoints and waypoints, which all read where they are, and what is written anew;
    of an evaluation's journal, whose folders have the names of models, nothing but the first two."""
    kept = shutil.ignore_patterns("lock", ".*.part")(folder, names)
    if not {"journal", "evaluation"}.isdisjoint(Path(folder).relative_to(root).parts):
        return kept
    apart = re.compile(r"candidates|merges|model|waypoints|(damaged-)?step-\d{8,}")
    return kept | {name for name in names if apart.fullmatch(name) and Path(folder, name).is_dir()}


def _contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of what `own_folder` copies of a folder, by its place."""
    found = {}
    for place, folders, files in os.walk(folder):
        left = _not_copied(folder, place, [*folders, *files])
        folders[:] = [name for name in folders if name not in left]
        for path in (Path(place, name) for name in files if name not in left):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def own_folder(out: str | Path) -> Iterator[Path]:
    """The folder that this process works in: `out` itself in the first one, in the others a copy of what is there now,
    which is gone afterwards.

    So all find the same unfinished work, and one of them goes on with it on disk.
    """
    if not several():
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="unlearnjax-") as scratch:
        place, failed = Path(out), None
        if follows():
            place = Path(scratch).resolve() / "out"
            source = Path(out).expanduser().resolve()
            _firsts[place] = source
            try:
                if source.is_dir():
                    shutil.copytree(source, place, ignore=functools.partial(_not_copied, source))
            except (OSError, shutil.Error) as error:
                failed = error
        # Nobody changes anything before all have looked.
        if largest(failed is not None)[0]:
            reason = "another process could not" if failed is None else str(failed)[:200]
            raise UserError(f"{out}: could not be copied to {tempfile.gettempdir()} by every process ({reason})")
        # A host may see its file system as it was a while ago.
        require_same({f"{out}/{name}": own for name, own in _contents(place.expanduser()).items()})
        try:
            yield place
        finally:
            _firsts.pop(place, None)


def fetch(tree: Any) -> Any:
    """Arrays in host memory, whole in every process."""
    import jax
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree) if several() else jax.device_get(tree)


def from_first(tree: Any) -> Any:
    """Arrays as the first process has them, in all. All must call it at the same place."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def put(tree: Any, places: Any) -> Any:
    """Host arrays, the same in every process, laid where `places` says; each process handles its own devices' parts."""
    import jax

    def one(x: Any, place: Any) -> Any:
        if place.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, place)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(one, tree, places)
