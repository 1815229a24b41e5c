"""Processes of one machine become one job, however they were started, and say, write and read the same."""

import json
import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.distributed.digest import digest_of
from unlearnjax.distributed.processes import Agreement, agreed, fetch, follows, largest, own_folder, several
from unlearnjax.io.safetensors import Entry, open_folder, write_file

PROGRAM = """
import json, sys
from pathlib import Path
from unlearnjax.distributed.processes import Agreement, agreed, fetch, firsts, follows, join, largest, leave, meetings
from unlearnjax.distributed.processes import from_first, own_folder, put, require_same
from unlearnjax.errors import UserError
from unlearnjax.io import safetensors
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.locks import lock_for_all
from unlearnjax.merging import concatenate_lora
from unlearnjax.training.interrupt import Interrupted, Stop
from unlearnjax.training.waypoints import read_waypoint, recorder
join()
import jax, numpy as np
from types import SimpleNamespace
from jax.sharding import NamedSharding, PartitionSpec
me = jax.process_index()
said = {"process": me, "processes": jax.process_count(), "devices": jax.device_count(), "follows": follows()}
said["agreed"] = agreed(lambda: {"of": me})
said["from_first"] = np.asarray(from_first({"a": np.full(2, me + 5.0, np.float32)})["a"]).tolist()
said["largest"] = largest(me, 1 - me, 7)
# Process 1 wants to save at the third call, and to stop at the last; what is acted on is not asked for anew.
calls, asked, agree = [], [], Agreement()
for at in range(1, 8):
    def wishes():
        asked.append(at)
        return me * 15 * (at == 7), int(me and at == 3)
    calls.append(agree(wishes, at == 7))
said["agreements"], said["asked"] = calls, asked
def wrong():
    raise UserError(f"not in {me}")
try:
    agreed(wrong)
except UserError as error:
    said["error"] = str(error)
require_same({"a": [1, 2], "b": me * 0})
try:
    require_same({"a": [1, 2], "b": me, "c": {"x": me}})
except UserError as error:
    said["odd"] = str(error)
mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.arange(8, dtype=np.float32)
y = put({"x": x}, {"x": NamedSharding(mesh, PartitionSpec("x"))})["x"]
said["held"] = sorted(float(v) for s in y.addressable_shards for v in s.data)
said["fetched"] = {name: got.tolist() for name, got in fetch({"y": y * 2, "z": x}).items()}
meet = meetings("test")
meet("a"), meet("b")
with own_folder(sys.argv[1]) as place:
    said["there"] = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
    said["own"], said["firsts"] = str(place), str(firsts(place / "a" / "b"))
    (place / "mine").write_text(str(me))
    write, said["wrote"] = safetensors.write_file, []
    def noted(path, *rest):
        said["wrote"].append(path.name[7:12])
        write(path, *rest)
    safetensors.write_file = noted
    tensors = [(f"t{i}", (8,), np.float32, lambda i=i: fetch(y * i)) for i in range(3)]
    with staged_folder(place / "model") as staged:
        safetensors.write_sharded(staged, tensors, 32)
    # The second process cannot write its file: nobody's folder appears.
    if me == 1:
        safetensors.write_file = None
    try:
        with staged_folder(place / "other") as staged:
            safetensors.write_sharded(staged, tensors, 32)
    except Exception as error:
        said["not written"] = f"{type(error).__name__}: {error}"
    largest(0)
    leaf = put(np.arange(8, dtype=np.float32), NamedSharding(mesh, PartitionSpec("x")))
    recorder(place / "waypoints", [2])(2, SimpleNamespace(trainable={"a": leaf}, updates=np.full(2, 3)))
    largest(0)
    way = read_waypoint(place / "waypoints", 2, {"a": 0})
    said["waypoint"] = way.trainable["a"].tolist(), way.updates.tolist(), (place / "waypoints").exists()
    try:
        said["locked"] = lock_for_all(place / "held") >= 0
        largest(0)
        lock_for_all(place / "held")
    except UserError as error:
        said["locked again"] = str(error)
# Both factors are cut over the processes.
cut = NamedSharding(mesh, PartitionSpec(None, None, None, "x")), NamedSharding(mesh, PartitionSpec(None, None, "x"))
lora = np.arange(32, dtype=np.float32).reshape(2, 1, 2, 8), np.ones((2, 1, 8, 2), np.float32)
pair = dict(zip("ab", put(lora, cut)))
joined = fetch(concatenate_lora({"q": pair}, np.ones(2, "f"))["q"])
said["joined"] = [joined["a"].tolist(), joined["b"].shape]
stop = Stop(signum=15 * me)
try:
    with stop.polling():
        pass
except Interrupted as error:
    said["stopped"] = error.signum
print(json.dumps(said), flush=True)
leave(0)
"""


JOINING = """
import json
from unlearnjax.distributed.processes import join, leave
from unlearnjax.errors import UserError
try:
    join()
except UserError as error:
    print(json.dumps(str(error)), flush=True)
leave(0)
"""


SAVING = """
import json, sys
from pathlib import Path
from unlearnjax.distributed.processes import join, leave, put
from unlearnjax.errors import UserError
join()
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from unlearnjax.training import checkpoint
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import Clock, Snapshot
from unlearnjax.training.pieces import held
me, said = jax.process_index(), []
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
cut, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
keep = open_keeper(Path(sys.argv[1]), {"device": {"processes": 2}}, every=0.0, say=said.append, resume=True)
write = checkpoint.write_arrays
def full(path, arrays):
    raise OSError(28, "No space left on device")
for step in (1, 2, 3):
    tree = put({"a": np.arange(8, dtype=np.float32) + step, "b": np.int32(step)}, {"a": cut, "b": whole})
    # Process 1 has no room for the third.
    checkpoint.write_arrays = full if me == 1 and step == 3 else write
    keep.save(Snapshot(step, jax.tree.map(held, tree), [], [], [], Clock()), wait=True)
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
if sys.argv[2] == "damage" and me == 0:
    path = Path(sys.argv[1]) / "step-00000002" / "part-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
if sys.argv[2] == "gone" and me == 1:  # its mount
    from unlearnjax.training import keeper
    def gone(path):
        raise checkpoint.Damaged("cannot be read")
    keeper.unseal, keeper.os.path.exists = gone, lambda path: False
try:
    got = keep.restore(like)
except UserError as error:
    keep.close()
    print(json.dumps({"error": str(error)}), flush=True)
    leave(0)
    sys.exit(0)
shards = {str(s.index[0].start): s.data.tolist() for s in got.states["a"].addressable_shards}
keep.close()
print(json.dumps({"step": got.step, "b": int(got.states["b"]), "a": shards, "said": said}), flush=True)
leave(0)
"""


READING = """
import json, sys
from pathlib import Path
from unlearnjax.distributed.processes import join, leave, own_folder
from unlearnjax.errors import UserError
join()
import jax, jax.numpy as jnp, numpy as np
from unlearnjax.distributed.digest import digest_of
from unlearnjax.distributed.mesh import make_mesh
from unlearnjax.distributed.rules import sharding
from unlearnjax.io import sharded
from unlearnjax.io.safetensors import open_folder
from unlearnjax.models.abstract import ArrayInfo
from unlearnjax.models.families import Source
me, folder = jax.process_index(), Path(sys.argv[1])
mesh = make_mesh({"fsdp": 2, "tensor": 2})
read, pieces = sharded.read_piece, []
def noted(checkpoint, name, index):
    pieces.append([name, *([part.start, part.stop] for part in index)])
    return read(checkpoint, name, index)
sharded.read_piece = noted
def source(path, names, shape, axes, stacked):
    return Source((path,), ArrayInfo(shape, jnp.float32, axes, None), tuple(names), stacked)
wanted = [
    source("up", ["up0", "up1"], (2, 8, 4), ("layers", "mlp", "embed"), True),
    source("odd", ["odd"], (6, 4), (None, "embed"), False),
    source("wide", ["wide"], (5, 4), (None, "embed"), False),
]
made = sharded.load_on(mesh, open_folder(folder), wanted)
said, shapes = {"pieces": sorted(pieces)}, [s.info.shape for s in wanted]
said["placed"] = [x.sharding == sharding(mesh, s.info.axes, s.info.shape) for x, s in zip(made, wanted)]
said["right"] = [
    bool((shard.data == np.arange(np.prod(shape)).reshape(shape)[shard.index]).all())
    for x, shape in zip(made, shapes) for shard in x.addressable_shards
]
said["digest"] = digest_of((str(i), x) for i, x in enumerate(made))
(Path(sys.argv[2]) / f"seen-{me}").write_text("x")
for name, look in {
    "other weights": lambda: sharded.load_on(mesh, open_folder(folder if me == 0 else folder / "other"), wanted),
    "other work": lambda: own_folder(Path(sys.argv[2]) / f"out{me}").__enter__(),
}.items():
    try:
        look()
    except UserError as error:
        said[name] = str(error)
print(json.dumps(said), flush=True)
leave(0)
"""


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def told(program, own, *arguments):
    """What two processes print last, as JSON."""
    processes, number = [], port()
    for i in range(2):
        env = {
            "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
            **own(number, i),
        }  # fmt: skip
        command = [sys.executable, "-c", program, *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True))
    found = []
    for process in processes:
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        found.append(json.loads(text.splitlines()[-1]))
    return found


def by_environment(number, i):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{number}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)
    }  # fmt: skip


def by_srun(number, i):
    return {
        "SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_NODES": "1",
    }  # fmt: skip


def by_mpirun(number, i):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{4096 * number}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }  # fmt: skip


def by_mpirun_5(number, i):
    return {
        "PMIX_NAMESPACE": f"prterun-localhost-{number}@1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }  # fmt: skip


@pytest.mark.parametrize("started", [by_environment, by_srun, by_mpirun, by_mpirun_5])
def test_two_processes_find_each_other_and_agree(started, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (
        "begun", "lock", "candidates/a", "checkpoints/step-00000001/a", "checkpoints/waypoints/a",
        "journal/model/full/attacks.jsonl",
    ):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    found = told(PROGRAM, started, str(out))
    for i, said in enumerate(found):
        assert said["process"] == i and said["processes"] == 2 and said["devices"] == 4
        assert said["follows"] == (i == 1)
        assert said["agreed"] == {"of": 0} and said["error"] == "not in 0"
        assert "process 1 of this job does not have what the first one has: b, c;" in said["odd"]
        assert said["from_first"] == [5.0, 5.0] and said["largest"] == [1, 1, 7]
        assert said["agreements"] == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0], [0, 0], [15, 0]]
        assert said["asked"] == [1, 2, 3, 5, 6, 7]
        assert said["held"] == [4.0 * i, 4.0 * i + 1, 4.0 * i + 2, 4.0 * i + 3]
        assert said["fetched"] == {"y": [2.0 * v for v in range(8)], "z": [1.0 * v for v in range(8)]}
        assert said["firsts"] == str(out / "a" / "b")
        assert said["waypoint"] == [[float(v) for v in range(8)], [3, 3], i == 0]
        assert said["locked"] == (i == 0) and "another process is working there" in said["locked again"]
        assert said["joined"] == [(np.arange(32.0).reshape(1, 4, 8) / 2).tolist(), [1, 8, 4]]
        assert said["stopped"] == 15
    first, second = found
    assert first["own"] == str(out) != second["own"]
    assert second["there"] == ["begun", "journal/model/full/attacks.jsonl"]
    assert first["wrote"] == 2 * ["00001", "00003"] and second["wrote"] == ["00002"]
    assert "another process could not write its files" in first["not written"] and "TypeError" in second["not written"]
    assert {p.name for p in out.iterdir() if p.is_file()} == {"begun", "lock", "mine"}
    model = open_folder(out / "model")
    assert [model.read(f"t{i}").tolist() for i in range(3)] == [[float(i * v) for v in range(8)] for i in range(3)]
    assert (out / "mine").read_text() == "0" and not os.path.exists(second["own"])


def test_processes_of_unlike_hosts_are_told():
    found = told(JOINING, lambda number, i: by_environment(number, i) | {"JAX_NUM_CPU_DEVICES": str(i + 1)})
    assert found[0] == found[1] and "these have: process 0 1, process 1 2" in found[0]


def test_a_checkpoint_that_one_process_cannot_see_stays_where_it_is(tmp_path):
    first, second = told(SAVING, by_environment, str(tmp_path / "checkpoints"), "gone")
    assert "step-00000002: another process cannot read it; it stays as it is: try again" in first["error"]
    assert "step-00000002: is not there for every process; it stays as it is: try again" in second["error"]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()} == {"step-00000001", "step-00000002"}


@pytest.mark.parametrize("damage", ["none", "damage"])
def test_processes_write_and_read_one_checkpoint(damage, tmp_path):
    """Of the third one process cannot write its part, and there is no third; a bit that is wrong for one is for all."""
    found = told(SAVING, by_environment, str(tmp_path / "checkpoints"), damage)
    step = 1 if damage == "damage" else 2
    for i, said in enumerate(found):
        assert said["step"] == said["b"] == step
        assert said["a"] == {str(2 * j): [2.0 * j + step, 2.0 * j + 1 + step] for j in (2 * i, 2 * i + 1)}
        assert "checkpoint of step 3 was not written; the one of step 2 stays" in said["said"][0]
        assert len(said["said"]) == 1 + (damage == "damage")
    first, second = (said["said"][0] for said in found)
    assert "process 1 could not write its part" in first and "No space left" in first
    assert "No space left" in second
    if damage == "damage":
        assert "in a part that another process reads" in found[0]["said"][1]
        assert "checksum of leaf a" in found[1]["said"][1]
    left = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()}
    assert left == {"step-00000001", "damaged-step-00000002" if damage == "damage" else "step-00000002"}


def test_processes_read_rows_of_one_model_and_see_the_same(tmp_path):
    """Arrays that are cut along the last axis are read by rows, where these divide, and exchanged."""
    shapes = {"up": (2, 8, 4), "odd": (6, 4), "wide": (5, 4)}
    whole = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    tensors = {"up0": whole["up"][0], "up1": whole["up"][1], "odd": whole["odd"], "wide": whole["wide"]}
    for folder, more in ((tmp_path, 0), (tmp_path / "other", 1)):
        folder.mkdir(exist_ok=True)
        write_file(
            folder / "model.safetensors",
            [Entry(n, x.shape, x.dtype, lambda x=x, more=more: x + more) for n, x in tensors.items()],
        )
    for i in range(2):
        journal = tmp_path / f"out{i}" / "checkpoints"
        journal.mkdir(parents=True)
        (journal / "kept.jsonl").write_text(str(i))
    found = told(READING, by_environment, str(tmp_path), str(tmp_path))
    for i, said in enumerate(found):
        assert all(said["placed"]) and all(said["right"])
        rows = {name: {tuple(own[1]) for own in said["pieces"] if own[0] == name} for name in tensors}
        assert rows["up0"] == rows["up1"] == {(4 * i, 4 * i + 2), (4 * i + 2, 4 * i + 4)}
        assert rows["odd"] == {(3 * i, 3 * i + 3)} and rows["wide"] == {(0, 5)}  # five rows are read by columns
        assert f"process 1 of this job does not have what the first one has: {tmp_path}" in said["other weights"]
        assert "kept.jsonl" in said["other work"]
    assert (
        found[0]["digest"]
        == found[1]["digest"]
        == digest_of((str(i), jnp.asarray(x)) for i, x in enumerate(whole.values()))
    )


def test_alone():
    assert not several() and not follows()
    assert agreed(lambda: [1]) == [1] and largest(1, 2) == [1, 2] and fetch({"a": 1}) == {"a": 1}
    assert Agreement()(lambda: (15, 0), False) == [15, 0]
    with own_folder("x") as place:
        assert str(place) == "x"
