"""Terms that need more of a step than its answers' scores, through a run: other answers, a layer, a multiplier."""

import jax
import numpy as np
import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from unlearnjax.adapters.lora import lora
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack
from unlearnjax.errors import UserError
from unlearnjax.io.huggingface import load_config, load_params
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import TERMS, objective
from unlearnjax.objectives.rmu import direction
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task

ALL = {"dpo": 0.3, "idk": 0.5, "margin": 0.05, "rmu": 0.4, "bound": 1.0, "rmu_retain": 2.0}
OWN = {
    "bound": {"bound": 3.0, "multiplier": 0.5, "rate": 0.4},
    "rmu": {"scale": 3.0},
}
BASE = {
    "learning_rate": 5e-3, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": 9, "schedule": 0,
    "max_grad_norm": float("inf"), "term_weights": ALL, "beta": 0.3, "term_parameters": OWN, "lora_alpha": 8,
    "lora_rank": 4, "dropout": 0.0, "init_seed": 3,
}  # fmt: skip
LAYER = 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=0, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = OlmoForCausalLM(config).float().eval()
    model.lm_head.weight.data *= 20.0  # spread the logits: a random head gives flat losses
    folder = tmp_path_factory.mktemp("olmo")
    model.save_pretrained(folder)
    return model, folder


def make_sides():
    rng = np.random.default_rng(0)
    draw = lambda low, high: rng.integers(2, 53, rng.integers(low, high)).tolist()  # noqa: E731
    prompts = [draw(3, 8) for _ in range(6)]
    starts = [len(p) for p in prompts]
    packed = {side: pack([p + draw(2, 9) for p in prompts], starts) for side in ("forget", "idk")}
    texts = [draw(8, 16) for _ in range(6)]
    return {**packed, "retain": pack(texts, [len(t) // 2 for t in texts])}


def run(base, candidates, names, rounds=3):
    _, folder = base
    sides, config = make_sides(), load_config(folder)
    params, model = load_params(folder, config), build(config)
    wanted = objective(names, config.layers, LAYER)
    own = {s: sides[s] for s in wanted.sides}
    schedule = plan(own, [Pace(2, 1, rounds, 11)] * len(candidates), buckets=1)
    adapter = lora(config, ("q", "v", "down"), 4)
    h = stack(candidates)
    stores = stores_for(model, params, own, wanted)
    return train(Task(model, adapter, wanted, False), params, stores, schedule, h), schedule, adapter, params, h


def torch_terms(model, sides, rows, u):
    """The terms of one micro-batch on the untouched model."""

    def outputs(side, row):
        ids = torch.tensor(sides[side].row(row).astype(np.int64))
        out = model(ids[None], output_hidden_states=True)
        first = int(sides[side].answer_start[row])
        logits = out.logits[0, first - 1 : -1]
        ce = -torch.log_softmax(logits, -1).gather(1, ids[first:, None])[:, 0]
        return logits, ce, out.hidden_states[LAYER][0]

    with torch.no_grad():
        forget = [outputs("forget", r) for r in rows["forget"]]
        other = [outputs("idk", r) for r in rows["idk"]]
        retain = [outputs("retain", r) for r in rows["retain"]]
        margins = torch.cat([z.max(-1).values - z.mean(-1) for z, _, _ in forget])
        goal = torch.tensor(OWN["rmu"]["scale"] * u)
        return {
            "dpo": 2 / BASE["beta"] * np.log(2.0),  # the model is the base
            "idk": float(torch.cat([ce for _, ce, _ in other]).mean()),
            "margin": float((margins**2).mean()),
            "rmu": float(torch.stack([((x - goal) ** 2).mean() for _, _, x in forget]).mean()),
            "bound": float(torch.cat([ce for _, ce, _ in retain]).mean()) - OWN["bound"]["bound"],
            "rmu_retain": 0.0,
        }


def test_terms_of_the_first_update_equal_torch_and_multipliers_climb(base):
    fixed = {**OWN, "bound": {**OWN["bound"], "rate": 0.0}}
    strict = {**OWN, "bound": {"bound": 100.0, "multiplier": 0.5, "rate": 0.4}}
    few = {"idk": 1.0}
    others = [
        {**BASE, "term_parameters": fixed}, {**BASE, "term_parameters": strict}, {**BASE, "term_weights": few},
    ]  # fmt: skip
    result, schedule, _, _, h = run(base, [BASE, *others], list(ALL))
    first = schedule.steps[0]
    held = {s: r[0][r[0] >= 0] for s, r in first.rows.items()}
    assert len(held["idk"]) == 2 and held["idk"].tolist() == held["forget"].tolist()
    u = np.asarray(direction(index(h, 0), 32))
    expected = torch_terms(base[0], make_sides(), held, u)
    curve = result.curves[0]
    for name, value in expected.items():
        np.testing.assert_allclose(curve.terms[name][0], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert curve.terms["rmu_retain"][-1] > 1e-6 and curve.terms["idk"][-1] < curve.terms["idk"][0]
    assert curve.terms["dpo"][-1] < curve.terms["dpo"][0]

    assert schedule.updates.tolist() == [9, 9, 9, 9]
    for i, own in enumerate((OWN, fixed, strict)):
        multiplier, rate = own["bound"]["multiplier"], own["bound"]["rate"]
        terms = result.curves[i].terms
        for update, loss in enumerate(result.curves[i].loss):
            weights = {**ALL, "bound": multiplier}
            np.testing.assert_allclose(loss, sum(w * terms[n][update] for n, w in weights.items()), rtol=1e-4)
            multiplier = max(0.0, multiplier + rate * terms["bound"][update])
        np.testing.assert_allclose(result.states.multipliers["bound"][i], multiplier, rtol=1e-4, atol=1e-6)
    reached = np.asarray(result.states.multipliers["bound"])
    assert reached[0] != reached[1] == 0.5 and reached[2] == 0.0
    np.testing.assert_allclose(result.curves[3].loss, result.curves[3].terms["idk"], rtol=1e-6)


def test_rmu_alone_stops_at_its_layer(base):
    candidate = {**BASE, "term_weights": {"rmu": 1.0, "rmu_retain": 1.0}, "term_parameters": {"rmu": OWN["rmu"]}}
    result, _, adapter, params, h = run(base, [candidate], ["rmu", "rmu_retain"])
    assert result.curves[0].terms["rmu"][-1] < result.curves[0].terms["rmu"][0]
    delta = adapter.delta(params, index(result.states.trainable, 0), index(h, 0))
    for leaf in jax.tree.leaves(delta):
        assert np.abs(leaf[0]).max() > 1e-5 and not np.asarray(leaf[1:]).any()


def test_layers_that_no_term_can_read_are_refused():
    assert objective(["rmu"], 32).layer == 8 and objective(["rmu"], 2).layer == 1 and objective(["ga"], 2).layer is None
    for layer in (0, 2):
        with pytest.raises(UserError, match=f"layer {layer} of a model with 2; give one from 1 to 1"):
            objective(["rmu"], 2, layer)
    assert objective(TERMS, 2).sides == ("forget", "idk", "retain", "pool")
    assert objective(["dpo"]).sides == ("forget", "idk") and objective(["idk"]).sides == ("idk",)
