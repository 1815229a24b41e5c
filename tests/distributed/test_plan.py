"""Plans: compiled for TPUs that are not here, counted against the closed form, and what the command says."""

import json
import math

import jax
import pytest

from tests.kernels.base import v5e
from unlearnjax.cli.main import main
from unlearnjax.distributed import plan
from unlearnjax.distributed.choose import best_way, fastest, meshes, most_candidates, ways
from unlearnjax.distributed.costs import Costs
from unlearnjax.distributed.estimate import candidates_together, estimate, merge_held, step_flops, tokens_of
from unlearnjax.distributed.mesh import make_mesh
from unlearnjax.distributed.plan import Compiled, Plan, Tried, Way, compile_program, make_plan, plan_as_plain, render
from unlearnjax.distributed.programs import Workload, merge_step, training_step
from unlearnjax.distributed.rules import whole
from unlearnjax.distributed.topology import CHIPS, chip_of, known_chip, parse_topology, tpu_devices
from unlearnjax.errors import UserError
from unlearnjax.models.abstract import weight_bytes
from unlearnjax.models.config import ModelConfig, replace
from unlearnjax.models.config_json import config_to_hf

SMALL = ModelConfig(
    "olmo", 1024, 256, 768, 12, 8, 8, 32, "layer", max_positions=512, eos_token_ids=(0,), pad_token_id=1
)
OLMO_7B = replace(
    SMALL, vocab_size=50304, hidden_size=4096, intermediate_size=11008, layers=32, heads=32, kv_heads=32, head_dim=128
)  # fmt: skip
EIGHT = parse_topology("v5e-8")


@pytest.fixture(autouse=True)
def _compiler():
    v5e()


@pytest.mark.slow
def test_a_plan_counts_what_the_closed_form_counts_and_fits():
    work = Workload(16, rank=8, set_tokens=4096)
    sizes = {"candidate": 2, "fsdp": 4}
    found = make_plan(SMALL, EIGHT, work, sizes, whole=False)
    own, way = found.best.training, best_way(SMALL, work, sizes, EIGHT.chip)[0]
    assert own.fits and own.costs.unknown == 0
    assert own.costs.flops == pytest.approx(step_flops(SMALL, way) / 8, rel=0.01)
    assert found.best.way == (way.remat, candidates_together(way, 8), 8)
    assert sum(own.held.values()) + own.temporary == own.total
    assert own.held["base weights"] == weight_bytes(SMALL, "bfloat16") / 4
    assert own.held["optimizer"] == pytest.approx(2 * own.held["adapters"], rel=1e-3)
    # The base is gathered once in each pass over the layers, forward, again and backward, and not more often.
    base = 12 * (4 * 256 * 256 + 3 * 256 * 768) * 2
    assert own.costs.collectives["all-gather"].bytes < 2 * 3 * base * 3 / 4
    text = render(plan_as_plain(found))
    assert "best: --mesh candidate=2,fsdp=4" in text and "training step: fits" in text


def test_what_does_not_fit_is_said_with_what_it_would_take():
    wide = replace(OLMO_7B, layers=12)
    program = training_step(wide, make_mesh({"candidate": 8}, v5e()), Workload(64, rank=64, micro_batch=8))
    own = compile_program(program, EIGHT.chip)
    assert not own.fits and own.total > own.available > 15 * 2**30 and own.costs is None


def test_a_program_in_parts_is_read_whole(tmp_path):
    """XLA writes what runs on SparseCores (of v5p, v6e) as programs beside, named so that they sort behind it."""
    for name, text in (("module_0000.jit_run", "all of it"), ("module_0101.extracted", "a part")):
        (tmp_path / f"{name}.after_optimizations.txt").write_text(text)
    assert plan._text(tmp_path, "*.after_optimizations.txt") == "all of it"
    assert plan._text(tmp_path, "*.before.txt") is None


@pytest.mark.parametrize("name", ["v5e-8", "v5p-16", "v6e-8"])
def test_a_slice_has_the_devices_that_its_name_says(name):
    topology = parse_topology(name)
    assert len(tpu_devices(topology)) == topology.devices == 8


def test_the_closed_form_knows_how_many_sides_an_objective_reads():
    work = Workload(4)
    assert step_flops(SMALL, work._replace(terms=("npo",))) == step_flops(SMALL, work) / 2


def test_a_loop_of_unknown_length_is_told():
    own = Compiled("merge", True, {}, 0, 0, 2**30, Costs(1e12, 1e9, {}, 1), 1.0)
    tried = Tried({"candidate": 8}, Way("linears", 1, 4), own)
    text = render(plan_as_plain(Plan(EIGHT, Workload(8), [tried], tried)))
    assert "length of a loop is not in the program" in text and "bound by products" in text
    assert "mesh candidate=8: remat linears, 1 of 4 candidates at a time" in text


def test_meshes_that_cannot_fit_come_last_and_waste_comes_late():
    chip = CHIPS["v5e"]
    ordered = meshes(OLMO_7B, Workload(16), 8, chip)
    first, last = (estimate(OLMO_7B, Workload(16), sizes, chip) for sizes in (ordered[0], ordered[-1]))
    assert first.held < 0.9 * chip.memory < last.held
    assert ordered[0]["fsdp"] * ordered[0]["tensor"] > 1
    for sizes in ordered:
        assert sizes["candidate"] * sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 8


@pytest.mark.slow
def test_the_command_needs_no_more_than_a_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    out = tmp_path / "plan.json"
    command = ["plan", "--model", str(tmp_path), "--candidates", "4", "--rank", "8", "--length", "128", "--quiet"]
    assert main([*command, "--topology", "v5e-4", "--mesh", "candidate=4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "generation step: fits" in said and "ties of all linears: fits" in said
    found = json.loads(out.read_text())
    assert found["best"] == "candidate=4" and found["tried"][0]["gib"]["base weights"] > 0
    assert found["tried"][0]["way"] == {"remat": "linears", "together": 1, "candidates": 1}
    assert main([*command, "--topology", "h100-8", "--remat", "full"]) == 0
    said = capsys.readouterr().out
    assert "GPUs by analysis" in said and "remat full" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5e-9"], "no such slice"), (["--topology", "v5e-8", "--candidates", "0"], "at least 1"),
        (["--topology", "v5e-8", "--mesh", "candidate=3"], "there are 8"),
        (["--topology", "v5e-8", "--length", "999"], "context holds 512"),
        (["--topology", "v5e-8", "--objective", "sugd"], "forget and retain rows alone"),
        (["--topology", "v5e-8", "--objective", "dpo"], "forget and retain rows alone"),
        (["--topology", "h100-8", "--mesh", "candidate=3"], "there are 8"),
        (["--topology", "v5e-8", "--out", "no/such/plan.json"], "no such folder"),
        (["--topology", "v5e-8", "--length", "1"], "at least 2"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, arguments, words):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    assert main(["plan", "--model", str(tmp_path), "--quiet", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_sixteen_candidates_of_olmo_7b_fit_eight_chips_and_their_merge_does_too():
    sizes = {"candidate": 2, "fsdp": 4}
    found = make_plan(OLMO_7B, EIGHT, Workload(16), sizes)
    own, (generation, merged) = found.best.training, found.best.others
    way, said = best_way(OLMO_7B, Workload(16), sizes, EIGHT.chip)
    assert own.fits and 0.8 < own.total / said.held < 1.05
    assert generation.fits and merged.fits and merged.temporary < 5 * 2**30
    assert {"base weights", "candidates", "results"} <= set(merged.held)
    assert own.costs.flops == pytest.approx(step_flops(OLMO_7B, way) / 8, rel=0.01)
    assert merged.total == pytest.approx(merge_held(OLMO_7B, Workload(16), sizes), rel=0.1)


def test_as_many_candidates_as_a_device_holds():
    many, chip = Workload(128), parse_topology("v5e-8").chip
    held = lambda n, sizes: best_way(OLMO_7B, Workload(n), sizes, chip)[1].held  # noqa: E731
    for sizes in ({"fsdp": 8}, {"candidate": 2, "fsdp": 4}):
        most = most_candidates(OLMO_7B, many, sizes, chip.memory)
        apart = sizes.get("candidate", 1)
        assert 1 < most < 128 and most % apart == 0
        assert held(most, sizes) <= 0.9 * chip.memory < held(most + apart, sizes)
    assert most_candidates(OLMO_7B, many, {"fsdp": 8}, 1.0) == 1
    assert most_candidates(OLMO_7B, many, {"fsdp": 8}, 1e15) == 128


def test_the_way_that_fits_and_computes_least_comes_first():
    """As memory becomes less: fewer candidates at a time, then whole layers once more; never more than is there."""
    work, sizes = Workload(16), {"fsdp": 8}
    found = []
    for memory in (80e9, 16e9, 12e9, 9e9, 7e9):
        chip = EIGHT.chip._replace(memory=memory)
        way, own = best_way(OLMO_7B, work, sizes, chip)
        assert own.held <= 0.9 * memory and own == estimate(OLMO_7B, way, sizes, chip)
        found.append((way.remat, candidates_together(way, 16)))
        assert ways(OLMO_7B, work, sizes, chip)[0] == way
    assert found[0] == ("linears", 16)
    together = [n for remat, n in found if remat == "linears"]
    assert together == sorted(together, reverse=True) and len(set(together)) > 1
    assert found[-1][0] == "full"
    # Gathering the base for every group takes longer than computing once more.
    slow = EIGHT.chip._replace(link=EIGHT.chip.link / 4)
    assert best_way(OLMO_7B, work, sizes, slow)[0].remat == "full"
    # What is asked for stays.
    asked = work._replace(remat="full", tokens_at_once=4096)
    assert ways(OLMO_7B, asked, sizes, EIGHT.chip) == [asked]
    # Groups of one size where candidates lie apart, as the step makes them.
    odd = Workload(14, tokens_at_once=4 * tokens_of(work))
    assert candidates_together(odd, 14) == 4 and candidates_together(odd, 7) == 1


def test_a_mesh_without_room_for_the_merge_comes_after_those_that_have_it():
    work, memory = Workload(32), 0.9 * EIGHT.chip.memory
    order = meshes(OLMO_7B, work, 8, EIGHT.chip)
    trains = [sizes for sizes in order if best_way(OLMO_7B, work, sizes, EIGHT.chip)[1].held <= memory]
    merges = [merge_held(OLMO_7B, work, sizes) <= memory for sizes in trains]
    assert merges == sorted(merges, reverse=True) and len(set(merges)) == 2


def test_a_run_and_a_plan_choose_the_same_mesh():
    """By default, of devices that say what they are; where not all candidates fit, the best of fewer."""
    chip = chip_of("TPU v5 lite", 256, 16 * 2**30)
    assert chip == CHIPS["v5e"]
    work = Workload(8)
    best = fastest(OLMO_7B, [work], 256, chip)
    assert best == meshes(OLMO_7B, work, 256, chip)[0]
    assert estimate(OLMO_7B, work, best, chip).seconds < 0.1 * estimate(OLMO_7B, work, {"candidate": 8}, chip).seconds
    most = fastest(OLMO_7B, [Workload(4096)], 8, chip)
    assert 1 < most_candidates(OLMO_7B, Workload(4096), most, chip.memory) < 4096
    # Groups train one after another: one axis of candidates must suit all.
    for sizes in (fastest(OLMO_7B, [Workload(7), Workload(1)], 8, chip), fastest(OLMO_7B, [Workload(1)], 8, chip)):
        assert sizes["candidate"] == 1 and math.prod(sizes.values()) == 8


def test_a_device_says_what_it_is():
    kinds = {
        "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-40GB": "a100", "something": "a100",
    }  # fmt: skip
    assert {kind: chip_of(kind, 8, 7)._replace(memory=0) for kind in kinds} == {
        kind: CHIPS[name]._replace(memory=0) for kind, name in kinds.items()
    }
    assert known_chip("NVIDIA H100 PCIe") is None and known_chip("something") is None  # whose rates are not known
    assert chip_of("NVIDIA H100 80GB HBM3", 64, 7).link == 50e9 and chip_of("TPU v6e", 64, 7).memory == 7


def test_of_meshes_that_do_not_fit_the_nearest_to_it_comes_first():
    chip, work = EIGHT.chip, Workload(64)
    order = meshes(OLMO_7B, work, 8, chip)
    found = [best_way(OLMO_7B, work, sizes, chip)[1] for sizes in order]
    fits = [own.held <= 0.9 * chip.memory for own in found]
    assert fits == sorted(fits, reverse=True) and not all(fits)
    for merges in (True, False):
        mergeable = [(merge_held(OLMO_7B, work, sizes) <= 0.9 * chip.memory) == merges for sizes in order]
        beyond = [own.held for own, fit, this in zip(found, fits, mergeable, strict=True) if this and not fit]
        assert beyond == sorted(beyond)
        seconds = [own.seconds for own, fit, this in zip(found, fits, mergeable, strict=True) if this and fit]
        assert seconds == pytest.approx(sorted(seconds), rel=1e-5)


@pytest.mark.slow
def test_a_mesh_that_the_compiler_fails_at_is_passed_over(monkeypatch):
    real, asked = plan.compile_program, []

    def failing(program, chip):
        asked.append(program)
        if len(asked) == 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: expected another shape")
        return real(program, chip)

    monkeypatch.setattr(plan, "compile_program", failing)
    said = []
    found = make_plan(SMALL, EIGHT, Workload(2, 1, 32, 2), tries=2, whole=False, say=said.append)
    assert len(asked) == 2 and len(found.tried) == 1 and found.best is not None
    assert any("the compiler failed (INTERNAL: expected another shape)" in line for line in said)
    asked.clear()
    with pytest.raises(UserError, match=r"v5e:2x4: mesh fsdp=8: the compiler failed .*; try another --mesh"):
        make_plan(SMALL, EIGHT, Workload(2, 1, 32, 2), {"fsdp": 8}, whole=False)


def _compiled(name, gib, fits=True):
    return Compiled(
        name, fits, {}, 0, int(gib * 2**30), 16 * 2**30, Costs(gib * 1e12, 1e9, {}, 0) if fits else None, 1.0
    )


def test_a_mesh_whose_merge_does_not_fit_is_not_the_best(monkeypatch):
    """The first mesh trains faster, and cannot merge."""
    for name in ("training_step", "generation_step", "merge_step"):
        monkeypatch.setattr(plan, name, lambda config, mesh, *more, name=name: (name, dict(mesh.shape)))
    first, second = meshes(SMALL, Workload(2), 8, EIGHT.chip)[:2]

    def compiled(program, chip):
        name, sizes = program
        return _compiled(name, 1 if sizes == first else 2, fits=name != "merge_step" or sizes == second)

    monkeypatch.setattr(plan, "compile_program", compiled)
    found = make_plan(SMALL, EIGHT, Workload(2), tries=2)
    assert found.best.sizes == second and not found.tried[0].fits
    assert "merge_step: does not fit" in render(plan_as_plain(found))


def test_what_lies_beside_a_merge_counts():
    """A base too large to lie beside the merge of a narrow model."""
    mesh, work = make_mesh({"candidate": 8}, v5e()), Workload(2, rank=2)
    program = merge_step(SMALL, mesh, work, "linear", {})
    alone = compile_program(program, EIGHT.chip)
    assert alone.fits and alone.held["base weights"] == weight_bytes(SMALL, "bfloat16")
    beside = {**program.beside, "another model": jax.ShapeDtypeStruct((16 * 2**30,), "int8", sharding=whole(mesh))}
    assert not compile_program(program._replace(beside=beside), EIGHT.chip).fits
