"""`unlearnjax methods`: the merge methods, and for one of them what each definition of it computes and takes."""

from unlearnjax.errors import UserError, nearest
from unlearnjax.merging.protocol import Hyperparameter, MergeMethod, Rule


def overview(known: dict[str, MergeMethod]) -> str:
    """One line per method: name, semantics (the default first), spaces, parameters of the default, what it does."""
    rows = [("method", "semantics", "spaces", "parameters", "")]
    for name, method in sorted(known.items()):
        names = [p.name for p in method.rules[0].hyperparameters if p.name != "lambda"]
        rows.append((name, ", ".join(method.semantics), ", ".join(method.spaces), ", ".join(names), method.summary))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]).rstrip() for row in rows]
    extra = (
        "greedy (from Python alone: unlearnjax.greedy): average candidates as long as a score you give does not fall."
    )
    note = "Every method takes lambda as well. `unlearnjax methods NAME` says what each semantics of a method means."
    return "\n".join([*lines, "", extra, note])


def details(known: dict[str, MergeMethod], name: str) -> str:
    """What one method does under each semantics.

    Raises:
      UserError: no such method (with the nearest name).
    """
    if name not in known:
        raise UserError(f"methods: unknown method {name!r}{nearest(name, known)}")
    method = known[name]
    lines = [f"{name}: {method.summary}"]
    for i, rule in enumerate(method.rules):
        lines += ["", f"semantics {rule.semantics}{' (the default)' if i == 0 else ''}: {rule.source}", *_facts(rule)]
    return "\n".join(lines)


def _facts(rule: Rule) -> list[str]:
    weights = "1/N each" if rule.default_weight == "mean" else "1 each"
    most = "" if rule.most is None else f", at most {rule.most}"
    facts = {
        "spaces": ", ".join(rule.spaces),
        "weights": f"{weights} unless given" if rule.properties.weighted else "none; all count alike",
        "candidates": f"at least {rule.least}{most}",
        "thresholds": {"leaf": "each tensor's own", "tree": "the whole model's"}[rule.scope] if rule.rounds else "",
        "needs": ", ".join(_needs(rule)),
        "streamed": "yes, in the memory of one candidate" if rule.properties.streamable else "",
    }
    lines = [f"  {label}: {text}" for label, text in facts.items() if text]
    width = max(len(p.name) for p in rule.hyperparameters)
    return lines + [f"  {p.name.ljust(width)}  {p.range}, {_default(p)}: {p.summary}" for p in rule.hyperparameters]


def _needs(rule: Rule) -> list[str]:
    needs = ["a key for its random numbers"] if rule.needs_key else []
    if rule.needs_base:
        needs.append("the base weights" + (" with origin zero" if callable(rule.needs_base) else ""))
    return needs


def _default(parameter: Hyperparameter) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return f"default {str(value).lower() if isinstance(value, bool) else value}"
