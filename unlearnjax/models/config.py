"""What a decoder is: its sizes and its family's small differences."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Remat = Literal["none", "linears", "full"]  # what a backward pass recomputes (see `unlearnjax.models.decoder.build`)


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
    """A causal decoder: attention and gated MLP blocks. Hashable, so that it can be a static jit argument.

    `norm` is the kind of all norms: `layer` (OLMo: LayerNorm without parameters), `rms` (RMSNorm; the scale multiplies
    what has been cast back to the weights' dtype), `rms_wide` (OLMo-2: the scale multiplies in float32), `rms_offset`
    (Gemma: as wide, by 1 + scale).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: str
    norm_eps: float = 1e-5
    rope: Rope = Rope()
    clip_qkv: float | None = None
    tie_embeddings: bool = False
    max_positions: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    norms: str = "before"  # where a sub-layer is normed: "before" it, "after" it (OLMo-2), or "around" it (Gemma)
    qkv_bias: bool = False  # the linears q, k and v have a bias
    qk_norm: str | None = None  # queries and keys are normed: each "head" by itself, or the "whole" of them (OLMo-2)
    activation: str = "silu"  # of the MLP's gate: "silu" or "gelu_tanh"
    embed_scale: float = 1.0  # multiplies the input embeddings, not the head
    query_pre_attn_scalar: int | None = None  # scores are divided by its root; by head_dim's where None
    window: int | None = None  # how many tokens a query of a sliding layer sees, itself included
    sliding: tuple[bool, ...] = ()  # per layer; () is none
    local_rope: Rope | None = None  # of the sliding layers, where they have their own

    @property
    def attention_scale(self) -> float:
        """What queries times keys are multiplied by."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Linears that are one in the family's checkpoints: its name -> ours, in the order of their rows."""
        return {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")} if self.family == "phi3" else {}

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


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with some fields changed."""
    return dataclasses.replace(config, **changes)
