"""Rows as token arrays: what is an answer, what is refused, and what a gathered batch holds."""

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.data.tokens import Reference, gather, pack, to_device, tokenize
from unlearnjax.errors import UserError

ROWS = [Row("a", "Who is Ann?", "a sailor", "T"), Row("b", "What is her number?", "900-12-3456", "T")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([r.input + r.output for r in ROWS] * 4, 300)


def test_prompt_answer_and_end_of_text(tokenizer):
    t = tokenize(ROWS, tokenizer, max_length=64, eos_token_id=tokenizer.eos_token_id, source="f.jsonl")
    for i, row in enumerate(ROWS):
        ids = t.row(i).tolist()
        first = int(t.answer_start[i])
        assert tokenizer.decode(ids[:first]) == row.input
        assert tokenizer.decode(ids[first:-1]) == row.output  # no separator between the two
        assert ids[-1] == tokenizer.eos_token_id
        assert t.answer_length[i] == len(ids) - first
    whole = tokenize(ROWS, tokenizer, max_length=64, eos_token_id=None, source="f.jsonl", whole=True)
    assert whole.answer_start.tolist() == [1, 1]


def test_a_row_longer_than_the_context_names_file_and_row(tokenizer):
    with pytest.raises(UserError, match=r"f\.jsonl: row 1 \(id 'a'\) has \d+ tokens, and the model's context holds 4"):
        tokenize(ROWS, tokenizer, max_length=4, eos_token_id=1, source="f.jsonl")


def test_an_empty_answer_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"f\.jsonl: row 2 \(id 'x'\) has an empty output"):
        tokenize([ROWS[0], Row("x", "Why?", "", "T")], tokenizer, max_length=64, eos_token_id=1, source="f.jsonl")


def test_gather_pads_right_and_finds_what_predicts_the_answer():
    tokens = pack([[5, 6, 7], [8, 9, 10, 11, 12], [3, 4]], [1, 3, 0])
    expectation = jnp.arange(5 * 2, dtype=jnp.float32).reshape(5, 2)
    reference = Reference(
        jnp.asarray([1.0, 2.0, 3.0], jnp.float32),
        jnp.asarray([0, 2, 4], jnp.int32),
        expectation,
        jnp.arange(5, dtype=jnp.float32),
    )
    store = to_device(tokens, reference)
    rows = jnp.asarray([1, -1, 0], jnp.int32)
    ids, at, side = gather(store, rows, jnp.asarray([0, 0, 1], jnp.int32), 6, 4)
    np.testing.assert_array_equal(ids, [[8, 9, 10, 11, 12, 0], [0] * 6, [5, 6, 7, 0, 0, 0]])
    np.testing.assert_array_equal(side.mask, [[1, 1, 0, 0], [0] * 4, [1, 1, 0, 0]])
    np.testing.assert_array_equal(np.asarray(side.targets)[np.asarray(side.mask)], [11, 12, 6, 7])
    np.testing.assert_array_equal(np.asarray(at)[np.asarray(side.mask)], [2, 3, 0, 1])
    np.testing.assert_array_equal(side.assign, [[1, 0, 0], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(side.nll[jnp.asarray([0, 2])], [2.0, 1.0])
    np.testing.assert_array_equal(side.expectation[0, :2], expectation[2:4])
    np.testing.assert_array_equal(side.expectation[2, :2], expectation[0:2])
    np.testing.assert_array_equal(side.negative_entropy[0, :2], [2.0, 3.0])
