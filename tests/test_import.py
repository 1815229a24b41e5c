"""Importing the package is free, and its names come when asked for."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unlearnjax

ROOT = Path(unlearnjax.__file__).parents[1]


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_the_package_imports_nothing_heavy():
    loaded = loaded_after("import unlearnjax; unlearnjax.__version__; unlearnjax.UserError; dir(unlearnjax)")
    assert "unlearnjax" in loaded
    assert not loaded & {"jax", "jaxlib", "numpy", "flax", "torch", "transformers", "datasets", "huggingface_hub"}


def test_loading_and_merging_need_neither_torch_nor_transformers():
    loaded = loaded_after("import unlearnjax; unlearnjax.load_model; unlearnjax.save_model; unlearnjax.merge")
    assert "jax" in loaded
    assert not loaded & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize("name", unlearnjax.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(unlearnjax)
    value = getattr(unlearnjax, name)
    assert name.startswith("__") or value.__name__ == name
    assert name.startswith("__") or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode_model'"):
        unlearnjax.lode_model  # noqa: B018


def test_the_version_is_the_distributions():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert unlearnjax.__version__ == tomllib.load(file)["project"]["version"]
