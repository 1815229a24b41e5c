"""config.json in and out, and what is refused instead of silently computing something else."""

import pytest

from unlearnjax.errors import UserError
from unlearnjax.models.config import Rope, config_from_hf, config_to_hf, replace

# What allenai/OLMo-1B-0724-hf's config.json holds.
OLMO_1B = {
    "architectures": ["OlmoForCausalLM"], "attention_bias": False, "clip_qkv": 8.0, "eos_token_id": 50279,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "model_type": "olmo", "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16,
    "pad_token_id": 1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip
LLAMA = OLMO_1B | {
    "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5,
    "eos_token_id": [1, 2], "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def test_olmo_1b():
    config = config_from_hf(OLMO_1B)
    assert (config.norm, config.clip_qkv, config.head_dim, config.eos_token_ids) == ("layer", 8.0, 128, (50279,))
    assert config.rope == Rope(theta=10000.0)


def test_llama_3():
    config = config_from_hf(LLAMA)
    assert (config.norm, config.clip_qkv, config.head_dim, config.kv_heads) == ("rms", None, 64, 4)
    assert config.eos_token_ids == (1, 2)
    assert config.rope == Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("raw", [OLMO_1B, OLMO_1B | {"clip_qkv": None, "eos_token_id": None}, LLAMA])
def test_out_and_in_again(raw):
    config = config_from_hf(raw)
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(config_to_hf(replace(config, tie_embeddings=True))).tie_embeddings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "supported: LlamaForCausalLM, OlmoForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"architectures": ["LlamaForCausalML"]}, "supported: LlamaForCausalLM, OlmoForCausalLM"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is set"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"vocab_size": None}, "'vocab_size' must be a positive whole number"),
        ({"hidden_size": -1}, "'hidden_size' must be a positive whole number"),
        ({"hidden_size": True}, "'hidden_size' must be a positive whole number"),
    ],
)
def test_refusals(change, says):
    with pytest.raises(UserError) as caught:
        config_from_hf(OLMO_1B | change, "x/config.json")
    assert str(caught.value).startswith("x/config.json: ") and says in str(caught.value)
