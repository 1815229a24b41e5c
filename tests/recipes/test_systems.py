"""Candidates of several methods in one run: a LoRA, Selective Amnesia where the trace says, SUGD, AGAD; merged."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unlearnjax.cli.main import main
from unlearnjax.data.rows import write_rows
from unlearnjax.errors import UserError
from unlearnjax.io.locks import lock_folder
from unlearnjax.io.peft import load_adapter
from unlearnjax.merging.lora_space import lora_delta
from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import load_data, prepare
from unlearnjax.recipes.run import run
from unlearnjax.recipes.train_step import train_candidates
from unlearnjax.report.schema import read_report
from unlearnjax.report.trace import read_trace
from unlearnjax.training.interrupt import Interrupted, Stop

POOL = {"append_eos": False, "warmup_ratio": 0, "dropout": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0}
AMNESIA = {
    **POOL, "objective": "selective_amnesia", "order": "mixed", "adapter": "full", "modules": "mlp",
    "learning_rate": 1e-3, "epochs": 2, "micro_batch": 4, "accumulation": 2,
}  # fmt: skip
SUGD = {
    **POOL, "objective": "sugd", "order": "chunked", "order_parameters": {"chunk": 4, "ratio": 3}, "adapter": "full",
    "layers": "last-1", "separator": " ", "schedule": "constant", "learning_rate": 1e-3, "epochs": 1,
    "accumulation": 1,
}  # fmt: skip
AGAD = {
    **POOL, "objective": "agad", "order": "annealed", "order_parameters": {"chunk": 4, "anneal_epochs": 1},
    "schedule": "constant", "learning_rate": 1e-2, "epochs": 1, "micro_batch": 4, "accumulation": 1, "rank": 2,
    "modules": "self_attn",
}  # fmt: skip
PLAIN = {
    "name": "mixed",
    "candidates": [
        {"name": "npo", "objective": {"npo": 0.5, "gdr": 0.5}, "epochs": 2, "learning_rate": 1e-2, "rank": 4,
         "accumulation": 1, "dropout": 0.0},
        {"name": "amnesia", **AMNESIA, "layers": "auto"},
        {"name": "amnesia-1", **AMNESIA, "layers": [1]},
        {"name": "sugd", **SUGD},
        {"name": "agad", **AGAD},
    ],
    "training": {"buckets": 1},
    "merges": [
        {"name": "all", "method": "linear"},
        {"name": "loras", "method": "linear", "of": ["npo", "agad"]},
        {"name": "consensus", "method": "consensus", "of": ["npo", "amnesia-1"]},
    ],
    "evaluation": {"max_new_tokens": 12, "export": "all"},
}  # fmt: skip
NAMES = [c["name"] for c in PLAIN["candidates"]]


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    base, _, sources = world
    return out, run(base.source, sources, out, recipe_from(PLAIN, "x"), progress=False)


def change(folder, base):
    """Our tree of a written model's weights less the base's."""
    other = load_model(str(folder), "float32")
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), other.params, base.params)


def test_every_candidate_is_there_and_moved(done):
    out, report = done
    assert [c["name"] for c in report["candidates"]] == NAMES
    assert all(c["status"] == "finished" and c["updates"] > 0 for c in report["candidates"])
    assert [m["name"] for m in report["models"]] == ["base", "npo", "agad", "amnesia", "amnesia-1", "sugd", "all",
                                                     "loras", "consensus"]  # fmt: skip
    nll = {m["name"]: m["scores"]["nll"]["forget"] for m in report["models"]}
    assert len(set(nll.values())) == len(nll)
    assert read_report(out)["exported"] == "all"
    assert not (out / "checkpoints").exists() and "amnesia-1" in (out / "report.html").read_text("utf-8")


def test_layers_auto_are_the_traces(done):
    out, report = done
    trace = json.loads((out / "trace" / "trace.json").read_text("utf-8"))
    assert trace["recommended"]["kind"] == "mlp" and trace["counts"]["traced"] > 0
    first, last = trace["recommended"]["layers"]
    assert report["candidates"][1]["hyperparameters"]["layers"] == f"auto ({first} to {last})"
    assert report["candidates"][2]["hyperparameters"]["layers"] == [1]


def test_only_what_trains_changes(done, world):
    out, base = done[0], world[0]
    first = json.loads((out / "trace" / "trace.json").read_text("utf-8"))["recommended"]["layers"][0]
    for name, layers, blocks in (
        ("amnesia", [first], {"mlp"}), ("amnesia-1", [1], {"mlp"}), ("sugd", [1], {"mlp", "attention"}),
    ):  # fmt: skip
        delta = change(out / "candidates" / name, base)
        for path, leaf in jax.tree_util.tree_leaves_with_path(delta):
            keys = [p.key for p in path]
            for layer in range(2) if keys[0] == "layers" else ():
                assert (np.abs(leaf[layer]).max() > 0) == (layer in layers and keys[1] in blocks), (name, keys, layer)
            assert keys[0] == "layers" or np.abs(leaf).max() == 0


def test_an_adapter_has_its_modules_alone(done):
    config = json.loads((done[0] / "candidates" / "agad" / "adapter_config.json").read_text("utf-8"))
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (done[0] / "merges" / "loras" / "adapter_config.json").exists()


def test_merges_across_methods_are_those_of_the_deltas(done, world):
    """In float64 from the models and adapters on disk; the merged models load in transformers."""
    out, base = done[0], world[0]
    whole = {name: change(out / "candidates" / name, base) for name in ("amnesia", "amnesia-1", "sugd")}
    for name in ("npo", "agad"):
        raw = load_adapter(out / "candidates" / name, base.config)
        delta = lora_delta(raw.lora, raw.alpha / raw.rank)
        zero = jax.tree.map(lambda x: np.zeros(x.shape), base.params)
        for block, linears in delta["layers"].items():
            for linear, leaf in linears.items():
                zero["layers"][block][linear]["weight"] = np.asarray(leaf["weight"], np.float64)
        whole[name] = zero
    merged = change(out / "merges" / "all", base)
    wanted = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *(whole[n] for n in NAMES))
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    agreed = jax.tree.map(
        lambda a, b: np.where(np.sign(a) == np.sign(b), (a + b) / 2, 0.0), whole["npo"], whole["amnesia-1"]
    )
    for a, b in zip(jax.tree.leaves(change(out / "merges" / "consensus", base)), jax.tree.leaves(agreed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    tokens = [[3, 5, 7, 9]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(load_model(str(out / "model")).logits(jnp.asarray(tokens)), logits, atol=1e-4)


def test_a_candidate_among_all_is_itself_alone(world):
    """Other layers in the same program, other methods in other programs: the weights are those of a run of its own."""
    base, _, sources = world
    data = load_data(sources)

    def trained(*names):
        raw = {"candidates": [c for c in PLAIN["candidates"] if c["name"] in names], "training": PLAIN["training"],
               "evaluation": PLAIN["evaluation"] | {"export": "best"}}  # fmt: skip
        recipe = recipe_from(raw, "x")
        return train_candidates(base, prepare(recipe, base, data, sources, {"mlp": (0,)}), recipe)

    together, alone = trained("amnesia", "amnesia-1", "npo"), trained("amnesia-1")
    assert sorted(together.deltas) == [1, 2] and sorted(alone.deltas) == [0]
    for a, b in zip(jax.tree.leaves(together.deltas[2]), jax.tree.leaves(alone.deltas[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert float(jnp.abs(a).max()) > 1e-4


def test_the_best_is_kept_and_told(world, tmp_path):
    base, _, sources = world
    wild = {**AMNESIA, "layers": [0], "learning_rate": 3e-2, "epochs": 6}
    raw = {
        "candidates": [{"name": "wild", **wild}, {"name": "tame", **AMNESIA, "layers": [1]}],
        "training": {"buckets": 1, "keep_best": 1, "best_rows": 4}, "evaluation": {"max_new_tokens": 12},
    }  # fmt: skip
    recipe = recipe_from(raw, "x")
    report = run(base.source, sources, tmp_path / "out", recipe, progress=False)
    kept = [(c["kept_after"], c["updates"]) for c in report["candidates"]]
    assert all(1 <= at <= total for at, total in kept) and len({total for _, total in kept}) == 2
    assert f"kept as after update {kept[0][0]}" in (tmp_path / "out" / "report.html").read_text("utf-8")
    trained = train_candidates(base, prepare(recipe, base, load_data(sources), sources), recipe)
    assert [trained.kept[i] for i in range(2)] == [at for at, _ in kept]


@pytest.mark.slow
def test_a_lora_on_some_layers(world):
    """The others get nothing, and its own are those of the trained model."""
    base, _, sources = world
    raw = {"candidates": [{**PLAIN["candidates"][0], "layers": [own], "name": f"layer-{own}"} for own in (0, 1)],
           "training": PLAIN["training"], "evaluation": {"max_new_tokens": 12}}  # fmt: skip
    recipe = recipe_from(raw, "x")
    trained = train_candidates(base, prepare(recipe, base, load_data(sources), sources), recipe)
    for linears in trained.lora["layers"].values():
        for pair in linears.values():
            own = np.abs(np.asarray(pair["b"])).max(axis=(2, 3)) > 0  # [candidate, layer]
            np.testing.assert_array_equal(own, np.eye(2, dtype=bool))


@pytest.mark.parametrize(
    "stopped", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_from_any_group(done, world, tmp_path, monkeypatch, stopped):
    """Killed in the first, second or third group: resumed, it ends with the same scores."""
    import unlearnjax.recipes.train_step as step

    base, _, sources = world
    calls, real = [], step._train

    def fails(*args):
        calls.append(1)
        if len(calls) == stopped:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(step, "_train", fails)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(base.source, sources, out, recipe_from(PLAIN, "x"), progress=False, checkpoint_every=0)
    monkeypatch.setattr(step, "_train", real)
    said = []
    report = run(base.source, sources, out, recipe_from(PLAIN, "x"), progress=False, resume=True, say=said.append)
    assert len(said) == (stopped == 1)  # nothing to go on from
    assert [m["scores"] for m in report["models"]] == [m["scores"] for m in done[1]["models"]]


def test_a_recipe_without_merges_writes_its_best_candidate(world, tmp_path, capsys):
    base, _, sources = world
    recipe = tmp_path / "r.yml"
    one = {**AMNESIA, "layers": [0]}
    raw = {"candidates": [{"name": "other", **one, "learning_rate": 1e-5}, {"name": "one", **one}],
           "evaluation": {"max_new_tokens": 12, "candidates": ["one"]}}  # fmt: skip
    recipe.write_text(json.dumps(raw), "utf-8")
    arguments = ["run", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain, "--recipe",
                 str(recipe), "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    assert "(the candidate one)" in capsys.readouterr().out
    for a, b in zip(*(jax.tree.leaves(load_model(str(tmp_path / "out" / place)).params)
                      for place in ("model", "candidates/one")), strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_a_model_that_knows_nothing_has_no_layers_to_find(world, tmp_path):
    """The trace's message says what was skipped; nothing is trained."""
    base, corpus, sources = world
    forget = tmp_path / "forget.jsonl"
    rows = [{"id": r.id, "input": r.input, "output": "Unknown", "task": r.task} for r in corpus.forget]
    forget.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    with pytest.raises(UserError, match="no fact is left to trace") as error:
        run(
            base.source, sources._replace(forget=str(forget)), tmp_path / "out", recipe_from(PLAIN, "x"), progress=False
        )
    assert "give layers as a list" in str(error.value) and not (tmp_path / "out").exists()


def test_a_trace_that_finds_nothing_chooses_no_layers(done, world, tmp_path, monkeypatch):
    import unlearnjax.recipes.layers_step as step

    base, _, sources = world
    report = read_trace(done[0] / "trace")
    curve = report["effects"]["kinds"]["mlp"]["subject's last"]
    curve["mean"] = [-abs(x) for x in curve["mean"]]
    monkeypatch.setattr(step, "run_trace", lambda *args, **more: report)
    with pytest.raises(UserError, match=r"no range of 1 layers gives any .*, by mlp; .*give layers as a list"):
        run(base.source, sources, tmp_path / "out", recipe_from(PLAIN, "x"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_trace_that_was_stopped_goes_on_with_the_run(done, world, tmp_path, monkeypatch):
    import unlearnjax.recipes.layers_step as step

    base, _, sources = world
    out, recipe, real = tmp_path / "out", recipe_from(PLAIN, "x"), step.run_trace
    monkeypatch.setattr(step, "run_trace", lambda *args, **more: real(*args, **{**more, "stop": Stop(signum=15)}))
    with pytest.raises(Interrupted):
        run(base.source, sources, out, recipe, progress=False)
    assert (out / "trace").exists() and not (out / "trace" / "trace.json").exists()
    monkeypatch.setattr(step, "run_trace", real)
    report = run(base.source, sources, out, recipe, progress=False, resume=True, say=lambda _: None)
    assert [m["scores"] for m in report["models"]] == [m["scores"] for m in done[1]["models"]]


def test_a_trace_is_not_taken_from_another_process_or_run(world, tmp_path, monkeypatch):
    import unlearnjax.recipes.resume as resume
    import unlearnjax.recipes.run as job

    base, corpus, sources = world
    out, recipe = tmp_path / "out", recipe_from(PLAIN, "x")

    def fails(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "train_candidates", fails)
    with pytest.raises(KeyboardInterrupt):
        run(base.source, sources, out, recipe, progress=False)
    trace = (out / "trace" / "trace.json").read_bytes()
    other = tmp_path / "forget.jsonl"
    write_rows(other, corpus.forget[:4])
    with pytest.raises(UserError, match="is of another run: its layers were found by tracing other facts"):
        run(base.source, sources._replace(forget=str(other)), out, recipe, progress=False, resume=True)
    lock = lock_folder(out / "checkpoints")
    try:
        with pytest.raises(UserError, match="another process"):
            run(base.source, sources, out, recipe, progress=False, resume=True)
    finally:
        os.close(lock)
    # Other devices are no other run.
    here = resume.describe_hardware()
    monkeypatch.setattr(resume, "describe_hardware", lambda: {**here, "device_count": here["device_count"] + 3})
    with pytest.raises(KeyboardInterrupt):
        run(base.source, sources, out, recipe, progress=False, resume=True, say=lambda _: None)
    assert (out / "trace" / "trace.json").read_bytes() == trace


def test_a_merge_that_keeps_nothing_is_told(world, tmp_path):
    base, _, sources = world
    raw = {
        "candidates": [{"name": "a", **AMNESIA, "layers": [0]}, {"name": "b", **AMNESIA, "layers": [1]}],
        "merges": [{"name": "none", "method": "consensus"}, {"name": "both", "method": "ties", "density": 0.5}],
        "training": {"buckets": 1}, "evaluation": {"max_new_tokens": 12, "candidates": ["b"]},
    }  # fmt: skip
    report = run(base.source, sources, tmp_path / "out", recipe_from(raw, "x"), progress=False)
    # The candidate that nobody asked to evaluate is trained, written and merged all the same.
    assert [m["name"] for m in report["models"]] == ["base", "b", "none", "both"]
    assert sorted(p.name for p in (tmp_path / "out" / "candidates").iterdir()) == ["a", "b"]
    assert [w for w in report["warnings"] if "none" in w] == [
        "merge none changes nothing: it kept no weight of its candidates (those that train different layers share none)"
    ]
    assert {m["name"]: m["length"] > 0 for m in report["merges"]} == {"none": False, "both": True}


def test_an_objective_that_reads_below_what_trains_is_refused(world):
    base, _, sources = world
    raw = {"candidates": [{"name": "r", "objective": "rmu", "layers": "last-1"}], "evaluation": {"max_new_tokens": 12}}
    with pytest.raises(
        UserError, match=r"'r': rmu, rmu_retain read the output of layer 1 .* only layers above it train"
    ):
        prepare(recipe_from(raw, "x"), base, load_data(sources), sources)


def test_a_diverged_candidate_of_weights_leaves_the_merge(world, tmp_path):
    base, _, sources = world
    raw = {
        "candidates": [
            {"name": "wild", **AMNESIA, "layers": [0], "learning_rate": 1e30, "schedule": "constant"},
            {"name": "tame", **AMNESIA, "layers": [1]},
        ],
        "merges": [{"name": "mean", "method": "linear"},
                   {"name": "far", "method": "linear", "of": "each", "scale": "search"}],
        "search": {"scales": [0, 1], "rows": 4}, "training": {"buckets": 1}, "evaluation": {"max_new_tokens": 12},
    }  # fmt: skip
    report = run(base.source, sources, tmp_path / "out", recipe_from(raw, "x"), progress=False)
    assert [c["status"] for c in report["candidates"]] == ["diverged", "finished"]
    assert report["merges"] and all(m["candidates"] == ["tame"] for m in report["merges"])
    assert any("wild diverged" in w for w in report["warnings"])


def test_waypoints_are_refused(world, tmp_path):
    base, _, sources = world
    raw = {**PLAIN, "training": {"buckets": 1, "waypoints": 2}}
    with pytest.raises(UserError, match="waypoints are for candidates that train together as LoRAs on all layers"):
        run(base.source, sources, tmp_path / "out", recipe_from(raw, "x"), progress=False)
    assert not (tmp_path / "out").exists()
