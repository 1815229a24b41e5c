"""A whole tiny run: OUT holds what was promised, others load it, and the report says what the files say."""

import csv
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import unlearnjax
from unlearnjax.cli.main import main
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import load_data, prepare
from unlearnjax.recipes.run import run
from unlearnjax.recipes.train_step import train_candidates
from unlearnjax.report.schema import read_report

# PEFT 0.21 asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PLAIN = {
    "name": "tiny",
    "defaults": {"epochs": 2, "learning_rate": 1e-2, "rank": 4, "alpha": 4, "accumulation": 1, "dropout": 0.0},
    "candidates": [
        {"name": "over", "rank": 2, "alpha": 8, "micro_batch": 2, "dropout": 0.1},
        {"name": "wild", "learning_rate": 1e30, "schedule": "constant", "warmup_ratio": 0, "objective": "graddiff"},
        {"name": "under", "micro_batch": 4, "learning_rate": 5e-3, "objective": {"npo": 0.3, "gdr": 0.7}},
    ],
    "adapter": {"targets": ["q", "v", "down"]},
    "training": {"buckets": 1, "waypoints": 3},
    "merges": [
        {"name": "linear", "method": "linear", "weights": [1, 5, 3]},
        {"name": "ties-delta", "method": "ties", "density": 0.5},
        {"name": "ties-factors", "method": "ties", "space": "factors", "density": 0.5},
    ],
    "evaluation": {"max_new_tokens": 12, "batch_size": 32, "export": "ties-delta"},
}
FINISHED, MERGES = ["over", "under"], ["linear", "ties-delta", "ties-factors"]
ADAPTERS = ["candidates/over", "candidates/under", "merges/linear", "merges/ties-delta", "merges/ties-factors"]


@pytest.fixture(scope="module")
def recipe():
    return recipe_from(PLAIN, "tiny")


@pytest.fixture(scope="module")
def done(world, recipe, tmp_path_factory):
    """(OUT, the report), from the model's folder and not from the loaded model."""
    out = tmp_path_factory.mktemp("done") / "out"
    base, _, sources = world
    return out, run(base.source, sources, out, recipe, command=["unlearnjax", "run"], progress=False)


@pytest.fixture(scope="module")
def base(world):
    return world[0]


@pytest.fixture(scope="module")
def tokens(world):
    base, corpus, _ = world
    return np.asarray([base.tokenizer(r.input + r.output)["input_ids"][:8] for r in corpus.forget[::2]])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_out_holds_what_was_promised(done):
    out, _ = done
    assert sorted(p.name for p in out.iterdir()) == [
        "candidates", "generations", "merges", "model", "recipe.yml", "report.html", "report.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "candidates").iterdir()) == ["over", "under", "wild"]
    assert sorted(p.name for p in (out / "merges").iterdir()) == MERGES
    assert sorted(p.name for p in (out / "generations").iterdir()) == sorted(["base", *FINISHED, *MERGES])
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files(out / "model"))
    assert not [f for f in files(out) if ".part" in f]


def factors(folder):
    """{module: (A, B)} and the scale, from the files themselves."""
    raw = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    names = {k.rsplit(".lora_", 1)[0] for k in raw}
    return {n: (raw[f"{n}.lora_A.weight"], raw[f"{n}.lora_B.weight"]) for n in names}, config["lora_alpha"] / config[
        "r"
    ]


def deltas(folder):
    pairs, scale = factors(folder)
    return {n: scale * b.astype(np.float64) @ a for n, (a, b) in pairs.items()}


def test_waypoints_end_where_the_candidates_are(done):
    """All rows are asked at the waypoints, so the last one's scores are the candidate's own, and its length too."""
    out, report = done
    scores = {m["name"]: m["scores"] for m in report["models"]}
    ways = {c["name"]: c["trajectory"] for c in report["candidates"]}
    for name in FINISHED:
        way, updates = ways[name], next(c["updates"] for c in report["candidates"] if c["name"] == name)
        assert way["updates"][0] == 0 and way["updates"][-1] == updates and len(way["updates"]) == 4
        for at, own in ((-1, scores[name]), (0, scores["base"])):
            for split in ("forget", "retain"):
                found = {task: {kind: v[at] for kind, v in kinds.items()} for task, kinds in way[split].items()}
                assert found == own[split]
                assert way["nll"][split][at] == pytest.approx(own["nll"][split], rel=1e-5)
        norm = math.sqrt(sum((d.astype(np.float64) ** 2).sum() for d in deltas(out / "candidates" / name).values()))
        assert way["length"][-1] == pytest.approx(norm, rel=1e-5) and way["length"][0] == 0
    assert not (out / "checkpoints").exists() and "On the way" in (out / "report.html").read_text("utf-8")


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(model, tokens):
    return np.asarray(model.logits(tokens))


def largest_difference(ours, theirs):
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_load_in_peft_and_give_our_logits(base, done, tokens, name):
    """Ours are those of the base plus scale * B @ A, formed in numpy from the files."""
    bare = transformers.AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(bare, done[0] / name).eval()
    plain = our_logits(base, tokens)
    ours = our_logits(with_deltas(base, deltas(done[0] / name)), tokens)
    assert largest_difference(ours, their_logits(theirs, tokens)) < 1e-4
    assert largest_difference(ours, plain) > 1e-2  # it is not the base


def with_deltas(model, change):
    """`model` with {PEFT's module name: [out, in]} added to its linears."""
    params = jax.tree.map(np.array, model.params)
    for module, delta in change.items():
        _, _, _, _, layer, block, linear = module.split(".")
        place = params["layers"]["attention" if block == "self_attn" else "mlp"][linear.removesuffix("_proj")]
        place["weight"][int(layer)] += delta.astype(np.float32)
    return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, params))


def test_candidates_have_their_own_rank_and_scale(done):
    for name, rank, scale in (("over", 2, 4.0), ("under", 4, 1.0), ("wild", 4, 1.0)):
        pairs, found = factors(done[0] / "candidates" / name)
        assert found == scale and {a.shape[0] for a, _ in pairs.values()} == {rank}


def merged_by_hand(out, method, **settings):
    one = [deltas(out / "candidates" / name) for name in FINISHED]
    stack = {n: jnp.asarray(np.stack([d[n] for d in one]), jnp.float32) for n in one[0]}
    return unlearnjax.merge(stack, method, **settings)


def distance(a, b):
    """|a - b| / |b| over all linears."""
    square = lambda tree: sum(float(np.square(np.asarray(x, np.float64)).sum()) for x in tree.values())  # noqa: E731
    return (square({n: np.asarray(a[n], np.float64) - np.asarray(b[n], np.float64) for n in b}) / square(b)) ** 0.5


def test_the_linear_merge_is_the_weighted_mean_of_those_that_finished(done):
    """Weights 1 and 3: the diverged candidate's 5 is gone, and the others' sum is counted again."""
    out, report = done
    over, under = (deltas(out / "candidates" / name) for name in FINISHED)
    exact = {n: (over[n] + 3 * under[n]) / 4 for n in over}
    assert distance(deltas(out / "merges" / "linear"), exact) < 1e-6
    entry = next(m for m in report["merges"] if m["name"] == "linear")
    assert entry["exported_rank"] == 8 and entry["truncation_error"] < 1e-6
    assert entry["hyperparameters"]["weights"] == [1, 3]


def test_the_ties_adapter_misses_what_the_report_says(done):
    out, report = done
    entry = next(m for m in report["merges"] if m["name"] == "ties-delta")
    assert entry["semantics"] == "paper" and entry["exported_rank"] == 4
    missed = distance(deltas(out / "merges" / "ties-delta"), merged_by_hand(out, "ties", density=0.5))
    assert 0.05 < missed < 0.95 and entry["truncation_error"] == pytest.approx(missed, rel=1e-3)


def test_ties_on_factors_is_pefts(base, done):
    out, report = done
    bare = transformers.AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(bare, out / "candidates" / "under", adapter_name="under")
    # PEFT merges equal ranks only: ours pads the smaller one with zeros, and so does this.
    padded = out.parent / "padded"
    pairs, scale = factors(out / "candidates" / "over")
    tensors = {}
    for n, (a, b) in pairs.items():
        tensors[f"{n}.lora_A.weight"] = np.concatenate([a, np.zeros_like(a)])
        tensors[f"{n}.lora_B.weight"] = np.concatenate([b, np.zeros_like(b)], axis=1)
    config = json.loads((out / "candidates" / "over" / "adapter_config.json").read_text("utf-8"))
    padded.mkdir()
    (padded / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "lora_alpha": 4 * scale}), "utf-8")
    save_file(tensors, padded / "adapter_model.safetensors")
    model.load_adapter(padded, adapter_name="over")
    model.add_weighted_adapter(["over", "under"], [1.0, 1.0], "both", combination_type="ties", density=0.5)
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if ".both." in k}
    pairs, scale = factors(out / "merges" / "ties-factors")
    assert scale == 1.0
    for n, (a, b) in pairs.items():
        product = theirs[f"{n}.lora_B.both.weight"] @ theirs[f"{n}.lora_A.both.weight"]
        np.testing.assert_allclose(b @ a, product, atol=1e-5)
    assert next(m for m in report["merges"] if m["name"] == "ties-factors")["semantics"] == "peft"


def test_the_model_is_the_merge_that_was_to_be_exported(base, done, tokens):
    out, report = done
    assert report["exported"] == "ties-delta"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    merged = merged_by_hand(out, "ties", density=0.5)
    ours = our_logits(with_deltas(base, {n: np.asarray(d) for n, d in merged.items()}), tokens)
    assert largest_difference(ours, their_logits(theirs, tokens)) < 1e-4
    loaded = unlearnjax.load_model(out / "model")
    assert largest_difference(our_logits(loaded, tokens), their_logits(theirs, tokens)) < 1e-4
    assert largest_difference(ours, our_logits(base, tokens)) > 1e-2
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    text = "Where was Anna born?"
    assert tokenizer(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    card = (out / "model" / "README.md").read_text("utf-8")
    assert "ties" in card and "over, under" in card and report["data"]["forget"]["sha256"] in card


def test_the_diverged_candidate_is_reported_left_out_and_finite(done):
    out, report = done
    states = {c["name"]: (c["status"], c["diverged_at"]) for c in report["candidates"]}
    assert states["over"] == states["under"] == ("finished", None)
    status, at = states["wild"]
    assert status == "diverged" and at >= 1
    assert [c["updates"] for c in report["candidates"] if c["name"] == "wild"] == [at]
    assert [m["candidates"] for m in report["merges"]] == [FINISHED] * 3
    assert any("wild" in w and "diverged" in w for w in report["warnings"])
    assert all(np.isfinite(x).all() for pair in factors(out / "candidates" / "wild")[0].values() for x in pair)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_generations_have_the_official_columns_and_all_rows(world, done):
    corpus = world[1]
    for model in ("base", *FINISHED, *MERGES):
        folder = done[0] / "generations" / model
        for split in ("forget", "retain"):
            rows = read_csv(folder / f"{split}_0.csv")
            assert tuple(rows[0]) == ("id", "task", "input", "expected_output", "model_output", "nll")
            given = getattr(corpus, split)
            assert [(r["id"], r["task"], r["input"], r["expected_output"]) for r in rows] == [
                (r.id, r.task, r.input, r.output) for r in given
            ]
        for side, documents in (("member", corpus.members), ("nonmember", corpus.nonmembers)):
            rows = read_csv(folder / "mia_results" / f"{side}_0.csv")
            assert tuple(rows[0]) == ("id", "nll") and [r["id"] for r in rows] == [d.id for d in documents]


def scores_of(report, name):
    return next(m["scores"] for m in report["models"] if m["name"] == name)


def numbers(scores, leave_out=("semantics",)):
    """Every number by its path."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict):
            for k, v in value.items():
                if k not in leave_out:
                    walk(v, f"{path}.{k}")
        elif isinstance(value, list | tuple):
            for i, v in enumerate(value):
                walk(v, f"{path}[{i}]")
        else:
            found[path] = math.nan if value is None else value

    walk(scores, "")
    return found


@pytest.mark.parametrize("name", ["base", "under", "ties-delta"])
def test_score_of_the_generations_is_the_reports(done, capsys, name):
    out, report = done
    assert main(["score", str(out / "generations" / name)]) == 0
    known = ["semantics", "probe"]  # the folder does not hold the probe's answers
    again = numbers(json.loads(capsys.readouterr().out), leave_out=known)
    assert again == pytest.approx(numbers(scores_of(report, name), leave_out=known), rel=1e-6, nan_ok=True)


def test_the_models_differ_in_their_scores(done):
    """Else the comparisons here would hold of any mix-up."""
    losses = [scores_of(done[1], name)["nll"]["forget"] for name in ("base", *FINISHED, *MERGES)]
    assert len({round(x, 3) for x in losses}) == len(losses)
    assert losses[0] < min(losses[1:])  # the base knows the forget set best
    assert any(x["regurgitation"] or 0 for x in scores_of(done[1], "base")["forget"].values())


@pytest.mark.parametrize(
    ("name", "model", "adapter"),
    [("ties-delta", "model", None), ("under", None, "candidates/under")],
)
def test_evaluate_gives_the_reports_scores(world, done, tmp_path, capsys, name, model, adapter):
    (base, _, s), (out, report) = world, done
    argv = [
        "evaluate", "--quiet", "--model", base.source if model is None else str(out / model),
        "--forget", s.forget, "--retain", s.retain, "--members", s.members, "--nonmembers", s.nonmembers,
        "--probe", s.probe, "--max-new-tokens", "12", "--batch-size", "32", "--out", str(tmp_path / "scores"),
    ]  # fmt: skip
    assert main(argv + ([] if adapter is None else ["--adapter", str(out / adapter)])) == 0
    printed = capsys.readouterr().out
    assert numbers(json.loads(printed)) == pytest.approx(
        numbers(scores_of(report, name)), rel=1e-4, abs=1e-5, nan_ok=True
    )
    assert json.loads((tmp_path / "scores" / "scores.json").read_text("utf-8")) == json.loads(printed)
    for split in ("forget_0.csv", "retain_0.csv"):
        own, there = (read_csv(folder / split) for folder in (tmp_path / "scores", out / "generations" / name))
        assert [r["model_output"] for r in own] == [r["model_output"] for r in there]


def test_the_report_is_valid_and_self_contained(done):
    out, _ = done
    read = read_report(out)
    assert read["recipe"]["name"] == "tiny" and read["command"] == ["unlearnjax", "run"]
    assert [m["name"] for m in read["models"]] == ["base", *FINISHED, "ties-factors", "linear", "ties-delta"]
    assert 0 <= read["data"]["padding_share"] < 1
    assert {k: v["rows"] for k, v in read["data"].items() if k != "padding_share"} == {
        "forget": 8, "retain": 8, "members": 4, "nonmembers": 4, "probe": 4,
    }  # fmt: skip
    page = (out / "report.html").read_text("utf-8")
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?(?!#|data:)[^"'> ]+""", page)
    assert not re.findall(r"@import|url\((?!#|['\"]?data:)|<(?:link|iframe|object|embed)\b", page)
    for name in ("over", "under", "wild", *MERGES):
        assert name in page


def test_the_recipe_in_out_runs_again(done, recipe):
    again = load_recipe(str(done[0] / "recipe.yml"))
    assert again == recipe


def test_the_same_training_again_is_the_same_bit_for_bit(world, done, recipe):
    base, _, sources = world
    trained = train_candidates(base, prepare(recipe, base, load_data(sources), sources), recipe)
    for i, candidate in enumerate(recipe.candidates):
        pairs, _ = factors(done[0] / "candidates" / candidate.name)
        for module, (a, b) in pairs.items():
            _, _, _, _, layer, block, linear = module.split(".")
            blocks = trained.lora["layers"]["attention" if block == "self_attn" else "mlp"]
            again = jax.tree.map(lambda x, i=i, layer=int(layer): np.asarray(x[i, layer]), blocks[linear[:-5]])
            assert again["a"][: candidate.rank].tobytes() == a.tobytes()
            assert again["b"][:, : candidate.rank].tobytes() == b.tobytes()
