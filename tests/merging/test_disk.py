"""Merges of model folders that transformers wrote equal merges in memory, and transformers loads them."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unlearnjax.cli import merge as command
from unlearnjax.cli.main import main
from unlearnjax.errors import UserError
from unlearnjax.merging import merge, methods, pieces
from unlearnjax.merging.disk import plan
from unlearnjax.merging.folders import merge_folders
from unlearnjax.merging.job import Input, Job, depths, value_at

METHODS = [
    ("linear", {}), ("consensus", {}), ("magmax", {}), ("ties", {"density": 0.4}), ("della", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}), ("ties", {"density": 0.4, "semantics": "mergekit"}), ("model_stock", {}),
    ("sce", {"select_topk": 0.3}), ("karcher", {}), ("breadcrumbs", {"density": 0.5}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three fine-tunes of it, as transformers saves them (bfloat16)."""
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(root / "base")
    for name in ("one", "two", "three"):
        model.load_state_dict({k: x + 0.02 * torch.randn(x.shape).to(torch.bfloat16) for k, x in start.items()})
        model.save_pretrained(root / name)
    return root


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name: x.astype(np.float32) for name, x in found.items()}


def job(folders, method, semantics=None, **settings):
    inputs = tuple(Input(str(folders / name)) for name in ("one", "two", "three"))
    return Job(method, inputs, base=str(folders / "base"), semantics=semantics, settings=settings, dtype="float32")


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_equals_the_merge_in_memory(folders, tmp_path, method, options):
    import jax

    found = plan(job(folders, method, **options))
    merge_folders(found, tmp_path / "out")
    base, models = tensors(folders / "base"), [tensors(folders / name) for name in ("one", "two", "three")]
    deltas = {name.replace("/", "."): np.stack([m[name] - base[name] for m in models]) for name in base}
    key = jax.random.key(0) if found.rule.needs_key else None
    expected = merge(deltas, method, base=base, key=key, **options)
    merged = tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    for name, x in merged.items():
        np.testing.assert_allclose(x, base[name] + np.asarray(expected[name]), rtol=1e-5, atol=1e-6)


ELEMENTWISE = [
    (method, rule)
    for method, each in sorted(methods().items())
    for rule in each.rules
    if rule.properties.elementwise
    and (rule.rounds or rule.needs_key or method == "consensus")  # the others see an entry alone
    and rule.least <= 3
    and (rule.most is None or rule.most >= 3)
]


@pytest.mark.parametrize(("method", "rule"), ELEMENTWISE, ids=[f"{m}-{r.semantics}" for m, r in ELEMENTWISE])
def test_cut_tensors_merge_as_whole_ones(folders, tmp_path, monkeypatch, method, rule):
    """Pieces that divide no tensor, against one piece for each."""
    options = {p.name: 0.5 for p in rule.hyperparameters if p.required}
    found = plan(job(folders, method, rule.semantics, **options))
    merge_folders(found, tmp_path / "whole")
    monkeypatch.setattr(pieces, "PIECE", 37)
    merge_folders(found, tmp_path / "cut")
    whole = tensors(tmp_path / "whole")
    for name, x in tensors(tmp_path / "cut").items():
        np.testing.assert_allclose(x, whole[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("method", "semantics", "options"),
    [("della", "mergekit", {"density": 0.5}), ("magnitude_prune", "peft", {"density": 0.5, "exact_k": True}),
     ("ties", "paper", {"density": 0.5}), ("breadcrumbs", "mergekit", {"density": 0.5})],
)  # fmt: skip
def test_scalars_and_empty_tensors(tmp_path, method, semantics, options):
    rng = np.random.default_rng(0)
    found = {}
    for name in ("base", "one", "two", "three"):
        shapes = {"a": (4, 5), "scalar": (), "empty": (0, 3)}
        found[name] = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "clip"}')
        save_file(found[name], tmp_path / name / "model.safetensors")
    merge_folders(plan(job(tmp_path, method, semantics, **options)), tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert {name: x.shape for name, x in merged.items()} == shapes
    if not method.startswith("della"):  # which draws
        deltas = {n: np.stack([found[m][n] - found["base"][n] for m in ("one", "two", "three")]) for n in shapes}
        expected = merge(deltas, method, semantics=semantics, **options)
        for name, x in merged.items():
            np.testing.assert_allclose(x, found["base"][name] + np.asarray(expected[name]), rtol=1e-5, atol=1e-6)


def test_transformers_loads_it_and_it_is_described(folders, tmp_path):
    merge_folders(plan(job(folders, "linear")), tmp_path / "out", max_shard_bytes=4000, command="unlearnjax merge ...")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float32
    expected = np.mean([tensors(folders / name)["lm_head.weight"] for name in ("one", "two", "three")], axis=0)
    np.testing.assert_allclose(model.lm_head.weight.detach().numpy(), expected, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "linear (paper semantics" in card and str(folders / "two") in card and "unlearnjax merge ..." in card
    assert "method: linear" in (tmp_path / "out" / "merge.yml").read_text()


def test_negation_subtracts(folders, tmp_path):
    argv = [
        "merge",
        "--quiet",
        "--base",
        str(folders / "base"),
        "--models",
        *(str(folders / n) for n in ("one", "two")),
    ]
    argv += [
        "--method",
        "consensus",
        "--negate",
        "--scale",
        "0.9",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    base, models = tensors(folders / "base"), [tensors(folders / name) for name in ("one", "two")]
    for name, x in tensors(tmp_path / "out").items():
        delta = merge(np.stack([m[name] - base[name] for m in models]), "consensus")
        np.testing.assert_allclose(x, base[name] - 0.9 * np.asarray(delta), rtol=1e-5, atol=1e-6)
        kept = np.asarray(delta) == 0
        np.testing.assert_array_equal(x[kept], base[name][kept])


def test_the_dtype_is_the_bases_unless_another_is_named(folders, tmp_path):
    merge_folders(plan(dataclasses.replace(job(folders, "magmax"), dtype=None)), tmp_path / "out")
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_a_dry_run_reads_nothing_and_prints_the_plan(folders, tmp_path, capsys, monkeypatch):
    for name in ("read", "read_into"):
        monkeypatch.setattr(f"unlearnjax.io.safetensors.TensorFile.{name}", lambda *_: pytest.fail("a tensor was read"))
    argv = [
        "merge",
        "--base",
        str(folders / "base"),
        "--models",
        *(str(folders / n) for n in ("one", "two")),
        "--dry-run",
    ]
    assert main([*argv, "--method", "ties", "--density", "0.5"]) == 0
    printed = capsys.readouterr().out
    size = sum(x.nbytes // 2 for x in tensors(folders / "base").values())
    assert (
        f"read:    {3 * 3 * size / 1e9:.3f} GB (about 3 times" in printed and f"written: {size / 1e9:.3f} GB" in printed
    )


def test_settings_by_model_depth_and_name():
    assert depths(["model.layers.0.x", "model.layers.4.x", "model.layers.2.mlp.y", "lm_head", "h.1.z"]) == {
        "model.layers.0.x": 0.0, "model.layers.4.x": 1.0, "model.layers.2.mlp.y": 0.5, "lm_head": 0.0, "h.1.z": 0.25,
    }  # fmt: skip
    assert value_at([0.0, 1.0, 0.5], "x", 0.25) == 0.5 and value_at([0.0, 1.0, 0.5], "x", 1.0) == 0.5
    assert value_at([0.2], "x", 0.7) == pytest.approx(0.2)
    conditions = [{"filter": "mlp", "value": [0, 1]}, {"value": 3}]
    assert value_at(conditions, "a.mlp.b", 0.5) == 0.5 and value_at(conditions, "a.attn", 0.5) == 3
    assert value_at([{"filter": "mlp", "value": 1}], "attn", 0) is None
    with pytest.raises(UserError, match="is no number, flag or word"):
        value_at([1, "a"], "x", 0)


def test_every_parameter_of_every_method_is_an_option():
    known = [p for m in methods().values() for r in m.rules for p in r.hyperparameters]
    assert {p.name for p in known if not p.static} == set(command.NUMBERS)
    assert {p.name for p in known if p.choices} == set(command.CHOICES)
    assert {p.name for p in known if p.static and not p.choices} == set(command.FLAGS)


def broken(folders, tmp_path, change):
    """A copy of `one` whose tensors `change` has changed, beside its config."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text((folders / "one" / "config.json").read_text())
    found = load_file(folders / "one" / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poisoned(found):
    found["model.norm.weight"] = found["model.norm.weight"].copy()
    found["model.norm.weight"][3] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is in .*base and not in .*broken"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "tensor 'extra' is in .*broken and not in .*base"),
        (lambda t: t.update({"lm_head.weight": np.ones((3, 16), np.float32)}), r"is \[40, 16\] in .* and \[3, 16\] in"),
        (
            lambda t: t.update({"lm_head.weight": np.ones((40, 16), np.int8)}),
            "'lm_head.weight' is bfloat16 in .*base, bfloat16 in .*one, int8 in .*broken; convert them",
        ),
        (poisoned, "tensor 'model.norm.weight' of .*broken holds NaN or Inf"),
    ],
)
def test_a_model_that_does_not_fit_is_named(folders, tmp_path, change, words):
    other = broken(folders, tmp_path, change)
    with pytest.raises(UserError, match=words):
        own = job(folders, "linear")
        merge_folders(plan(dataclasses.replace(own, inputs=(own.inputs[0], Input(str(other))))), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_another_architecture_is_refused(folders, tmp_path):
    other = broken(folders, tmp_path, lambda t: None)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "olmo"}
    (other / "config.json").write_text(json.dumps(config))
    own = job(folders, "linear")
    with pytest.raises(UserError, match=r"broken is a olmo and .*base a llama"):
        plan(dataclasses.replace(own, inputs=(own.inputs[0], Input(str(other)))))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method linear", "--models is missing"),
        ("--models A B", "--method is missing"),
        ("--models A B --method ties --density 0.5", "ties merges deltas; give the base"),
        ("--models A B --method teis", "unknown method 'teis'; did you mean 'ties'"),
        ("--base A --models A B --method ties", "needs density in"),
        ("--base A --models A B --method ties --density 2", "density is 2 and must be in"),
        ("--base A --models A B --method ties --density 0.5 --t 1", "unknown parameter 't'"),
        ("--base A --models A B --method linear --weights 1 2 3", "3 weights for 2 models"),
        ("--base A --models A B --method linear --weights 1 -1", "they sum to 0"),
        ("--base A --models A B --method linear --dtype int4", "int4"),
        ("--base A --models A B C --method slerp --t 0.5", "merges exactly 2 candidates"),
    ],
)
def test_bad_options_are_one_line(folders, capsys, options, words):
    names = {"A": "base", "B": "one", "C": "two"}
    argv = [str(folders / names[word]) if word in names else word for word in options.split()]
    assert main(["merge", *argv, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
