"""The same YAML through mergekit's own command and through ours gives the same model, within 1e-5.

mergekit lives in an environment of its own (`make peers` builds .venv-peers); without it these tests are skipped, and
tests/merging/test_mergekit.py holds the methods to what mergekit once computed.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax.cli.main import main
from unlearnjax.errors import UserError
from unlearnjax.merging.mergekit import load_mergekit, parse_mergekit

MERGEKIT = Path(__file__).parents[2] / ".venv-peers" / "bin" / "mergekit-yaml"

WEIGHTS = "\n".join(
    f"  - {{model: {name}, parameters: {{weight: {weight}, density: {density}}}}}"
    for name, weight, density in (
        ("ONE", 0.5, "[0.3, 0.9]"), ("TWO", "[{filter: mlp, value: 1.0}, {value: [0.2, 0.8]}]", 0.6)
    )
)  # fmt: skip
PLAIN = "models: [{model: ONE}, {model: TWO}]\nbase_model: BASE"
CASES = {
    "ties": f"merge_method: ties\nbase_model: BASE\nmodels:\n{WEIGHTS}\nparameters: {{lambda: 0.8, normalize: false}}",
    "breadcrumbs": f"merge_method: breadcrumbs\nbase_model: BASE\nmodels:\n{WEIGHTS}\nparameters: {{gamma: 0.1}}",
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: BASE\n"
    "models: [{model: BASE}, {model: ONE, parameters: {weight: 0.7}}, {model: TWO, parameters: {weight: -0.2}}]",
    "linear": "merge_method: linear\n"
    "models: [{model: ONE, parameters: {weight: 1}}, {model: TWO, parameters: {weight: 3}}]",
    "slerp": "merge_method: slerp\nbase_model: ONE\nmodels: [{model: TWO}, {model: ONE}]\n"
    "parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.3}]}",
    "model_stock": f"merge_method: model_stock\n{PLAIN}",
    "karcher": "merge_method: karcher\nmodels: [{model: ONE}, {model: TWO}]",
    "sce": f"merge_method: sce\n{PLAIN}\nparameters: {{select_topk: 0.5}}",
    "nuslerp": "merge_method: nuslerp\n"
    "models: [{model: ONE, parameters: {weight: 1}}, {model: TWO, parameters: {weight: 2}}]",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(root / "base")
    for name in ("one", "two"):
        model.load_state_dict({k: x + 0.05 * torch.randn(x.shape) for k, x in start.items()})
        model.save_pretrained(root / name)
    return root


def written(root, folder, text):
    for name in ("BASE", "ONE", "TWO"):
        text = text.replace(name, str(root / name.lower()))
    (folder / "merge.yml").write_text(text + "\ndtype: float32\n")
    return folder / "merge.yml"


def read(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not MERGEKIT.exists(), reason="make peers")
@pytest.mark.parametrize("case", CASES)
def test_equals_mergekit(root, tmp_path, case):
    path = written(root, tmp_path, CASES[case])
    theirs = [MERGEKIT, path, tmp_path / "theirs", "--no-write-model-card", "--no-copy-tokenizer"]
    done = subprocess.run([str(x) for x in theirs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main(["merge", "--quiet", str(path), "--out", str(tmp_path / "ours")]) == 0
    expected, found = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_yaml_is_read_and_merged(root, tmp_path, case):
    """Without mergekit too: the command runs, and the recipe lies beside the result as it was given."""
    path = written(root, tmp_path, CASES[case])
    assert main(["merge", "--quiet", str(path), "--out", str(tmp_path / "ours")]) == 0
    assert (tmp_path / "ours" / "merge.yml").read_text() == path.read_text()
    base, found = read(root / "base"), read(tmp_path / "ours")
    assert found.keys() == base.keys() and all(np.isfinite(x).all() for x in found.values())
    assert any(not np.array_equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "must be a mapping with merge_method and models"),
        ({"slices": [1]}, "slices is not supported; list whole models under models"),
        ({"modules": {"a": 1}}, "modules is not supported"),
        ({"tokenizer": {"source": "union"}}, "tokenizer is not supported; the base model's tokenizer is kept"),
        ({"tokenizer_source": "union"}, "tokenizer_source 'union' is not supported; only base is"),
        ({"merge_method": "linear", "model": []}, "unknown key 'model'; did you mean 'models'"),
        ({"merge_method": "dare-ties", "models": []}, "unknown merge_method 'dare-ties'; did you mean 'dare_ties'"),
        ({"merge_method": "linear"}, "models must be a list"),
        ({"merge_method": "linear", "models": ["a"]}, "model 1: must be a mapping"),
        ({"merge_method": "linear", "models": [{"model": "a"}]}, "a has no weight, which linear needs"),
        ({"merge_method": "linear", "models": [{"model": "a+lora"}]}, "a model with an adapter on it is not supported"),
        ({"merge_method": "ties", "models": [{"model": "a", "parameters": {"densty": 1}}]}, "did you mean 'density'"),
        ({"merge_method": "ties", "models": [{"model": "a"}], "parameters": {"t": 1}}, "unknown parameter 't'"),
        ({"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}]}, "of which base_model is one"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw, words):
    with pytest.raises(UserError) as error:
        parse_mergekit(raw, "merge.yml")
    assert str(error.value).startswith("merge.yml") and words in str(error.value)


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_mergekit(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_text("a: [")
    with pytest.raises(UserError, match=r"bad\.yml: broken YAML"):
        load_mergekit(tmp_path / "bad.yml")
