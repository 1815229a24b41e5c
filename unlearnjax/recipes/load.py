"""Recipes by name (they ship with the package) or from a YAML file."""

import dataclasses
import functools
import re
from importlib import resources
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError, nearest
from unlearnjax.io.huggingface import read_json, resolve
from unlearnjax.recipes.images.parse import image_recipe_from
from unlearnjax.recipes.images.schema import ImageRecipe
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.schema import Recipe

TEXT, IMAGES = "unlearnjax.recipes", "unlearnjax.recipes.images"


def names(package: str = TEXT) -> list[str]:
    """The recipes that ship, for language models or for image models."""
    return sorted(f.name.removesuffix(".yml") for f in resources.files(package).iterdir() if f.name.endswith(".yml"))


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, where `1e-4` is a number (as in YAML 1.2) and a key given twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader


def _parse(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())  # a safe loader: plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # such as the date 2020-99-99
        raise UserError(f"{where}: not valid YAML: {error}") from None


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe by its name, or from a file.

    Raises:
      UserError: no such recipe (with the nearest name) or file, broken YAML (file and line), or a wrong entry.
    """
    raw, where = _raw(name_or_file)
    if isinstance(raw, dict) and raw.get("kind") == "images":
        raise UserError(f"{where}: is for image models; this one needs a recipe without kind: images")
    return recipe_from(raw, where)


def _raw(name_or_file: str, package: str = TEXT) -> tuple[Any, str]:
    """(plain data, what to call it)"""
    if name_or_file in names(package):
        text = resources.files(package).joinpath(f"{name_or_file}.yml").read_text(encoding="utf-8")
        return _parse(text, name_or_file), f"recipe {name_or_file}"
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        if len(path.parts) > 1 or path.suffix in (".yml", ".yaml"):
            raise UserError(f"{name_or_file}: no such recipe file")
        raise UserError(f"unknown recipe {name_or_file!r}{nearest(name_or_file, names(package))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name_or_file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name_or_file}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    return _parse(text, name_or_file), name_or_file


def load_image_recipe(name_or_file: str, model: str) -> ImageRecipe:
    """A recipe for an image model: `negmerge` (and `default`) is what ships for its kind; or a file.

    Raises:
      UserError: see `load_recipe`; a recipe for language models.
    """
    if name_or_file in ("negmerge", "default"):
        clip = read_json(resolve(model) / "config.json").get("model_type") == "clip"
        name_or_file = "negmerge-clip" if clip else "negmerge"
    raw, where = _raw(name_or_file, IMAGES)
    if not isinstance(raw, dict) or raw.get("kind") != "images":
        raise UserError(f"{where}: is for language models; one for image models says kind: images")
    return image_recipe_from(raw, where)


def with_suite(recipe: Recipe, suite: str | None) -> Recipe:
    """The recipe with another evaluation suite; None leaves its own."""
    if suite is None:
        return recipe
    return dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, suite=suite))
