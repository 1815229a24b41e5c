"""Our reader and writer against the official library, and what they say about broken files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from safetensors import safe_open

from unlearnjax.errors import UserError
from unlearnjax.io.safetensors import DTYPES, INDEX, SINGLE, Entry, open_file, open_folder, write_file, write_sharded

PLAIN = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"]


def sample(kind, shape=(3, 4)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 2, shape).astype(bool) if kind == "BOOL" else rng.normal(size=shape).astype(DTYPES[kind])


def entries(tensors):
    return [Entry(name, x.shape, x.dtype, x) for name, x in tensors.items()]


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def slot(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def message(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_what_the_official_library_writes(tmp_path):
    tensors = {kind: sample(kind) for kind in PLAIN if kind != "U64"} | {"empty": np.zeros((0, 3), np.float32)}
    tensors |= {"scalar": np.array(2.5, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    file = open_file(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"} and file.slots.keys() == tensors.keys()
    for name, x in tensors.items():
        y = file.read(name)
        assert y.dtype == x.dtype and y.shape == x.shape
        np.testing.assert_array_equal(y, x)


def test_the_official_library_reads_what_we_write(tmp_path):
    tensors = {kind: sample(kind) for kind in PLAIN} | {"empty": np.zeros((0, 3), np.float32)}
    tensors["not contiguous"] = sample("F32", (4, 6))[:, ::2].T
    write_file(tmp_path / "x.safetensors", entries(tensors))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, x in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), x)


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E5M2", "C64"])
def test_dtypes_that_numpy_lacks_agree_with_torch(tmp_path, kind):
    import torch
    from safetensors.torch import load_file, save_file

    torch_kind = {
        "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    }[kind]  # fmt: skip
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch_kind)
    save_file({"x": x}, tmp_path / "theirs.safetensors")
    ours = open_file(tmp_path / "theirs.safetensors").read("x")
    assert ours.dtype == DTYPES[kind]
    wide = np.complex64 if kind == "C64" else np.float32
    np.testing.assert_array_equal(ours.astype(wide), x.to(torch.complex64 if kind == "C64" else torch.float32).numpy())
    write_file(tmp_path / "ours.safetensors", entries({"x": ours}))
    assert torch.equal(load_file(tmp_path / "ours.safetensors")["x"].view(torch.uint8), x.view(torch.uint8))


def test_tensors_are_views_of_the_file(tmp_path):
    write_file(tmp_path / "x.safetensors", entries({"x": sample("F32"), "y": sample("BF16")}))
    file = open_file(tmp_path / "x.safetensors")
    for name in "xy":
        view = file.read(name)
        assert np.shares_memory(view, file.data) and not view.flags.writeable
    assert "z" in message(file.read, "z")


def test_a_part_of_a_tensor_is_copied(tmp_path):
    x = np.arange(24, dtype=np.float16).reshape(4, 6)
    write_file(tmp_path / "x.safetensors", entries({"w": np.zeros(3, np.int8), "x": x}))
    file = open_file(tmp_path / "x.safetensors")
    out = np.zeros(5, np.float16)
    file.read_into(out, "x", 7)
    np.testing.assert_array_equal(out, x.reshape(-1)[7:12])
    assert "'z'" in message(file.read_into, out, "z")
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "became shorter" in message(file.read_into, out, "x")


def test_shards_hold_their_limit_and_one_tensor_lives_at_a_time(tmp_path):
    alive = []

    def make(i):
        def value():
            assert not alive, "the tensor before was still held"
            alive.append(i)
            x = Tracked(np.full((10, 10), i, np.float32))
            return x

        return value

    class Tracked:
        def __init__(self, x):
            self.x = x

        def __array__(self, dtype=None, copy=None):
            return self.x

        def __del__(self):
            alive.clear()

    write_sharded(tmp_path, ((f"t{i}", (10, 10), np.float32, make(i)) for i in range(7)), max_shard_bytes=1000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    assert index["weight_map"]["t2"] == "model-00002-of-00004.safetensors"
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    folder = open_folder(tmp_path)
    for i in range(7):
        np.testing.assert_array_equal(folder.read(f"t{i}"), np.full((10, 10), i, np.float32))


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path):
    sizes = {"a": 10, "big": 1000, "b": 10}
    write_sharded(tmp_path, entries({n: np.zeros(s, np.float32) for n, s in sizes.items()}), max_shard_bytes=200)
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) == 3


def test_one_shard_needs_no_index(tmp_path):
    write_sharded(tmp_path, entries({"x": sample("F32")}))
    assert [p.name for p in tmp_path.iterdir()] == [SINGLE]
    np.testing.assert_array_equal(open_folder(tmp_path).read("x"), sample("F32"))


def test_the_writer_refuses_what_it_cannot_name(tmp_path):
    x = np.zeros(3, ml_dtypes.int4)
    assert "'x' has dtype int4" in message(write_file, tmp_path / "x", entries({"x": x}))
    assert "'x' is given twice" in message(write_file, tmp_path / "x", 2 * entries({"x": np.zeros(3)}))
    with pytest.raises(ValueError, match="x: float64"):
        write_file(tmp_path / "x", [Entry("x", (3,), np.float32, np.zeros(3))])


BROKEN = {
    "short": (b"\x01\x02", "truncated: 2 bytes"),
    "empty": (b"", "truncated: 0 bytes"),
    "header cut": (raw({"x": slot()})[:20], "truncated inside its header"),
    "huge header": (raw({}, length=2**62), "not a safetensors file"),
    "no JSON": (raw(b"\x80\x02}q\x00."), "header is not JSON"),
    "a list": (raw([1]), "not a JSON object"),
    "twice": (raw(b'{"x":%b,"x":%b}' % (2 * (json.dumps(slot()).encode(),)), bytes(8)), "names 'x' twice"),
    "data cut": (raw({"x": slot(), "y": slot(8, 16)}, bytes(12)), "truncated: tensor 'y' ends at byte 16"),
    "overlap": (raw({"x": slot(), "y": slot(4, 12)}, bytes(12)), "'y' overlaps tensor 'x'"),
    "hole": (raw({"x": slot(), "y": slot(12, 20)}, bytes(20)), "'y' leaves a hole after tensor 'x'"),
    "late start": (raw({"x": slot(8, 16)}, bytes(16)), "'x' leaves a hole after the header"),
    "too long": (raw({"x": slot()}, bytes(20)), "12 bytes after tensor 'x' belong to no tensor"),
    "size": (raw({"x": slot(shape=(3,))}, bytes(8)), "'x' takes 8 bytes where F32 [3] takes 12"),
    "dtype": (raw({"x": slot(dtype="F31")}, bytes(8)), "'x' has dtype 'F31', which is not known"),
    "listed dtype": (raw({"x": slot(dtype=["F32"])}, bytes(8)), "which is not known"),
    "negative": (raw({"x": slot(-8, 0)}, bytes(8)), "'x' has offsets [-8, 0]"),
    "backwards": (raw({"x": slot(8, 0)}, bytes(8)), "'x' has offsets [8, 0]"),
    "shape": (raw({"x": slot(shape=(2.0,))}, bytes(8)), "'x' has shape [2.0]"),
    "true": (raw({"x": slot(shape=(True, 2))}, bytes(8)), "'x' has shape [True, 2]"),
    "keys": (raw({"x": {"dtype": "F32"}}), "'x' lacks dtype, shape or data_offsets"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(tmp_path, case):
    content, says = BROKEN[case]
    path = tmp_path / SINGLE
    path.write_bytes(content)
    text = message(open_folder, tmp_path)
    assert str(path) in text and says in text
    if case != "twice":  # the official reader quietly takes the last of them
        with pytest.raises(safetensors.SafetensorError), safe_open(path, "np"):
            pass


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / SINGLE
    write_file(path, entries({"x": sample("F32"), "y": sample("F16")}))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "truncated" in message(open_folder, tmp_path)


def sharded(folder, **weights):
    write_file(folder / "a.safetensors", entries({"x": sample("F32")}))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"} | weights}))
    return folder


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/a.safetensors", "b/../../a.safetensors", "..\\a.safetensors", "C:\\a.safetensors"],
)
def test_an_index_may_not_leave_its_folder(tmp_path, name):
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "a.safetensors", entries({"y": sample("F32")}))
    text = message(open_folder, sharded(tmp_path / "model", y=name))
    assert "'y' points to" in text and INDEX in text


def test_an_index_names_safetensors_only(tmp_path):
    assert "'y' points to 'pytorch_model.bin'" in message(open_folder, sharded(tmp_path, y="pytorch_model.bin"))


def test_what_an_index_promises_must_be_there(tmp_path):
    assert "b.safetensors: missing" in message(open_folder, sharded(tmp_path, y="b.safetensors"))
    assert "a.safetensors: holds no tensor 'y'" in message(open_folder, sharded(tmp_path, y="a.safetensors"))
    for content in ("{", "[]", "{}", '{"weight_map": {"x": 1}}', '{"weight_map": {}}'):
        (tmp_path / INDEX).write_text(content)
        assert INDEX in message(open_folder, tmp_path)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_file(tmp_path / "blobs" / "0f3a", entries({"x": sample("F32")}))
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/0f3a")
    np.testing.assert_array_equal(open_folder(tmp_path / "snapshot").read("x"), sample("F32"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_with_the_command_that_converts(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    text = message(open_folder, tmp_path)
    assert name in text and "python -c" in text and "save_pretrained" in text


def test_a_folder_without_weights_says_so(tmp_path):
    assert "holds neither" in message(open_folder, tmp_path)
    assert "holds neither" in message(open_folder, tmp_path / "nowhere")
