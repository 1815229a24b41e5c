"""Personal values in texts: recognised by their form, brought to a normal form, and found anywhere in another text.

| kind    | recognised as                                | compared as                                       |
|---------|----------------------------------------------|---------------------------------------------------|
| email   | name@host.tld, Markdown's escapes undone     | lower case, " at " and " dot " read as signs      |
| date    | ISO, month names, d/m/y and m/d/y            | the day itself; every reading of 3/4/1984         |
| ssn     | 9 digits, apart or together                  | its digits, whatever stands between them          |
| phone   | 10 digits (or 11 that start with 1)          | the same                                          |
| number  | any other answer of 7 digits or more         | the same                                          |
| address | house number, street ..., state code and zip | words but for "apt", "suite" and their like       |
| text    | any other answer                             | words: case, accents and punctuation do not count |

A value is found `near` when an edit distance (Levenshtein's) of at most one per 8 characters of its normal form
separates it from some part of the text: 1 for a number of 9 or 10 digits, about 5 for an address, 0 below 8
characters. Dates, and texts that hold digits, are found exactly or not at all: the next day is another day.
"""

import datetime
import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("email", "date", "ssn", "phone", "number", "address", "text")
CHARACTERS_PER_EDIT = 8
FEWEST_DIGITS = 7  # shorter numbers occur by chance, and are texts

_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_MONTH = r"(?P<month>" + "|".join(rf"{m[:3]}{'t?' if m[0] == 's' else ''}(?:{m[3:]})?" for m in _MONTHS) + r")\b\.?"
_DAY = r"(?P<day>[0-3]?[0-9])(?:st|nd|rd|th)?"
_YEAR = r"(?P<year>[0-9]{4})"
_APART, _END = r"(?<![0-9a-z])", r"(?![0-9a-z])"
_DATES = [
    re.compile(_APART + pattern + _END)
    for pattern in (
        rf"{_YEAR}(?P<mark>[-/.])(?P<number>[01]?[0-9])(?P=mark)(?P<day>[0-3]?[0-9])",
        rf"{_MONTH}\s+{_DAY},?\s+{_YEAR}",
        rf"{_DAY}\s+(?:of\s+)?{_MONTH},?\s+{_YEAR}",
        rf"{_YEAR},?\s+{_MONTH}\s+{_DAY}",
        r"(?P<first>[0-3]?[0-9])(?P<mark>[-/.])(?P<second>[0-3]?[0-9])(?P=mark)(?P<year>[0-9]{4}|[0-9]{2})",
        r"(?P<year>[12][0-9]{3})(?P<number>[01][0-9])(?P<day>[0-3][0-9])",
    )
]
_EMAIL = re.compile(r"(?<![a-z0-9._%+-])[a-z0-9](?:[a-z0-9._%+'-]*[a-z0-9_+-])?@[a-z0-9-]+(?:\.[a-z0-9-]+)+", re.I)
_SSN = re.compile(r"(?<![0-9])[0-9]{3}[- ]?[0-9]{2}[- ]?[0-9]{4}(?![0-9])")
_PHONE = re.compile(r"(?<![0-9])(?:\+?1[-. ]?)?\(?[0-9]{3}\)?[-. /]?[0-9]{3}[-. ]?[0-9]{4}(?![0-9])")
_ADDRESS = re.compile(
    r"(?<![0-9#])[0-9]{1,6}[A-Za-z]?(?:-[0-9]+)?,? [A-Z0-9#][^\n;:]{2,100}?"
    r",? [A-Z]{2}\.?,? [0-9]{5}(?:-[0-9]{4})?(?![0-9])"
)
# The same in another order, as a whole answer may have it.
_ADDRESS_LIKE = re.compile(r"[0-9]{1,6}[A-Za-z]? [^\n;:]{2,100}\b[0-9]{5}(?:-[0-9]{4})?\b[^\n;:]{0,40}")
_UNITS = frozenset(["apt", "apartment", "unit", "suite", "ste"])
_NUMBER = re.compile(r"[0-9()+.,/\s-]+")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])[\s()./_-]{1,3}(?=[0-9])")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]()#+.!@-])")
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212"), "-")
_POSSESSIVE = re.compile(r"['\u2019]s\b")


class Value(NamedTuple):
    """`text` as it was written; `form` what is searched for."""

    kind: str
    text: str
    form: str


class Found(NamedTuple):
    """Whether a text holds a value in its normal form, and whether it does within the edit distance."""

    exact: bool
    near: bool


def plain(text: str) -> str:
    """Compatibility forms and dashes made one (NFKC), Markdown's backslashes removed; case is kept."""
    return _ESCAPED.sub(r"\1", unicodedata.normalize("NFKC", text).translate(_DASHES))


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, lower-cased and without accents."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", plain(text)) if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", bare.casefold())


def _address_form(text: str) -> str:
    return " ".join(w for w in words(text) if w not in _UNITS)


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


def _number_kind(digits: str) -> tuple[str, str]:
    if len(digits) == 11 and digits[0] == "1":
        digits = digits[1:]
    return {9: "ssn", 10: "phone"}.get(len(digits), "number"), digits


def _day(year: int, month: int, day: int) -> str | None:
    try:
        return datetime.date(year, month, day).isoformat()
    except ValueError:
        return None


def _readings(match: re.Match[str]) -> list[str]:
    """The days that a match may mean, the American reading first."""
    found = match.groupdict()
    if "first" in found:
        first, second, year = int(found["first"]), int(found["second"]), int(found["year"])
        years = [year] if len(found["year"]) == 4 else [1900 + year, 2000 + year]
        days = [_day(y, m, d) for m, d in ((first, second), (second, first)) for y in years]
    else:
        if "month" in found:
            month = 1 + next(i for i, name in enumerate(_MONTHS) if name.startswith(found["month"][:3]))
        else:
            month = int(found["number"])
        days = [_day(int(found["year"]), month, int(found["day"]))]
    return [day for day in days if day is not None]


def _dates(text: str) -> Iterator[tuple[tuple[int, int], list[str]]]:
    # Lower-casing letter by letter keeps the places.
    lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    for pattern in _DATES:
        for match in pattern.finditer(lower):
            readings = _readings(match)
            if readings:
                yield match.span(), readings


def value_of(answer: str) -> Value:
    """The whole of a short answer as one value."""
    text = plain(answer).strip()
    bare = text.rstrip(". ")
    if _EMAIL.fullmatch(bare):
        return Value("email", answer, bare.casefold())
    for span, readings in _dates(bare):
        if span == (0, len(bare)):
            return Value("date", answer, readings[0])
    if _NUMBER.fullmatch(bare) and len(_digits(bare)) >= FEWEST_DIGITS:
        kind, form = _number_kind(_digits(bare))
        return Value(kind, answer, form)
    if _ADDRESS.fullmatch(bare) or _ADDRESS_LIKE.fullmatch(bare):
        return Value("address", answer, _address_form(answer))
    return Value("text", answer, " ".join(words(answer)))


def values_in(text: str) -> list[Value]:
    """The different values that a longer text holds: emails, dates, numbers of 9 or 10 digits and addresses."""
    left = plain(text)
    found: list[Value] = []

    def take(kind: str, spans: list[tuple[int, int]], forms: list[str]) -> None:
        nonlocal left
        for (start, end), form in zip(spans, forms):
            if "\0" not in left[start:end]:
                found.append(Value(kind, left[start:end], form))
                left = left[:start] + "\0" * (end - start) + left[end:]

    matches = list(_EMAIL.finditer(left))
    take("email", [m.span() for m in matches], [m[0].casefold() for m in matches])
    dates = list(_dates(left))
    take("date", [span for span, _ in dates], [readings[0] for _, readings in dates])
    for pattern in (_SSN, _PHONE):
        matches = list(pattern.finditer(left))
        for match in matches:
            kind, form = _number_kind(_digits(match[0]))
            take(kind, [match.span()], [form])
    matches = list(_ADDRESS.finditer(left))
    take("address", [m.span() for m in matches], [_address_form(m[0]) for m in matches])
    different = {(value.kind, value.form): value for value in reversed(found)}
    return list(reversed(different.values()))


def edits_allowed(value: Value) -> int:
    """The edit distance at which a value still counts as found."""
    if value.kind == "date" or (value.kind == "text" and any(c.isdigit() for c in value.form)):
        return 0
    return len(value.form) // CHARACTERS_PER_EDIT


def substring_distance(pattern: str, text: str) -> int:
    """The least edit distance of `pattern` to any part of `text`, the empty one included (Sellers 1980)."""
    letters = np.array([ord(c) for c in text], np.int64)
    places = np.arange(len(letters) + 1)
    row = np.zeros_like(places)
    for i, c in enumerate(pattern, start=1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(c)))
        # Insertions go along the row: d[j] = min over k <= j of (d[k] + j - k).
        row = np.minimum.accumulate(np.concatenate([[i], kept]) - places) + places
    return int(row.min())


def find(value: Value, text: str) -> Found:
    """Look for a value anywhere in a text."""
    if value.kind == "date":
        exact = any(value.form in readings for _, readings in _dates(plain(text)))
        return Found(exact, exact)
    if value.kind in ("ssn", "phone", "number"):
        form, where = value.form, re.sub(r"[^0-9]+", " ", _BETWEEN_DIGITS.sub("", plain(text)))
        exact = form in where
    elif value.kind == "email":
        form, where = value.form, _joined_emails(text)
        exact = re.search(rf"(?<![a-z0-9._%+-]){re.escape(form)}(?![a-z0-9_-]|\.[a-z0-9])", where) is not None
    else:
        # Spaces around both keep to whole words: "Ed" is not in "edited".
        written = _address_form(text) if value.kind == "address" else " ".join(words(text))
        form, where = f" {value.form} ", f" {written} "
        exact = form in where
    allowed = edits_allowed(value)
    return Found(exact, exact or (allowed > 0 and substring_distance(form, where) <= allowed))


def _joined_emails(text: str) -> str:
    lower = plain(text).casefold()
    lower = re.sub(r"\s*[(\[{<]?\s*(?:@|\bat\b)\s*[)\]}>]?\s*", "@", lower)
    return re.sub(r"\s*[(\[{<]\s*dot\s*[)\]}>]\s*|\s+dot\s+", ".", lower)


def derivable(value: Value, prompt: str) -> bool:
    """Whether the prompt gives the value away: it holds it, or an email's local part is built from words it holds.

    Built means: the parts between `.`, `_`, `-` and `+` (digits left out) are words of the prompt or first letters of
    some, at least one a whole word of three letters or more; or the part is two neighbouring words written together,
    where the first or the second may be its first letter. The host is taken for known: in LUME all have the same.
    """
    if find(value, prompt).exact:
        return True
    if value.kind != "email":
        return False
    there = words(_POSSESSIVE.sub("", prompt).replace("'", "").replace("\u2019", ""))
    local = re.sub(r"[0-9']", "", value.form.split("@")[0])
    parts = [p for p in re.split(r"[._+-]+", local) if p]
    letters = {w[0] for w in there}
    whole = any(len(p) >= 3 and p in there for p in parts)
    if whole and all(p in there or p in letters for p in parts):
        return True
    joined = "".join(parts)
    pairs = {x for a, b in itertools.pairwise(there) if len(a) + len(b) > 3 for x in (a + b, a[0] + b, a + b[0])}
    return len(joined) >= 4 and joined in pairs
