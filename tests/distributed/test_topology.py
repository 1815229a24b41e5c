"""Machines by their names."""

import pytest

from unlearnjax.distributed.topology import parse_topology
from unlearnjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e-8", "v5e:2x4", 8), ("v5e:16x16", "v5e:16x16", 256), ("V6E-256", "v6e:16x16", 256),
        ("v5p-64", "v5p:2x4x4", 32), ("v5p:2x2x4", "v5p:2x2x4", 16), ("h100-8", "h100-8", 8),
    ],
)  # fmt: skip
def test_names(text, name, devices):
    found = parse_topology(text)
    assert (found.name, found.devices) == (name, devices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5x-8", "did you mean 'v5"), ("v5e", "give v5e:4x4"), ("v5e-12", "known: v5e-1, v5e-4"),
        ("v5p-7", "no such slice"), ("v5e:2x2x2", "torus of 2 axes"),
        ("h100:2x4", "by their number"), ("h100-16", "within one machine"),
    ],
)  # fmt: skip
def test_what_is_none(text, words):
    with pytest.raises(UserError, match=words):
        parse_topology(text)
