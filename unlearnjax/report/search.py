"""The page's part about searched scales: what each merge forgets and keeps as its step grows."""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearnjax.report import charts
from unlearnjax.report.markup import Markup, element

Merge = Mapping[str, Any]


def section(merges: Sequence[Merge]) -> Markup | None:
    """Forgotten against retained along the scale; nothing where no scale was searched."""
    searched = [merge for merge in merges if "search" in merge]
    if not searched:
        return None
    # All searches of a run ask the base the same rows, so there is one floor.
    figure = charts.traces([_trace(merge) for merge in searched], searched[0]["search"]["floor"])
    note = (
        "A sample of each split's rows, asked at each scale of a merge; a line starts at the base (scale 0). Chosen "
        "(marked) is what forgets most of what is right of the dashed line, the share of the base's retain score to be "
        "kept. Where the scale was searched for each candidate, the line is the chosen one's."
    )
    return element("section", element("h2", "Scales"), figure, element("p", note, class_="note"))


def _trace(merge: Merge) -> charts.Trace:
    trials = merge["search"]["trials"]
    own = [trial for trial in trials if trial.get("candidate") in (None, *merge["candidates"])]
    own.sort(key=lambda trial: trial["scale"])
    chosen = next(place for place, trial in enumerate(own) if trial["scale"] == merge["scale"])
    return charts.Trace(merge["name"], [(trial["retain"], 1 - trial["forget"]) for trial in own], chosen)
