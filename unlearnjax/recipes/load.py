"""Recipes by name (they ship with the package) or from a YAML file."""

from importlib import resources
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError, nearest
from unlearnjax.recipes.schema import Recipe, recipe_from


def names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(
        f.name.removesuffix(".yml") for f in resources.files(__package__).iterdir() if f.name.endswith(".yml")
    )


def _parse(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}:{line} is not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe by name, or from a file (anything with a path separator or ending in .yml or .yaml).

    Raises:
      UserError: no such recipe (with the nearest name) or file, broken YAML (file and line), or a wrong entry.
    """
    if "/" in name_or_file or name_or_file.endswith((".yml", ".yaml")) or Path(name_or_file).is_file():
        path = Path(name_or_file)
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: can't be read: {error}") from None
        return recipe_from(_parse(text, str(path)), str(path))
    if name_or_file not in names():
        raise UserError(f"unknown recipe {name_or_file!r}{nearest(name_or_file, names())}")
    text = resources.files(__package__).joinpath(f"{name_or_file}.yml").read_text(encoding="utf-8")
    return recipe_from(_parse(text, name_or_file), f"recipe {name_or_file}")
