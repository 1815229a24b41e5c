"""Data sets of the Hugging Face hub, named as `org/name`, `org/name:split` or `org/name:config:split`."""

import re
from typing import Any

from unlearnjax.errors import UserError

HUB = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?$")


def load_hub(source: str, hub: re.Match[str]) -> Any:
    """The `datasets.Dataset` that a match of `HUB` names.

    Raises:
      UserError: it cannot be loaded, or has several splits and none is named.
    """
    name = hub["id"]
    config, split = (hub["first"], hub["second"]) if hub["second"] else (None, hub["first"])
    try:
        import datasets

        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many kinds: network, permission, missing names, bad files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: no such file here, and the hub data set {name} could not be loaded ({reason})"
        ) from None
    if split is not None:
        return found
    if len(found) != 1:
        raise UserError(f"{source}: has several splits, give one as {name}:SPLIT; splits: {', '.join(found)}")
    return next(iter(found.values()))
