"""What the official scorer sees of a text after it has passed through a CSV file and pandas.

The scorer writes generations with `to_csv`, reads them with `read_csv` and scores `str(value)`. So texts that pandas
takes for a missing value become "nan" (an empty answer among them), and a column that holds nothing but numbers comes
back in numbers' spelling. Followed as pandas 3.1 does it; it is part of the metric's definition.
"""

import re
from collections.abc import Sequence

MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "None", "NaN", "nan", "-NaN", "-nan"]
) | frozenset(["1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"])

_SPACE = " \t\n\r\v\f"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|infinity)", re.IGNORECASE)


def read_back(column: Sequence[str]) -> list[str]:
    """The texts of one column of one file, as `str` of what pandas reads.

    Missing values become "nan"; a column of only whole numbers, numbers, or true and false (and missing values, which
    turn whole numbers to floats) is spelt as Python spells them; any other column keeps its texts.
    """
    missing = [text in MISSING for text in column]
    present = [text.strip(_SPACE) for text, gone in zip(column, missing) if not gone]
    if not present:
        return ["nan" for _ in column]
    if all(_INTEGER.fullmatch(text) for text in present):
        values = [int(text) for text in present]
        if min(values) < -(2**63) or max(values) >= 2**63:
            return _large(column, values, any(missing))
        if not any(missing):
            return [str(value) for value in values]
        return _fill([str(float(value)) for value in values], missing)
    if all(_FLOAT.fullmatch(text) for text in present):
        return _fill([str(float(text)) for text in present], missing)
    bare = [text for text, gone in zip(column, missing) if not gone]
    if all(text.lower() in ("true", "false") for text in bare):
        return _fill([text.capitalize() for text in bare], missing)
    return _fill(bare, missing)


def _large(column: Sequence[str], values: list[int], missing: bool) -> list[str]:
    # Beyond 64 bits pandas gives up on numbers, and then on missing values too.
    if missing or (min(values) < 0 and max(values) < 2**64):
        return list(column)
    return [str(value) for value in values]


def _fill(present: list[str], missing: list[bool]) -> list[str]:
    rest = iter(present)
    return ["nan" if gone else next(rest) for gone in missing]
