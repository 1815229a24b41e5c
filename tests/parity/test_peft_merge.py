"""Against PEFT's merging code: its functions on tensors, and `add_weighted_adapter` on two small adapters."""

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils

from unlearnjax.merging import concatenate_lora, lora_delta, merge, merge_lora

LAYERS, WIDTH, HIDDEN, RANK = 2, 12, 20, 4
WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 1.5, 0.7], [1.0, -0.4, 0.0]]


def tensors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 9, 14)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.29, 0.8, 1.0])
def test_ties_equals_the_function_of_the_same_name(density, weights, majority):
    x = tensors(3)
    theirs = merge_utils.ties([torch.tensor(t) for t in x], torch.tensor(weights), density, majority)
    ours = merge(x, "ties", semantics="peft", density=density, weights=weights, majority_sign_method=majority)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-7)


def test_ties_where_entries_cancel_or_are_zero():
    x = np.round(tensors(4) * 2) / 2  # many zeros and exact cancellations; density 1 leaves no tie to break
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = merge_utils.ties([torch.tensor(t) for t in x], torch.ones(4), 1.0)
    assert np.any((x.sum(axis=0) == 0) & (np.abs(x).sum(axis=0) > 0))
    np.testing.assert_allclose(merge(x, "ties", semantics="peft", density=1.0), theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_equals_task_arithmetic(weights):
    x = tensors(3)
    theirs = merge_utils.task_arithmetic([torch.tensor(t) for t in x], torch.tensor(weights))
    np.testing.assert_allclose(
        merge(x, "linear", semantics="peft", weights=weights), theirs.numpy(), rtol=1e-6, atol=1e-6
    )


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(Block() for _ in range(LAYERS)))
    peft_model = get_peft_model(net, config(8), adapter_name="first")
    peft_model.add_adapter("second", config(2))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return peft_model.base_model


def config(alpha: int) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["up", "down"])


SCALE = np.array([8 / RANK, 2 / RANK], np.float32)


def read(model, adapters: list[str]) -> dict:
    """Adapters of the model as our LoRA tree, stacked over candidates and layers."""

    def part(name: str, factor: str) -> np.ndarray:
        return np.stack(
            [
                np.stack([getattr(getattr(block, name), factor)[a].weight.detach().numpy() for block in model.model])
                for a in adapters
            ]
        )

    return {"mlp": {name: {"a": part(name, "lora_A"), "b": part(name, "lora_B")} for name in ("up", "down")}}


@pytest.mark.parametrize(
    ("kind", "weights", "options"),
    [
        ("ties", [1.0, 1.0], {"density": 0.8}),
        ("ties", [0.6, 1.3], {"density": 0.5, "majority_sign_method": "frequency"}),
        ("ties", [1.0, -0.5], {"density": 0.8}),
        ("linear", [1.0, 1.0], {}),
        ("linear", [0.5, -0.5], {}),
    ],
)
def test_space_factors_equals_add_weighted_adapter(model, kind, weights, options):
    name = f"{kind}{weights}".replace(".", "_")
    model.add_weighted_adapter(["first", "second"], weights, name, combination_type=kind, **options)
    assert model.model[0].up.scaling[name] == 1
    theirs = jax.tree.map(lambda x: x[0], read(model, [name]))
    ours = merge_lora(read(model, ["first", "second"]), SCALE, kind, "factors", weights=weights, **options)
    jax.tree.map(lambda o, t: np.testing.assert_allclose(o, t, rtol=1e-5, atol=1e-6), ours, theirs)
    if weights == [1.0, 1.0]:  # what we do when no weights are given
        default = merge_lora(read(model, ["first", "second"]), SCALE, kind, "factors", **options)
        jax.tree.map(np.testing.assert_array_equal, default, ours)


def test_cat_with_half_weights_is_our_linear(model):
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "cat", combination_type="cat")
    theirs = jax.tree.map(lambda x: x[0], read(model, ["cat"]))
    lora = read(model, ["first", "second"])
    jax.tree.map(lambda o, t: np.testing.assert_allclose(o, t, rtol=1e-6), concatenate_lora(lora, SCALE), theirs)
    merged = merge_lora(lora, SCALE, "linear", "delta")
    for name in ("up", "down"):
        delta = np.stack([getattr(block, name).get_delta_weight("cat").detach().numpy() for block in model.model])
        np.testing.assert_allclose(merged["mlp"][name]["weight"], delta, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lora_delta(theirs, 1.0)["mlp"][name]["weight"], delta, rtol=1e-5, atol=1e-5)
