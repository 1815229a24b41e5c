"""Merging N candidates' deltas into one: `merge` and `methods` for any pytree, `lora_space` for LoRA adapters."""

from unlearnjax.merging.api import merge, methods
from unlearnjax.merging.core_space import Core, core_space, merge_core, truncate_lora
from unlearnjax.merging.lora_space import LowRank, concatenate_lora, lora_delta, merge_lora, to_lora, truncation_errors
from unlearnjax.merging.protocol import (
    Accumulator,
    Hyperparameter,
    MergeMethod,
    Properties,
    Round,
    Rule,
)
from unlearnjax.merging.stream import merge_stream

__all__ = [
    "Accumulator",
    "Core",
    "Hyperparameter",
    "LowRank",
    "MergeMethod",
    "Properties",
    "Round",
    "Rule",
    "concatenate_lora",
    "core_space",
    "lora_delta",
    "merge",
    "merge_core",
    "merge_lora",
    "merge_stream",
    "methods",
    "to_lora",
    "truncate_lora",
    "truncation_errors",
]
