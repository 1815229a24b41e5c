"""The scores along lambda that a run has measured, on disk: a run that is resumed does not measure them again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from unlearnjax.evaluation.journal import digest
from unlearnjax.io.atomic import staged_file
from unlearnjax.recipes.images.select import Scores
from unlearnjax.recipes.resume import weights_digest


class Searched:
    """Scores by direction, a file of its own for each in `folder`.

    known: what they depend on beside the direction, as plain data.
    """

    def __init__(self, folder: Path, known: Mapping[str, Any], progress: bool) -> None:
        self.folder, self.known, self.progress = folder, known, progress
        self._bar: Any = None

    def expect(self, directions: int) -> None:
        """Show progress over so many directions more."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=0, desc="searching lambda", unit="direction", disable=not self.progress, dynamic_ncols=True
            )
        self._bar.total += directions
        self._bar.refresh()

    def close(self) -> None:
        """No more directions."""
        if self._bar is not None:
            self._bar.close()

    def points(self, delta: PyTree[Any], measure: Callable[[], list[Scores]]) -> list[Scores]:
        """The scores of all lambdas of a direction: from the disk, or measured and kept."""
        path = self.folder / f"{digest({**self.known, 'direction': weights_digest(delta)})}.json"
        if path.is_file():
            found = [Scores(**one) for one in json.loads(path.read_text("utf-8"))]
        else:
            found = measure()
            with staged_file(path) as beside:
                beside.write_text(json.dumps([p._asdict() for p in found]), "utf-8")
        if self._bar is not None:
            self._bar.update()
        return found
