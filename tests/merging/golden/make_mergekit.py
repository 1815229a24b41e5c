"""Writes mergekit.json beside this file: what mergekit itself computes for small models. Needs an environment with
mergekit 0.1.4 and torch; run it there, with no arguments.

Cases that draw random numbers are left out, because mergekit's draws cannot be made elsewhere.
"""

import json
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods import REGISTERED_MERGE_METHODS
from mergekit.merge_methods.base import TensorDictWrapper

SHAPES = {"matrix": (6, 5), "vector": (7,)}
BASE = ModelReference.parse("base")
MODELS = [ModelReference.parse(name) for name in ("one", "two", "three")]
# method, models, whether the base is given, weights, per-model settings, settings
CASES = [
    ("linear", 3, False, [1.0, 0.5, 2.0], {}, {"normalize": True}),
    ("linear", 3, False, [1.0, 0.5, 2.0], {}, {"normalize": False}),
    ("task_arithmetic", 3, True, [1.0, -0.5, 0.25], {}, {}),
    ("task_arithmetic", 3, True, [1.0, -0.5, 0.25], {}, {"normalize": True, "lambda": 0.7}),
    ("ties", 3, True, [1.0, 0.5, 2.0], {"density": 0.5}, {}),
    ("ties", 3, True, [1.0, 0.5, 2.0], {"density": 0.7}, {"normalize": False, "lambda": 0.4}),
    ("ties", 3, True, [1.0, 0.5, 2.0], {"density": 0.5}, {"rescale": True}),
    ("breadcrumbs", 3, True, [1.0, 0.5, 2.0], {"density": 0.5, "gamma": 0.2}, {}),
    ("breadcrumbs", 3, True, [1.0, 0.5, 2.0], {"density": 0.9, "gamma": 0.3}, {"normalize": True, "rescale": True}),
    ("breadcrumbs_ties", 3, True, [1.0, 0.5, 2.0], {"density": 0.5, "gamma": 0.2}, {}),
    ("slerp", 1, True, None, {}, {"t": 0.3}),
    ("nuslerp", 2, True, [1.0, 0.5], {}, {}),
    ("nuslerp", 2, True, [1.0, 0.5], {}, {"nuslerp_flatten": False}),
    ("nuslerp", 2, True, [1.0, 0.5], {}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 2, False, [1.0, 3.0], {}, {}),
    ("multislerp", 3, True, [1.0, 0.5, 2.0], {}, {}),
    ("multislerp", 3, False, [1.0, 0.5, 2.0], {}, {"normalize_weights": False}),
    ("karcher", 3, False, None, {}, {}),
    ("karcher", 3, False, None, {}, {"max_iter": 2, "tol": 1e-4}),
    ("model_stock", 2, True, None, {}, {}),
    ("model_stock", 3, True, None, {}, {}),
    ("model_stock", 3, True, None, {}, {"filter_wise": True}),
    ("sce", 3, True, None, {}, {}),
    ("sce", 3, True, None, {}, {"select_topk": 0.4}),
    ("nearswap", 1, True, None, {}, {"t": 0.1}),
    ("arcee_fusion", 1, True, None, {}, {}),
    ("passthrough", 1, False, None, {"scale": 0.5}, {}),
]  # fmt: skip


def merged(case: tuple, base: torch.Tensor, models: list[torch.Tensor]) -> torch.Tensor:
    name, count, with_base, weights, each, settings = case
    method = REGISTERED_MERGE_METHODS[name]
    chosen = MODELS[:count]
    tensors = dict(zip(chosen, models))
    if with_base:
        tensors = {BASE: base, **tensors}
    whole = {p.name: p.default_value for p in method.parameters()} | settings
    defaults = {p.name: p.default_value for p in method.tensor_parameters()} | each
    own = {
        model: ImmutableMap({**defaults, **({} if weights is None else {"weight": weights[i]})})
        for i, model in enumerate(chosen)
    }
    task = method.make_task(
        output_weight=WeightInfo(name="w"), tensors=TensorDictWrapper(tensors={}),
        parameters=ImmutableMap(whole), tensor_parameters=ImmutableMap(own), base_model=BASE if with_base else None,
    )  # fmt: skip
    return task.execute(tensors={key: value.clone() for key, value in tensors.items()})


def main() -> None:
    draw = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    models = [{name: x + 0.5 * torch.randn(x.shape, generator=draw) for name, x in base.items()} for _ in MODELS]
    found = []
    for case in CASES:
        outputs = {name: merged(case, base[name], [m[name] for m in models]).tolist() for name in SHAPES}
        keys = ("method", "models", "base", "weights", "each", "settings")
        found.append({**dict(zip(keys, case)), "outputs": outputs})
    data = {
        "mergekit": "0.1.4", "torch": torch.__version__,
        "base": {name: x.tolist() for name, x in base.items()},
        "models": [{name: x.tolist() for name, x in m.items()} for m in models], "cases": found,
    }  # fmt: skip
    short = json.loads(json.dumps(data), parse_float=lambda x: float(f"{float(x):.9g}"))
    (Path(__file__).parent / "mergekit.json").write_text(json.dumps(short) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
