"""Model cards: the README.md of a saved model or adapter, with what the hub reads and what a reader must know."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

LIMITS = (
    "Unlearning by fine-tuning hides knowledge and does not prove its absence: further training, quantization or other "
    "prompts can bring it back.",
    "The scores below hold for the data whose fingerprints are given here and for greedy decoding.",
    "Nothing was measured about other abilities than the ones in the table.",
)


def merge_card(
    *,
    title: str,
    base_model: Sequence[str],
    method: str,
    recipe: str,
    arguments: str | None = None,
    library: Literal["transformers", "peft"] = "transformers",
) -> str:
    """The text of README.md for a merge of models that were made elsewhere.

    Args:
      base_model: the folders or hub ids of everything that went in.
      method: one paragraph on what was computed.
      recipe: the merge as YAML.
      arguments: the command line.
      library: what loads the folder.
    """
    import yaml

    tags = ["unlearnjax", "merge"] + ["lora"] * (library == "peft")
    front = {"base_model": list(base_model), "library_name": library, "tags": tags}
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---", f"# {title}"]
    kind = "adapters" if library == "peft" else "models"
    parts.append(f"A merge of {kind}, made with unlearnjax.\n\n{method}")
    if arguments:
        parts.append(f"## Command\n\n```\n{arguments}\n```")
    parts.append(f"## Recipe\n\n```yaml\n{recipe.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def model_card(
    *,
    title: str,
    base_model: str | Sequence[str],
    library: Literal["transformers", "peft"] = "transformers",
    merge: bool = False,
    method: str | None = None,
    forget: str | None = None,
    retain: str | None = None,
    scores: str | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    limits: Sequence[str] = LIMITS,
    images: bool = False,
) -> str:
    """The text of README.md.

    Args:
      title: the model's name.
      base_model: the folder(s) or hub id(s) it was made from.
      library: what loads the folder.
      merge: whether it was merged from several candidates.
      method: one paragraph on how it was made.
      forget, retain: which data, with fingerprint, such as `forget.jsonl (254 rows, sha256 0f3a...)`.
      scores: a Markdown table.
      recipe: the recipe as plain data or as YAML text.
      limits: sentences on what the model is not. images: it is an image model.
    """
    import yaml

    front = {
        "base_model": [base_model] if isinstance(base_model, str) else list(base_model),
        "library_name": library,
        "pipeline_tag": "image-classification" if images else "text-generation",
        "tags": ["unlearnjax", "machine-unlearning"] + ["merge"] * merge + ["lora"] * (library == "peft"),
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---", f"# {title}"]
    kind = "A LoRA adapter" if library == "peft" else f"{'An image' if images else 'A language'} model"
    origin = ", merged from several candidates" if merge else ""
    parts.append(f"{kind} that unlearned part of its training data, made with unlearnjax{origin}.")
    if method:
        parts.append(f"## Method\n\n{method}")
    data = [f"- {name}: {value}" for name, value in (("Forget set", forget), ("Retain set", retain)) if value]
    if data:
        parts.append("## Data\n\n" + "\n".join(data))
    if scores:
        parts.append(f"## Scores\n\n{scores.strip()}")
    if recipe is not None:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        # A longer fence than any in the text, so that the recipe cannot end it.
        fence = "```" if "```" not in text else "````````"
        parts.append(f"## Recipe\n\n{fence}yaml\n{text.strip()}\n{fence}")
    if limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in limits))
    return "\n\n".join(parts) + "\n"
