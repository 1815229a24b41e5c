"""`unlearnjax methods` lists every method, and says of one all that can be given to it."""

import os
import subprocess
import sys
from pathlib import Path

from unlearnjax.cli.main import main
from unlearnjax.merging import methods

ROOT = Path(__file__).parents[2]


def test_every_method_is_listed_with_its_definitions(capsys):
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:] if line}
    for name, method in methods().items():
        assert all(word in lines[name] for word in (*method.semantics, *method.spaces, method.summary))


def test_a_method_is_described_in_full(capsys):
    for name, method in methods().items():
        assert main(["methods", name]) == 0
        parts = capsys.readouterr().out.split("semantics ")[1:]
        for part, rule in zip(parts, method.rules, strict=True):
            assert part.startswith(rule.semantics) and rule.source in part
            assert all(f"  {p.name} " in part and p.summary in part for p in rule.hyperparameters)
            assert ("a key" in part) == rule.needs_key and ("the base weights" in part) == bool(rule.needs_base)


def test_a_misspelt_method(capsys):
    assert main(["methods", "teis"]) == 2
    assert "unknown method 'teis'; did you mean 'ties'?" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m unlearnjax.cli.main methods | true"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )  # fmt: skip
    assert done.stderr == ""
