"""The official exact match of questions' answers."""


def exact_match(gold: str, generated: str) -> int:
    """1 if the whole generation is the answer, ends stripped of white space and both lower-cased; else 0.

    A model that answers and then goes on does not match.
    """
    return int(gold.strip().lower() == generated.strip().lower())
