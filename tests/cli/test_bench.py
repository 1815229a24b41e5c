"""The bench commands: every figure they print comes from what they ran."""

import json

import pytest

from unlearnjax.bench.training import SMALL
from unlearnjax.cli.main import main
from unlearnjax.distributed.estimate import step_flops
from unlearnjax.distributed.programs import Workload


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_merges_are_measured_beside_a_copy(tmp_path, capsys):
    out = tmp_path / "deep" / "merge.jsonl"
    argv = ["bench", "merge", "--method", "ties", "dare_linear", "--n", "2", "3", "--size", "8K", "--repeats", "2"]
    assert main([*argv, "--json", str(out), "--density", "0.4"]) == 0
    found = lines(out)
    assert [(x["method"], x["candidates"]) for x in found] == [(m, n) for n in (2, 3) for m in ("ties", "dare_linear")]
    for x in found:
        assert (x["size"], x["dtype"], x["settings"]) == (8192, "float32", {"density": 0.4})
        assert 0 < x["seconds"]["least"] <= x["seconds"]["median"] <= x["seconds"]["most"]
        # The figures' definitions, from the seconds.
        moved = 8192 * 4 * (x["candidates"] + 1)
        assert x["gb_per_second"] == pytest.approx(moved / x["seconds"]["median"] / 1e9, rel=2e-3)
        copy_rate = 2 * 8192 * 4 * x["candidates"] / x["copy_seconds"]["median"]
        assert x["percent_of_copy"] == pytest.approx(100e9 * x["gb_per_second"] / copy_rate, rel=1e-2)
    printed = capsys.readouterr().out
    assert printed.count("ties") == 2 and "% of copy" in printed


def test_a_mesh(tmp_path):
    out = tmp_path / "merge.jsonl"
    argv = ["bench", "merge", "--method", "consensus", "model_stock", "--size", "1M", "--dtype", "bf16"]
    assert main([*argv, "--mesh", "candidate=2,data=4", "--repeats", "1", "--json", str(out)]) == 0
    assert [(x["mesh"], x["devices"]) for x in lines(out)] == [("candidate=2,data=4", 8)] * 2
    # A device has its eighth of 8 candidates' 2 bytes an entry.
    assert [x["held_mib"] for x in lines(out)] == [pytest.approx(2, abs=0.05)] * 2


@pytest.mark.slow
def test_training(tmp_path, capsys):
    out = tmp_path / "train.jsonl"
    argv = ["bench", "train", "--n", "1", "2", "--micro-batch", "1", "--length", "16", "--rank", "2"]
    assert main([*argv, "--repeats", "1", "--json", str(out)]) == 0
    assert main([*argv, "--repeats", "1", "--json", str(out), "--mesh", "candidate=2,fsdp=2"]) == 0
    one, two, *meshed = lines(out)
    assert [(x["mesh"], x["devices"], x["candidates"]) for x in (one, two)] == [(None, 1, 1), (None, 1, 2)]
    assert [(x["mesh"], x["devices"]) for x in meshed] == [("candidate=2,fsdp=2", 4)] * 2
    assert [x["state_mib"] for x in meshed] == [x["state_mib"] for x in (one, two)]  # all candidates', wherever it lies
    assert all(x["held_mib"] < 0.6 * whole["held_mib"] for x, whole in zip(meshed, (one, two), strict=True))
    assert ["candidate=2 does not divide 1" in line for x in meshed for line in x["idle"]] == [True]
    printed = capsys.readouterr()
    assert "warning: bench: N = 1: candidate=2 does not divide 1" in printed.err
    for x in (one, two, *meshed):
        # The figures' definitions, from the seconds: the model's own products, of one device.
        flops = step_flops(SMALL, Workload(x["candidates"], 1, 16, 2), recomputed=False) / x["devices"]
        assert x["tflops"] == pytest.approx(flops / x["seconds"]["median"] / 1e12, rel=2e-3)
        assert x["percent_of_matmul"] == pytest.approx(100 * x["tflops"] / x["matmul_tflops"], rel=1e-2)
        assert x["mfu_percent"] is None and not x["flash"]  # a CPU
        tokens = x["candidates"] * 2 * 16
        assert x["tokens_per_second"] == pytest.approx(tokens / x["seconds"]["median"], rel=2e-3)
    assert two["state_mib"] == pytest.approx(2 * one["state_mib"], rel=0.1)
    assert "candidate-tokens/s" in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["merge", "--size", "4Q"], "size '4Q' is no number of entries"),
        (["merge", "--size", "0"], "size '0' is no number of entries"),
        (["merge", "--method", "tise"], "unknown method 'tise'; did you mean 'ties'?"),
        (["merge", "--mesh", "data=99"], "mesh data=99 needs 99 devices and there are 8"),
        (["merge", "--mesh", "model=2"], "axis 'model'"),
        (["train", "--mesh", "fsdp=0"], "fsdp must be a whole number above 0"),
        (["merge", "--mesh", "data=3", "--size", "1K"], "1024 entries cannot be cut evenly over 3 devices"),
        (["merge", "--dtype", "f64"], "unknown dtype 'f64'"),
        (["merge", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["train", "--n", "0"], "--n must be at least 1, not 0"),
        (["train", "--dropout", "1"], "--dropout must be at least 0 and below 1, not 1.0"),
        (["train", "--tokens-at-once", "0"], "--tokens-at-once must be at least 1, not 0"),
        (["train", "--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err
