"""What a decoder is: its sizes and its family's small differences, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unlearnjax.errors import UserError

ARCHITECTURES = {"OlmoForCausalLM": "olmo", "LlamaForCausalLM": "llama"}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding; `kind` is `default`, `linear` or `llama3`, the rest is for the scaled kinds."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A causal decoder: pre-norm attention and gated MLP blocks. Hashable, so that it can be a static jit argument."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str  # "layer" (OLMo: LayerNorm without parameters) or "rms" (RMSNorm with a scale)
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    clip_qkv: float | None = None
    tie_embeddings: bool = False
    max_positions: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def linears(self) -> dict[str, tuple[str, int, int]]:
        """Every linear of a layer: name -> (block, output features, input features)."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden_size, self.intermediate_size
        return {
            "q": ("attention", query, d),
            "k": ("attention", key, d),
            "v": ("attention", key, d),
            "o": ("attention", d, query),
            "gate": ("mlp", f, d),
            "up": ("mlp", f, d),
            "down": ("mlp", d, f),
        }


def _rope(raw: Mapping[str, Any], where: str) -> Rope:
    # transformers 5 writes `rope_parameters`; older configs have `rope_theta` and `rope_scaling`.
    scaling = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"{where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    for where_from in (raw, scaling):
        if where_from.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UserError(f"{where}: partial_rotary_factor is set, and partial rotary embeddings are not supported")
    theta = float(scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if kind == "default":
        return Rope(theta)
    factor = float(scaling.get("factor", 1.0))
    if kind == "linear":
        return Rope(theta, kind, factor)
    original = scaling.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    return Rope(theta, kind, factor, low, high, int(original))


def _integer(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"{where}: key {key!r} must be a positive whole number, not {value!r}")
    return value


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a parsed config.json.

    Args:
      raw: the parsed JSON object.
      where: the file's name, for error messages.

    Raises:
      UserError: an unsupported architecture (the message lists the supported ones), a missing or wrong key, or a
        variation that would silently compute something else (biases, other activations, partial rotary).
    """
    names = raw.get("architectures") or []
    name = names[0] if names else f"model_type {raw.get('model_type')!r}"
    if name not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {name} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    family = ARCHITECTURES[name]
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is set, and linears with a bias are not supported")
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantized weights are not supported; give the model in float32, bfloat16 or float16")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    hidden, heads = _integer(raw, "hidden_size", where), _integer(raw, "num_attention_heads", where)
    kv_heads = _integer(raw, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise UserError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    eos = raw.get("eos_token_id")
    clip = raw.get("clip_qkv") if family == "olmo" else None
    return ModelConfig(
        family=family,
        vocab_size=_integer(raw, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size", where),
        layers=_integer(raw, "num_hidden_layers", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_integer(raw, "head_dim", where, hidden // heads),
        norm="layer" if family == "olmo" else "rms",
        norm_eps=1e-5 if family == "olmo" else float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw, where),
        clip_qkv=None if clip is None else float(clip),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=_integer(raw, "max_position_embeddings", where, 2048),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
        pad_token_id=raw.get("pad_token_id"),
    )


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json that transformers reads for `config`; the inverse of `config_from_hf`."""
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope |= {
            "low_freq_factor": config.rope.low_frequency_factor,
            "high_freq_factor": config.rope.high_frequency_factor,
            "original_max_position_embeddings": config.rope.original_positions,
        }
    eos = config.eos_token_ids
    raw: dict[str, Any] = {
        "architectures": [next(k for k, v in ARCHITECTURES.items() if v == config.family)],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope,
        "rope_theta": config.rope.theta,
        "attention_bias": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
    }
    if config.family == "olmo":
        raw["clip_qkv"] = config.clip_qkv
    else:
        raw |= {"head_dim": config.head_dim, "rms_norm_eps": config.norm_eps, "mlp_bias": False}
    return raw


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with some fields changed."""
    return dataclasses.replace(config, **changes)
