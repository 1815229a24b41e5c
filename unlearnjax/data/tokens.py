"""Rows of text as flat token arrays on the device, and batches gathered from them inside the compiled step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unlearnjax.data.rows import Row
from unlearnjax.errors import UserError


class Tokens(NamedTuple):
    """Rows end to end (numpy): row i is flat[start[i] : start[i] + length[i]], its answer from answer_start[i] on."""

    flat: np.ndarray  # int32 [tokens]
    start: np.ndarray  # int32 [rows]
    length: np.ndarray  # int32 [rows]
    answer_start: np.ndarray  # int32 [rows], at least 1: the first token has nothing to be predicted from
    border: int | None = None  # of a pool (`pooled`): where the retain set's rows begin

    @property
    def answer_length(self) -> np.ndarray:
        return self.length - self.answer_start

    def row(self, index: int) -> np.ndarray:
        return self.flat[self.start[index] : self.start[index] + self.length[index]]


def pack(rows: Sequence[Sequence[int]], answer_start: Sequence[int]) -> Tokens:
    """Token lists to flat arrays. `answer_start` is clipped to at least 1."""
    length = np.asarray([len(r) for r in rows], np.int32)
    start = np.concatenate([[0], np.cumsum(length)[:-1]]).astype(np.int32)
    flat = np.concatenate([np.asarray(r, np.int32) for r in rows]) if rows else np.zeros(0, np.int32)
    return Tokens(flat, start, length, np.maximum(np.asarray(answer_start, np.int32), 1))


def pooled(forget: Tokens, retain: Tokens) -> Tokens:
    """One side of both: the forget rows, then the retain rows."""
    starts = np.concatenate([forget.start, retain.start + len(forget.flat)]).astype(np.int32)
    flat, length, answers = (np.concatenate([getattr(forget, f), getattr(retain, f)]) for f in
                             ("flat", "length", "answer_start"))  # fmt: skip
    return Tokens(flat, starts, length, answers, len(forget.length))


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    eos_token_id: int | None,
    *,
    source: str,
    whole: bool = False,
    prompt_tokens: int | None = None,
    row_tokens: int | None = None,
    separator: str = "",
    chat_template: bool = False,
) -> Tokens:
    """Prompt ids (nothing added, or in the chat template), answer ids, end of text.

    Args:
      rows: the texts; `output` follows `input` without a separator, as the official evaluation concatenates them.
      tokenizer: a transformers tokenizer.
      max_length: the model's context, in tokens.
      eos_token_id: appended to each answer; None appends nothing.
      source: where the rows come from, for error messages.
      whole: train on every token instead of the answer's (memorising a corpus).
      prompt_tokens: keep the last so many of a prompt. row_tokens: keep the first so many of a row, which cuts the end
        of its answer.
      separator: between prompt and answer; its tokens count as the answer's.
      chat_template: the prompt is a user's turn in the tokenizer's chat template, and the assistant's begins.

    Raises:
      UserError: a row longer than `max_length`, or one with an empty answer (the message names file and row); a
        tokenizer without a chat template.
    """
    if chat_template:
        prompts = _turns([r.input for r in rows], tokenizer)
    else:
        prompts = tokenizer([r.input for r in rows], add_special_tokens=True)["input_ids"]
    answers = tokenizer([separator + r.output if r.output else "" for r in rows], add_special_tokens=False)["input_ids"]
    end = [] if eos_token_id is None else [eos_token_id]
    packed, starts = [], []
    for index, (row, prompt, answer) in enumerate(zip(rows, prompts, answers)):
        prompt = prompt if prompt_tokens is None else prompt[-prompt_tokens:]
        ids = [*prompt, *answer, *end][:row_tokens]
        where = f"{source}: row {index + 1} (id {row.id!r})"
        if len(ids) > max_length:
            raise UserError(
                f"{where} has {len(ids)} tokens, and the model's context holds {max_length}; shorten or drop the row"
            )
        if not answer:
            raise UserError(f"{where} has an empty output; drop the row or give it an answer")
        if len(prompt) >= len(ids):
            raise UserError(f"{where}: its prompt fills all of row_tokens {row_tokens}; lower prompt_tokens")
        packed.append(ids)
        starts.append(1 if whole else len(prompt))
    return pack(packed, starts)


def _turns(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Each prompt as a user's turn, with what begins the assistant's."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat_template: true, and the model's tokenizer has no chat template; leave it out")
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    found = tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [list(ids) for ids in found["input_ids"]]


class Reference(NamedTuple):
    """What the frozen base says of each row, computed once and shared by all candidates. A field not needed is None.

    `expectation` is E_q[w], the output embedding's mean under the base's next-token distribution q, and
    `negative_entropy` is sum_v q_v log q_v: with them KL(q || p) needs no vocabulary-sized reference (see
    unlearnjax_kernels.vocab_logsumexp.xla). `others_expectation` is the same mean with the answer's token g left out,
    and `others_log_odds` is log q_g - log(1 - q_g). `every_*` are for all tokens of the rows, in `flat`'s order;
    `every_layer` is one layer's output.
    """

    nll: Float[Array, " rows"] | None = None  # summed over the answer's tokens
    answer_offset: Int[Array, " rows"] | None = None  # where a row's answer tokens start in the four below
    expectation: Float[Array, "answer_tokens hidden"] | None = None
    negative_entropy: Float[Array, " answer_tokens"] | None = None
    others_expectation: Float[Array, "answer_tokens hidden"] | None = None
    others_log_odds: Float[Array, " answer_tokens"] | None = None
    every_expectation: Float[Array, "tokens hidden"] | None = None
    every_negative_entropy: Float[Array, " tokens"] | None = None
    every_layer: Float[Array, "tokens hidden"] | None = None


class Store(NamedTuple):
    """One side (forget, retain, ...) on the device. In a pool of both the retain set's rows begin at `border`."""

    flat: Int[Array, " tokens"]
    start: Int[Array, " rows"]
    length: Int[Array, " rows"]
    answer_start: Int[Array, " rows"]
    reference: Reference
    border: Int[Array, ""] | None = None


def to_device(tokens: Tokens, reference: Reference | None = None) -> Store:
    flat, start, length, answer_start = (jnp.asarray(x, jnp.int32) for x in tokens[:4])
    edge = None if tokens.border is None else jnp.asarray(tokens.border, jnp.int32)
    return Store(flat, start, length, answer_start, reference or Reference(), edge)


class Every(NamedTuple):
    """What the base says of every token of a step's rows, prompts included; `mask` is False at padding."""

    mask: Bool[Array, "rows width"]
    expectation: Float[Array, "rows width hidden"]
    negative_entropy: Float[Array, "rows width"]


class Side(NamedTuple):
    """One side of one candidate's step. Rows that are absent (index -1) have mask False and assign 0.

    What the base says is None where no term asked for it; `Reference` explains the fields.
    """

    targets: Int[Array, "rows answers"]
    mask: Bool[Array, "rows answers"]
    assign: Float[Array, "micro rows"]  # 1 where a row belongs to a micro-batch
    nll: Float[Array, " rows"] | None = None
    expectation: Float[Array, "rows answers hidden"] | None = None
    negative_entropy: Float[Array, "rows answers"] | None = None
    others_expectation: Float[Array, "rows answers hidden"] | None = None
    others_log_odds: Float[Array, "rows answers"] | None = None
    every: Every | None = None
    inside: Bool[Array, "rows width"] | None = None  # False at padding
    layer_hidden: Float[Array, "rows width hidden"] | None = None
    retained: Bool[Array, " rows"] | None = None  # of a pool: True where the row is the retain set's


def gather(
    store: Store,
    rows: Int[Array, " rows"],
    micro: Int[Array, " rows"],
    width: int,
    answers: int,
    take: Callable[[Array, Array], Array] = lambda x, at: x[at],
) -> tuple[Int[Array, "rows width"], Int[Array, "rows answers"], Side]:
    """Token ids (right padded), the positions whose hidden states predict the answer, and the side's data.

    Args:
      rows: row indices, -1 where the slot is empty; micro: each slot's micro-batch within the step.
      width: static length of the token array; answers: static length of the answer arrays.
      take: what is at these places of the base's arrays, [tokens] or [tokens, hidden].
    """
    present = rows >= 0
    index = jnp.maximum(rows, 0)
    length = jnp.where(present, store.length[index], 0)
    at = jnp.arange(width, dtype=jnp.int32)[None, :]
    inside = at < length[:, None]
    where = jnp.where(inside, store.start[index][:, None] + at, 0)
    tokens = jnp.where(inside, store.flat[where], 0)

    first = store.answer_start[index]
    nth = jnp.arange(answers, dtype=jnp.int32)[None, :]
    mask = nth < (length - first)[:, None]
    predicted = jnp.where(mask, first[:, None] + nth, 1)
    targets = jnp.where(mask, jnp.take_along_axis(tokens, predicted, axis=1), 0)

    r = store.reference
    assign = (micro[None, :] == jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]) & present[None, :]
    answer = None if r.answer_offset is None else jnp.where(mask, r.answer_offset[index][:, None] + nth, 0)
    named = ("expectation", "negative_entropy", "others_expectation", "others_log_odds")
    held: dict[str, Any] = {"inside": inside}
    if answer is not None:
        held |= {name: take(x, answer) for name in named if (x := getattr(r, name)) is not None}
    if store.border is not None:
        held["retained"] = index >= store.border
    if r.every_layer is not None:
        held["layer_hidden"] = take(r.every_layer, where)
    if r.every_expectation is not None and r.every_negative_entropy is not None:
        held["every"] = Every(inside, take(r.every_expectation, where), take(r.every_negative_entropy, where))
    side = Side(targets, mask, assign.astype(jnp.float32), None if r.nll is None else r.nll[index], **held)
    return tokens, predicted - 1, side
