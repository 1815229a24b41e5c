"""LoRA adapters against PEFT: theirs loaded by us, ours loaded by PEFT, and merged folders loaded by transformers."""

import json
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from unlearnjax import load_model, save_model
from unlearnjax.adapters.apply import add_delta
from unlearnjax.adapters.lora import lora_weights, scaled
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.errors import UserError
from unlearnjax.io.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from unlearnjax.models.language_model import LanguageModel

# PEFT 0.21 asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": 299, "pad_token_id": 0,
}  # fmt: skip
LINEARS = ["q", "k", "v", "o", "gate", "up", "down"]
ALL = [f"{name}_proj" for name in LINEARS]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 16))


@pytest.fixture(scope="module", params=["olmo", "llama"])
def base(request, tmp_path_factory):
    """A folder written by transformers with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "olmo":
            model = OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=0.6))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12, bos_token_id=None))
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else 0.5 if "embed" in name else p.shape[1] ** -0.5
            p.data = (1.0 if p.ndim == 1 else 0.0) + scale * torch.randn(p.shape)
    model.save_pretrained(folder)
    train_tokenizer(["the quick brown fox jumps over the lazy dog, again and again"] * 3, VOCAB).save_pretrained(folder)
    return folder, load_model(folder)


def with_adapter(folder, **keywords):
    """A PEFT model whose factors are all random (a fresh B is zero, and would test nothing)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **keywords)).eval()
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn(p.shape)
    return model


@torch.no_grad()
def theirs(model):
    return model(torch.tensor(TOKENS)).logits.numpy()


def logits(ours: LanguageModel, adapter=None):
    lora = None if adapter is None else scaled(adapter.lora, adapter.alpha / adapter.rank)
    forward = jax.jit(lambda params, lora, tokens: ours.model.forward(params, lora, tokens).hidden)
    hidden = forward(ours.params, lora, jnp.asarray(TOKENS, jnp.int32))
    return np.asarray(jnp.einsum("btd,vd->btv", hidden, ours.model.head(ours.params), precision="highest"))


def close(ours, reference, plain):
    assert np.abs(reference - plain).max() > 0.5, "the adapter must matter"
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=0)


THEIRS = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": ALL},
    "all-linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "mixed": {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1},
    "rslora": {"r": 4, "lora_alpha": 2, "target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "regex": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.1\..*(gate|k)_proj"},
    "one layer": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    "a path": {"r": 2, "lora_alpha": 4, "target_modules": ["model.layers.1.mlp.up_proj", "q_proj"]},
    "excluding": {
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*k_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_adapters_that_peft_wrote(base, tmp_path, case):
    folder, ours = base
    model = with_adapter(folder, **THEIRS[case])
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, ours.config)
    assert adapter.rank == THEIRS[case]["r"]
    assert all(x.dtype == jnp.float32 and x.shape[0] == 2 for x in jax.tree.leaves(adapter.lora))
    reference = theirs(model)
    with model.disable_adapter():
        plain = theirs(model)
    close(logits(ours, adapter), reference, plain)


def random_lora(config, targets, rank, padded):
    """Factors of `rank` columns in arrays of `padded`."""
    rng = np.random.default_rng(3)
    tree = {}
    for name in targets:
        block, out, inner = config.linears[name]
        a, b = np.zeros((config.layers, padded, inner), np.float32), np.zeros((config.layers, out, padded), np.float32)
        a[:, :rank], b[:, :, :rank] = (0.3 * rng.normal(size=x.shape) for x in (a[:, :rank], b[:, :, :rank]))
        tree.setdefault(block, {})[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return {"layers": tree}


@pytest.mark.parametrize(("targets", "rank", "alpha"), [(LINEARS, 3, 4.5), (["v", "down"], 4, 8.0)])
def test_peft_loads_ours_unchanged(base, tmp_path, targets, rank, alpha):
    folder, ours = base
    lora = random_lora(ours.config, targets, rank, padded=4)
    save_adapter(
        tmp_path / "out", lora, config=ours.config, rank=rank, alpha=alpha, base_model=str(folder), targets=targets,
        dropout=0.05,
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(["README.md", CONFIG, WEIGHTS])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = theirs(model)
    # PEFT warns of adapter keys that it misses; warnings are errors here.
    model = peft.PeftModel.from_pretrained(model, tmp_path / "out").eval()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (rank, alpha, 0.05)
    back = load_adapter(tmp_path / "out", ours.config)
    assert (back.rank, back.alpha, set(back.targets)) == (rank, alpha, set(targets))
    reference = theirs(model)
    close(logits(ours, back), reference, plain)
    # The padded factors in memory are the same adapter.
    close(logits(ours, back._replace(lora=lora)), reference, plain)
    # Which base it belongs to is enough for transformers' own way in.
    np.testing.assert_array_equal(theirs(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), reference)


def test_save_adapter_refuses_what_would_change_it(base, tmp_path):
    _, ours = base
    lora = random_lora(ours.config, ["q"], 4, padded=4)
    keywords = {"config": ours.config, "alpha": 1.0, "base_model": "x"}
    with pytest.raises(ValueError, match="go on beyond rank 3"):
        save_adapter(tmp_path / "out", lora, rank=3, targets=["q"], **keywords)
    with pytest.raises(UserError, match="rank 5 does not fit factors of rank 4"):
        save_adapter(tmp_path / "out", lora, rank=5, targets=["q"], **keywords)
    with pytest.raises(UserError, match="unknown linear 'gait'; did you mean 'gate'"):
        save_adapter(tmp_path / "out", lora, rank=4, targets=["gait"], **keywords)
    assert list(tmp_path.iterdir()) == []


def test_merged_folder_in_transformers(base, tmp_path):
    folder, ours = base
    model = with_adapter(folder, r=4, lora_alpha=6, target_modules=ALL)
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", ours.config)
    delta = lora_weights(scaled(adapter.lora, adapter.alpha / adapter.rank))
    merged = LanguageModel(add_delta(ours.params, delta), ours.config, ours.tokenizer, ours.model, str(folder))
    save_model(merged, tmp_path / "merged")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    plain = theirs(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
    close(theirs(back), theirs(model), plain)
    close(np.asarray(merged.logits(TOKENS)), theirs(back), plain)
    text = "The fox jumps over\n\n 2 dögs."
    before, after = (AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "merged"))
    assert (
        before(text)["input_ids"]
        == after(text)["input_ids"]
        == load_model(tmp_path / "merged").tokenizer(text)["input_ids"]
    )
    assert after.decode(after(text)["input_ids"]) == text
    assert back.generation_config.eos_token_id == 299 and back.generation_config.pad_token_id == 0


# What is refused, each by its name.


one_family = pytest.mark.parametrize("base", ["olmo"], indirect=True)


@pytest.fixture
def adapter_folder(base, tmp_path):
    folder, ours = base
    if not (folder / "adapter").exists():
        with_adapter(folder, r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(folder / "adapter")
    return Path(shutil.copytree(folder / "adapter", tmp_path / "adapter")), ours.config


def refused(folder, config):
    with pytest.raises(UserError) as caught:
        load_adapter(folder, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder, **keys):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | keys))


@one_family
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 3}), ("alpha_pattern", {"q_proj": 3}), ("lora_bias", True),
        ("fan_in_fan_out", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]), ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"),
        ("use_qalora", True), ("a_key_of_the_future", 1), ("peft_type", "LOHA"), ("r", 2.5), ("r", 0),
        ("lora_alpha", "4"), ("peft_type", None),
    ],
)  # fmt: skip
def test_other_adapters_are_refused_by_name(adapter_folder, key, value):
    folder, config = adapter_folder
    change(folder, **{key: value})
    text = refused(folder, config)
    assert key in text and CONFIG in text


@one_family
def test_unknown_keys_at_their_defaults_are_ignored(adapter_folder):
    folder, config = adapter_folder
    change(folder, a_key_of_the_future=None, another=False, third={}, fourth=[], qalora_group_size=16)
    assert load_adapter(folder, config).targets == ("q",)


@one_family
def test_a_config_of_the_minimum(adapter_folder):
    folder, config = adapter_folder
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}))
    assert load_adapter(folder, config).alpha == 8  # PEFT's default


@one_family
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning")  # PEFT saves the whole embeddings beside
def test_head_and_embeddings_are_refused_by_name(base, tmp_path, target):
    folder, ours = base
    with_adapter(folder, r=2, target_modules=["q_proj", target]).save_pretrained(tmp_path)
    assert target in refused(tmp_path, ours.config)


@one_family
def test_dora_and_bias_that_peft_wrote_are_refused(base, tmp_path):
    folder, ours = base
    with_adapter(folder, r=2, target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "dora")
    assert "use_dora" in refused(tmp_path / "dora", ours.config)
    change(tmp_path / "dora", use_dora=False)
    assert "lora_magnitude_vector" in refused(tmp_path / "dora", ours.config)


def rewrite(folder, edit):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    save_file(edit(tensors), folder / WEIGHTS)


@one_family
def test_factors_must_be_what_the_config_says(adapter_folder):
    folder, config = adapter_folder
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
    rewrite(folder, lambda t: t | {key.format("A"): np.zeros((3, 32), np.float32)})
    text = refused(folder, config)
    assert key.format("A") in text and "[3, 32]" in text and "[2, 32]" in text
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != key.format("B")})
    assert key.format("B") in refused(folder, config)
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != key.format("A")})
    assert "'model.layers.1.self_attn.q_proj' is missing" in refused(folder, config)
    change(folder, target_modules=["k_proj"])
    assert "is there, though not among" in refused(folder, config) or "is missing" in refused(folder, config)


@one_family
def test_a_pickled_adapter_is_refused_with_a_command_that_works(adapter_folder, monkeypatch):
    folder, config = adapter_folder
    before = load_adapter(folder, config)
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    text = refused(folder, config)
    assert "adapter_model.bin: pickled" in text
    _, _, code = shlex.split(text.split("in that folder: ")[1])
    monkeypatch.chdir(folder)
    exec(code)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, config).lora, before.lora)


@one_family
def test_missing_and_broken_files(adapter_folder):
    folder, config = adapter_folder
    assert "no such folder" in refused(folder / "nowhere", config)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-4])
    assert "truncated" in refused(folder, config)
    (folder / WEIGHTS).unlink()
    assert f"holds no {WEIGHTS}" in refused(folder, config)
    (folder / CONFIG).write_text("{")
    assert "broken JSON at line 1" in refused(folder, config)
    (folder / CONFIG).unlink()
    assert f"{CONFIG}: no such file" in refused(folder, config)
