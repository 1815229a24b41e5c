"""Texts through a CSV file: what pandas makes of them, and nothing else."""

import io
import random

import pytest

from unlearnjax.evaluation.readback import MISSING, read_back

pd = pytest.importorskip("pandas")

TEXTS = [
    *sorted(MISSING), "none", "Nan", "NAN", " nan", "  ", "\n", "a", "A b", 'a "q", b', "a\nb", "007", "8", "-3", "+5",
    " 7", "7\n", "1.5", "1.50", "5.", ".5", "1e5", "1E-3", "1e400", "inf", "-Infinity", "+INF", "infin", "1_000",
    "1,000", "0x10", "True", "FALSE", "tRUE", "True ", "e5", ".", "-", "٣", "1 2", "9223372036854775808", "-0", "-0.0",
    "6 6 6",
]  # fmt: skip
NUMBERS = ["007", "8", "-3", "+5", " 7", "1.5", "5.", "1e5", "", "nan", "None", "inf"]
WHOLE = ["007", "8", "-3", "900123456", "12\n"]


def through_pandas(column):
    buffer = io.StringIO()
    pd.DataFrame({"id": [f"x{i}" for i in range(len(column))], "model_output": column}).to_csv(buffer, index=False)
    buffer.seek(0)
    return [str(value) for value in pd.read_csv(buffer)["model_output"].tolist()]


@pytest.mark.parametrize("pool", [TEXTS, NUMBERS, WHOLE, [*WHOLE, ""], ["True", "false", "TRUE"], ["True", "no", ""]])
def test_equals_pandas_on_random_columns(pool):
    draw = random.Random(0)
    for _ in range(60):
        column = draw.choices(pool, k=draw.randint(1, 5))
        assert read_back(column) == through_pandas(column), column


@pytest.mark.parametrize("text", TEXTS)
def test_equals_pandas_alone_and_beside_a_word(text):
    assert read_back([text]) == through_pandas([text])
    assert read_back([text, "word"]) == through_pandas([text, "word"])


def test_numbers_beyond_64_bits():
    for column in (["18446744073709551615", "1"], ["18446744073709551615", "-1"], ["99999999999999999999", "007"]):
        assert read_back(column) == through_pandas(column), column
