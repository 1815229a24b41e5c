"""Merged adapters against PEFT: what it merges itself, and what it computes when it loads them."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WEIGHTS = [1.0, -0.5]
CONFIGS = {
    "one": {"r": 4, "lora_alpha": 8},
    "two": {"r": 4, "lora_alpha": 2},
    "small": {"r": 2, "lora_alpha": 8, "use_rslora": True},
    "patterned": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"up_proj": 5, "0.*q_proj": 1},
    },
}


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        peft = get_peft_model(model(), LoraConfig(target_modules=["q_proj", "up_proj"], **config))
        torch.manual_seed(seed)
        for key, x in peft.named_parameters():
            if "lora_" in key:
                x.data.normal_()
        peft.save_pretrained(root / name)
    return root


def load(root, *names):
    peft = PeftModel.from_pretrained(model(), root / names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(root / name, adapter_name=name)
    return peft


def deltas(peft, name):
    """The weight change of each module, as PEFT computes it."""
    return {
        key: layer.get_delta_weight(name).detach().numpy()
        for key, layer in peft.named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.lora_A
    }


def merged(root, out, names, *options):
    argv = ["--models", *(str(root / name) for name in names), "--out", str(out), *options]
    assert main(["merge", "--quiet", *argv]) == 0
    return deltas(load(out.parent, out.name), out.name)


def close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys() and found
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, atol=tolerance, rtol=tolerance)


def weights(values=WEIGHTS):
    return ["--weights", *(str(w) for w in values)]


@pytest.mark.parametrize("space", ["delta", "core"])
@pytest.mark.parametrize("names", [("one", "two"), ("one", "small"), ("patterned", "small")])
def test_a_sum_is_exact_whatever_the_ranks_and_scales(root, tmp_path, names, space):
    options = ["--method", "task_arithmetic", "--space", space, *weights()]
    found = merged(root, tmp_path / "out", names, *options)
    peft = load(root, *names)
    each = [deltas(peft, name) for name in names]
    close(found, {key: sum(w * d[key] for w, d in zip(WEIGHTS, each)) for key in each[0]})


def test_identity(root, tmp_path):
    for space in ("delta", "core", "factors"):
        for name in CONFIGS:
            out = tmp_path / f"{space}-{name}"
            close(merged(root, out, [name], "--method", "linear", "--space", space), deltas(load(root, name), name))


@pytest.mark.parametrize(
    ("combination", "options"),
    [
        ("linear", ["--method", "linear"]),
        ("ties", ["--method", "ties", "--density", "0.5"]),
        ("magnitude_prune", ["--method", "magnitude_prune", "--density", "0.5"]),
    ],
)
def test_factors_equal_pefts_own_merge(root, tmp_path, combination, options):
    peft = load(root, "one", "two")
    density = {} if combination == "linear" else {"density": 0.5}
    peft.add_weighted_adapter(["one", "two"], WEIGHTS, "merged", combination_type=combination, **density)
    found = merged(root, tmp_path / "out", ("one", "two"), *options, "--space", "factors", *weights())
    close(found, deltas(peft, "merged"))


@pytest.mark.parametrize(
    ("combination", "options"),
    [
        ("svd", ["--method", "task_arithmetic"]),
        ("ties_svd", ["--method", "ties", "--semantics", "peft", "--density", "0.5"]),
        ("magnitude_prune_svd", ["--method", "magnitude_prune", "--density", "0.5"]),
    ],
)
def test_a_rank_gives_pefts_svd_family(root, tmp_path, combination, options):
    peft = load(root, "one", "two")
    density = {} if combination == "svd" else {"density": 0.5}
    peft.add_weighted_adapter(["one", "two"], WEIGHTS, "merged", combination_type=combination, svd_rank=3, **density)
    found = merged(root, tmp_path / "out", ("one", "two"), *options, "--rank", "3", *weights())
    close(found, deltas(peft, "merged"), 1e-3)


def test_negation(root, tmp_path):
    options = ["--method", "consensus", "--rank", "16"]
    plain = merged(root, tmp_path / "plain", ("one", "two"), *options)
    negated = merged(root, tmp_path / "negated", ("one", "two"), *options, "--negate", "--scale", "0.9")
    close(negated, {key: -0.9 * x for key, x in plain.items()})


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (
            ("one", "small"),
            "--method ties --density 0.5 --space factors",
            "has ranks [4, 2]; space 'factors' needs equal",
        ),
        (("one", "two"), "--method arcee_fusion", "merges exactly 1 candidates"),
        (("one", "two"), "--method slerp --t 0.5", "slerp works on whole weights, and these are adapters"),
        (("one", "two"), "--method linear --compress 2", "compress is for space 'core'"),
        (("one", "two"), "--method linear --dtype bfloat16", "--dtype is for models"),
        (("one", "two"), "--method linear --weights 1 -1", "they sum to 0"),
    ],
)
def test_errors(root, tmp_path, capsys, names, options, words):
    argv = ["--models", *(str(root / name) for name in names), "--out", str(tmp_path / "out"), *options.split()]
    assert main(["merge", "--quiet", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_modules_are_named(root, tmp_path, capsys):
    peft = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], r=4))
    peft.save_pretrained(tmp_path / "q")
    argv = ["merge", "--models", str(root / "one"), str(tmp_path / "q"), "--method", "linear", "--dry-run"]
    assert main(argv) == 2
    assert "module 'model.layers.0.mlp.up_proj' is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "word"), [({"use_dora": True}, "use_dora"), ({"bias": "lora_only"}, "bias"), ({"bias": "all"}, "bias")]
)
def test_dora_and_bias_are_refused_by_name(root, tmp_path, capsys, given, word):
    peft = get_peft_model(model(), LoraConfig(target_modules=["q_proj", "up_proj"], r=4, **given))
    peft.save_pretrained(tmp_path / "other")
    argv = ["merge", "--models", str(root / "one"), str(tmp_path / "other"), "--method", "linear"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert word in error and str(tmp_path / "other") in error and not (tmp_path / "out").exists()
