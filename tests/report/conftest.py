"""A report such as a run writes, with made-up numbers."""

import math
import random
from typing import Any

import pytest

TASKS = ("Task1", "Task2", "Task3")


def made_scores(leak, keep, *, auc=0.5, mmlu=None, degenerate=(0.0, 0.0), probe=0.9):
    draw = random.Random(f"{leak} {keep}")

    def near(value):
        return min(1.0, max(0.0, value + draw.uniform(-0.08, 0.08)))

    forget = {task: {"regurgitation": near(leak), "knowledge": near(leak)} for task in TASKS}
    retain = {task: {"regurgitation": near(keep), "knowledge": near(keep)} for task in TASKS}
    terms = [1 - value for task in TASKS for value in forget[task].values()]
    terms += [value for task in TASKS for value in retain[task].values()]
    aggregate = 12 / sum(1 / term for term in terms) if min(terms) > 0 else 0.0
    membership = None if auc is None else 1 - 2 * abs(auc - 0.5)
    both = None if membership is None else (aggregate + membership) / 2
    return {
        "semantics": "official",
        "forget": forget,
        "retain": retain,
        "aggregated_terms": terms,
        "task_aggregate": aggregate,
        "membership_auc": auc,
        "membership_auc_interval": None if auc is None else [max(0, auc - 0.12), min(1, auc + 0.11)],
        "membership_score": membership,
        "mmlu": mmlu,
        "aggregate": None if mmlu is None or membership is None else (aggregate + membership + mmlu) / 3,
        "aggregate_without_mmlu": both,
        "degenerate": {"forget": degenerate[0], "retain": degenerate[1]},
        "nll": {"forget": 6 * (1 - leak), "retain": 2 * (1 - keep)},
        "probe": {"accuracy": probe, "interval": [max(0, probe - 0.1), min(1, probe + 0.08)], "questions": 60},
    }


def made_candidate(name, updates=240, *, stop=None, seed=0, **hyperparameters):
    """`stop`: the update at which it diverges."""
    draw = random.Random(f"{name} {seed}")
    last = updates if stop is None else stop + 1
    at = list(range(last))
    speed = hyperparameters.get("learning_rate", 1e-4) * 300
    npo = [0.69 * math.exp(-speed * t / 30) + draw.gauss(0, 0.02) + 0.05 for t in at]
    gdr = [0.25 + 0.5 * speed * (t / 240) * math.exp(-t / 200) + abs(draw.gauss(0, 0.03)) for t in at]
    klr = [0.002 + 0.2 * speed * t / 240 + abs(draw.gauss(0, 0.01)) for t in at]
    norm = [math.exp(draw.gauss(0, 0.2) + 1.5 * math.sin(t / 60)) for t in at]
    if stop is not None:
        for t in at[-12:]:
            norm[t] *= 4.0 ** (t - last + 12)
            npo[t] += (t - last + 12) * 0.1
        npo[-1] = norm[-1] = math.nan
    loss = [a * 0.4 + b * 0.4 + c * 0.2 for a, b, c in zip(npo, gdr, klr)]
    return {
        "name": name,
        "hyperparameters": {"learning_rate": 1e-4, "rank": 32, "alpha": 32.0, "dropout": 0.05} | hyperparameters,
        "status": "finished" if stop is None else "diverged",
        "diverged_at": stop,
        "updates": last if stop is None else stop,
        "curves": {"update": at, "loss": loss, "npo": npo, "gdr": gdr, "klr": klr, "gradient_norm": norm},
    }


def made_report() -> dict[str, Any]:
    candidates = [
        made_candidate("careful", learning_rate=5e-5),
        made_candidate("balanced", learning_rate=1e-4),
        made_candidate("eager", learning_rate=3e-4, npo_beta=0.05),
        made_candidate("eager, long", 300, learning_rate=3e-4, npo_beta=0.1),
        made_candidate("reckless", stop=96, learning_rate=3e-3),
    ]
    kept = [candidate["name"] for candidate in candidates[:4]]
    models = [
        ("base", "base", made_scores(0.97, 0.97, auc=1.0, probe=1.0)),
        ("retain-only", "gold", made_scores(0.12, 0.97, auc=0.47, probe=1.0)),
        ("careful", "candidate", made_scores(0.66, 0.93, auc=0.97, probe=0.983)),
        ("balanced", "candidate", made_scores(0.41, 0.81, auc=0.82, probe=0.95)),
        ("eager", "candidate", made_scores(0.10, 0.52, auc=0.06, degenerate=(0.43, 0.12), probe=0.7)),
        ("eager, long", "candidate", made_scores(0.09, 0.49, auc=0.02, degenerate=(0.61, 0.2), probe=0.667)),
        ("linear", "merge", made_scores(0.35, 0.83, auc=0.71, degenerate=(0.02, 0.0), probe=0.95)),
        ("ties (delta)", "merge", made_scores(0.17, 0.79, auc=0.44, degenerate=(0.05, 0.01), probe=0.917)),
        ("ties (factors)", "merge", made_scores(0.2, 0.76, auc=0.38, degenerate=(0.06, 0.01), probe=0.9)),
    ]
    source = {"source": "demo/data/forget.jsonl", "rows": 116, "sha256": "9ad33b4b" * 8}
    return {
        "schema": "unlearnjax.report",
        "version": 1,
        "title": "unlearnjax demo",
        "created": "2025-11-21T02:30:00+00:00",
        "unlearnjax": "0.1.0",
        "command": ["unlearnjax", "demo", "--out", "demo"],
        "hardware": {"platform": "cpu", "device": "cpu", "device_count": 1, "cpu_count": 2, "jax": "0.10.2"},
        "recipe": {
            "candidates": [candidate["hyperparameters"] | {"name": candidate["name"]} for candidate in candidates],
            "objective": {"npo": 0.4, "klr": 0.4, "gdr": 0.2},
            "adapter": {"kind": "lora", "targets": ["q", "k", "v", "o", "gate", "up", "down"]},
            "merges": [{"method": "linear"}, {"method": "ties", "density": 0.8, "spaces": ["delta", "factors"]}],
        },
        "data": {
            "forget": source,
            "retain": source | {"source": "demo/data/retain.jsonl"},
            "members": source | {"source": "demo/data/members.jsonl", "rows": 16},
            "nonmembers": source | {"source": "demo/data/nonmembers.jsonl", "rows": 16},
            "padding_share": 0.084,
        },
        "training": {"seconds": 83.4, "candidate_steps": 1116, "candidate_steps_per_second": 13.38},
        "candidates": candidates,
        "merges": [
            {"name": name, "method": method, "space": space, "semantics": semantics, "hyperparameters": settings,
             "candidates": kept, "exported_rank": rank, "truncation_error": error}
            for name, method, space, semantics, settings, rank, error in (
                ("linear", "linear", "delta", None, {}, 128, 0.0),
                ("ties (delta)", "ties", "delta", "paper", {"density": 0.8}, 64, 0.0731),
                ("ties (factors)", "ties", "factors", "peft", {"density": 0.8}, 32, None),
            )
        ],
        "models": [{"name": name, "kind": kind, "scores": scores} for name, kind, scores in models],
        "warnings": ["candidate 'reckless' diverged at update 96 and takes no part in the merges"],
    }  # fmt: skip


@pytest.fixture
def report():
    return made_report()


@pytest.fixture
def scores():
    """The maker of one model's scores."""
    return made_scores


@pytest.fixture
def candidate():
    """The maker of one candidate."""
    return made_candidate
