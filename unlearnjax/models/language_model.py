"""A language model with its tokenizer: what `load_model` returns and `save_model` writes."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.errors import UserError
from unlearnjax.io.card import model_card
from unlearnjax.io.huggingface import check_dtype, load_config, load_params, load_tokenizer, resolve, save_folder
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.decoder import build
from unlearnjax.models.precision import precision
from unlearnjax.models.protocol import Model


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model.

    Attributes:
      params: the decoder's parameter tree (see `unlearnjax.models.abstract`).
      config: its sizes.
      tokenizer: the transformers tokenizer, or None for a folder without one.
      model: the forward pass and its companions as functions.
      source: what it was loaded from, a folder or a hub id.
    """

    params: PyTree[Array] = field(repr=False)
    config: ModelConfig
    tokenizer: Any = field(repr=False)
    model: Model = field(repr=False)
    source: str

    def logits(
        self, tokens: Int[Any, "batch length"], attention_mask: Int[Any, "batch length"] | None = None
    ) -> Float[Array, "batch length vocab"]:
        """Next-token logits in float32, [batch, length, vocab].

        Args:
          tokens: token ids, [batch, length].
          attention_mask: 1 for tokens and 0 for padding, on either side; by default there is no padding. Logits at
            padding positions mean nothing.

        Raises:
          UserError: wrong shapes, ids outside the vocabulary, or more tokens than the model has positions.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise UserError(f"tokens: must be whole numbers [batch, length], not {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"tokens: ids must lie in 0..{self.config.vocab_size - 1}; use the model's own tokenizer")
        if ids.shape[1] > self.config.max_positions:
            raise UserError(f"tokens: {ids.shape[1]} is longer than the model's {self.config.max_positions} positions")
        segments = None
        if attention_mask is not None:
            mask = np.asarray(attention_mask)
            if mask.shape != ids.shape:
                raise UserError(f"attention_mask: has shape {list(mask.shape)}, tokens have {list(ids.shape)}")
            segments = jnp.asarray(mask.astype(bool), jnp.int32)
        return _logits(self.model, self.params, jnp.asarray(ids, jnp.int32), segments)

    def require_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
          UserError: the model's folder has none.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.source}: has no tokenizer files, and text is to be read; add its tokenizer.json")
        return self.tokenizer


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: PyTree[Array], tokens: Array, segments: Array | None) -> Array:
    hidden = model.forward(params, None, tokens, segments=segments).hidden
    contract = (((2,), (1,)), ((), ()))
    return jax.lax.dot_general(
        hidden, model.head(params), contract, precision=precision(hidden.dtype), preferred_element_type=jnp.float32
    )


def load_model(
    folder: str | Path, dtype: str = "float32", *, unroll: bool | None = None, remat: Remat | None = None,
    mesh: Mesh | None = None,
) -> LanguageModel:  # fmt: skip
    """Load a causal language model from a Hugging Face folder or the hub.

    Args:
      folder: a folder with config.json and safetensors weights, or a hub id.
      dtype: the weights' dtype: float32, bfloat16 or float16.
      unroll, remat: how the layers run (see `unlearnjax.models.decoder.build`).
      mesh: the devices that the weights are laid on (see `unlearnjax.distributed.mesh`); default: jax's default device.

    Raises:
      UserError: an unknown dtype, no such model, an unsupported architecture, or broken or pickled files.
    """
    check_dtype(dtype)
    path = resolve(folder)
    config = load_config(path)
    params = load_params(path, config, dtype, mesh)
    return LanguageModel(params, config, load_tokenizer(path), build(config, unroll=unroll, remat=remat), str(folder))


def save_model(model: LanguageModel, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that transformers and `load_model` load; it appears whole or not at all.

    Args:
      model: what to write; the weights keep their dtype.
      folder: a new or empty folder.
      card: README.md, or None for a short default.

    Raises:
      UserError: the folder is taken.
    """
    text = model_card(title=Path(folder).name, base_model=model.source) if card is None else card
    save_folder(model.params, model.config, folder, model.tokenizer, card_text=text)
