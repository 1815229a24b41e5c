"""Machine unlearning in JAX: many imperfect candidates trained in one program, merged into one good model.

The names below are imported when they are first used, so that `import unlearnjax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearnjax.errors import UserError
    from unlearnjax.merging.api import merge, methods
    from unlearnjax.merging.greedy import greedy
    from unlearnjax.merging.search import choose, grid, pareto, search
    from unlearnjax.merging.stream import merge_stream
    from unlearnjax.models.language_model import LanguageModel, load_model, save_model

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "unlearnjax.models.language_model",
    "UserError": "unlearnjax.errors",
    "choose": "unlearnjax.merging.search",
    "greedy": "unlearnjax.merging.greedy",
    "grid": "unlearnjax.merging.search",
    "load_model": "unlearnjax.models.language_model",
    "merge": "unlearnjax.merging.api",
    "merge_stream": "unlearnjax.merging.stream",
    "methods": "unlearnjax.merging.api",
    "pareto": "unlearnjax.merging.search",
    "save_model": "unlearnjax.models.language_model",
    "search": "unlearnjax.merging.search",
}

__all__ = [
    "LanguageModel",
    "UserError",
    "__version__",
    "choose",
    "greedy",
    "grid",
    "load_model",
    "merge",
    "merge_stream",
    "methods",
    "pareto",
    "save_model",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unlearnjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
