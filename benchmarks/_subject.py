"""What is measured on: a model with random weights, and rows of LUME or of its lengths."""

import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

LIMIT = 256  # ZJUKLAB's width: prompts keep their last int(0.8 * 256) tokens, rows their first 256
MADE_UP = 1112  # rows a side, as many as LUME's train split has to forget


class Size(NamedTuple):
    """A decoder of OLMo's architecture, untied."""

    layers: int
    width: int
    intermediate: int
    heads: int
    vocabulary: int
    rank: int = 32  # of the adapters, on every linear

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's linears: q, k, v, o, gate, up, down."""
        d, f = self.width, self.intermediate
        return [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]

    @property
    def adapter_parameters(self) -> int:
        return self.layers * sum(self.rank * (i + o) for i, o in self.linears)


SIZES = {
    "tiny": Size(1, 64, 128, 4, 512, 4),
    "small": Size(4, 256, 768, 8, 4096),
    "olmo-1b": Size(16, 2048, 8192, 16, 50304),
}


class Subject(NamedTuple):
    """Plain data, for children: a model folder and rows as (prompt ids, answer ids with an end token)."""

    folder: str
    size: Size
    rows: dict[str, list[tuple[list[int], list[int]]]]
    source: str
    hardware: dict[str, Any]


def make(folder: str, a: Any) -> Subject:
    """Write the model to `folder` and make the rows; call it in a child, it starts JAX."""
    import jax
    import jax.numpy as jnp
    from _common import hardware

    from unlearnjax.errors import check_known
    from unlearnjax.io.huggingface import check_dtype
    from unlearnjax.models.abstract import init_params
    from unlearnjax.models.config import ModelConfig
    from unlearnjax.models.decoder import build
    from unlearnjax.models.language_model import LanguageModel, save_model

    machine = hardware()
    check_dtype(a.dtype)
    check_known([a.size], SIZES, "size", "benchmark")
    size = SIZES["tiny" if a.quick else a.size]
    config = ModelConfig(
        "olmo", size.vocabulary, size.width, size.intermediate, size.layers, size.heads, size.heads,
        size.width // size.heads, "layer", max_positions=2048, eos_token_ids=(), pad_token_id=0,
    )  # fmt: skip
    rows, source = make_rows(a.forget, a.retain, a.tokenizer, size.vocabulary)
    if a.quick:
        rows = {side: mine[:64] for side, mine in rows.items()}
    model = build(config)
    params = init_params(model.abstract(jnp.dtype(a.dtype)), jax.random.key(0))
    save_model(LanguageModel(params, config, None, model, "random weights"), folder)
    return Subject(folder, size, rows, source, machine)


def make_rows(
    forget: str | None, retain: str | None, tokenizer: str | None, vocabulary: int
) -> tuple[dict[str, list[tuple[list[int], list[int]]]], str]:
    """Rows by side, cut as ZJUKLAB's code cuts them, and where they come from.

    With paths: LUME's texts, by a tokenizer of `vocabulary` entries trained on them (ids of a given tokenizer are
    folded into the vocabulary: the work depends on lengths alone). Without: the generated corpus's text, end to end,
    cut to lengths like those of LUME's train split under OLMo's tokenizer.
    """
    from unlearnjax.data.bpe import train_tokenizer
    from unlearnjax.data.rows import Row, load_rows
    from unlearnjax.data.synthetic import make_corpus

    if forget is not None and retain is not None:
        texts = {"forget": load_rows(forget), "retain": load_rows(retain)}
        source = "the given rows"
    else:
        corpus = make_corpus(0)
        texts = {"forget": corpus.forget, "retain": corpus.retain}
        source = "generated text cut to lengths like LUME's"
    if tokenizer is None:
        spoken = train_tokenizer([x for rows in texts.values() for r in rows for x in (r.input, r.output)], vocabulary)
        source += f", a {len(spoken)}-entry tokenizer trained on them"
    else:
        from transformers import PreTrainedTokenizerFast

        spoken = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
        source += ", ids of the given tokenizer folded into the vocabulary"

    def ids(rows: Sequence[Row], field: str) -> list[list[int]]:
        encoded = spoken([getattr(r, field) for r in rows], add_special_tokens=False)["input_ids"]
        return [[i % vocabulary for i in row] for row in encoded]

    end = [1]
    out = {}
    for number, (side, rows) in enumerate(texts.items()):
        pairs = list(zip(ids(rows, "input"), ids(rows, "output")))
        if forget is None:
            pairs = _like_lume([i for pair in pairs for part in pair for i in part], random.Random(number))
        out[side] = [_cut(prompt, answer + end) for prompt, answer in pairs]
    return out, source


def _cut(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    prompt = prompt[-int(0.8 * LIMIT) :]
    return prompt, answer[: LIMIT - len(prompt)]


def _like_lume(text: list[int], draw: random.Random) -> list[tuple[list[int], list[int]]]:
    """LUME's two kinds of row: 31% sentence completions (prompt 135 +- 70, answer 47 +- 12 tokens, the end token
    counted), 69% questions (13 +- 5 and 7.5 +- 4)."""

    def length(mean: float, deviation: float, least: int, most: int) -> int:
        return round(min(max(draw.gauss(mean, deviation), least), most))

    def piece(count: int) -> list[int]:
        begin = draw.randrange(len(text) - count)
        return text[begin : begin + count]

    rows = []
    for _ in range(MADE_UP):
        if draw.random() < 0.31:
            prompt, answer = length(135, 70, 20, 280), length(46, 12, 8, 90)
        else:
            prompt, answer = length(13, 5, 5, 40), length(6.5, 4, 1, 30)
        rows.append((piece(prompt), piece(answer)))
    return rows


def describe(subject: Subject) -> dict[str, Any]:
    """The rows in numbers, for the result."""
    sides = {}
    for side, rows in subject.rows.items():
        lengths = sorted(len(p) + len(x) for p, x in rows)
        sides[side] = {
            "rows": len(rows),
            "tokens_mean": round(sum(lengths) / len(lengths), 1),
            "tokens_median": lengths[len(lengths) // 2],
            "tokens_most": lengths[-1],
            "answer_tokens_mean": round(sum(len(x) for _, x in rows) / len(rows), 1),
        }
    return {"source": subject.source, **sides}


def stratified(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even steps of their order by length: the same mix of lengths for any count."""
    ordered = sorted(items, key=len)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


def model_entry(size: Size, dtype: str) -> dict[str, Any]:
    return json.loads(json.dumps({**size._asdict(), "dtype": dtype, "adapter_parameters": size.adapter_parameters}))
