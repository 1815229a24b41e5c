"""Losses and updates against torch: terms from full logits, AdamW steps of a PEFT LoRA on transformers' OLMo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoConfig, OlmoForCausalLM

from unlearnjax.adapters.lora import lora
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack
from unlearnjax.io.huggingface import load_config, load_params
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.state import init_state
from unlearnjax.training.step import Task

# PEFT still asks transformers for a property under its old name.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]
MODULES = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}
SETTINGS = {
    "learning_rate": 5e-3, "weight_decay": 0.05, "warmup_updates": 2, "total_updates": 12, "schedule": 1,
    "max_grad_norm": 2.0, "term_weights": {"npo": 0.4, "gdr": 0.2, "klr": 0.4, "ga": 0.1}, "beta": 0.2,
    "lora_alpha": 8, "lora_rank": 4, "dropout": 0.0, "init_seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=0, pad_token_id=1, bos_token_id=None, clip_qkv=2.0,
    )  # fmt: skip
    model = OlmoForCausalLM(config).float().eval()
    model.lm_head.weight.data *= 20.0  # spread the logits: a random head gives flat losses
    folder = tmp_path_factory.mktemp("olmo")
    model.save_pretrained(folder)
    return model, folder


def rows():
    rng = np.random.default_rng(0)
    out = {}
    for name, count in (("forget", 12), ("retain", 12)):
        texts = [rng.integers(2, 53, rng.integers(8, 20)).tolist() for _ in range(count)]
        out[name] = pack(texts, [int(rng.integers(2, len(t) - 2)) for t in texts])
    return out


def token_scores(model, tokens, index):
    """Full logits at the positions that predict the answer, and the answer's log-probabilities."""
    ids = torch.tensor(tokens.row(index).astype(np.int64))[None]
    first = int(tokens.answer_start[index])
    logits = model(ids).logits[0, first - 1 : -1]
    return logits, torch.log_softmax(logits, -1).gather(1, ids[0, first:, None])[:, 0]


def torch_losses(model, frozen, sides, forget, retain, beta):
    """The terms of one micro-batch, written from the papers' formulas."""
    nll, base_nll, answers = [], [], []
    for i in forget:
        logp = token_scores(model, sides["forget"], i)[1]
        answers.append(logp)
        nll.append(-logp.sum())
        base_nll.append(-token_scores(frozen, sides["forget"], i)[1].sum())
    risen = torch.stack(nll) - torch.stack(base_nll)
    ce, kl = [], []
    for i in retain:
        logits, logp = token_scores(model, sides["retain"], i)
        q = torch.log_softmax(token_scores(frozen, sides["retain"], i)[0], -1)
        ce.append(-logp)
        kl.append((q.exp() * (q - torch.log_softmax(logits, -1))).sum(-1))
    return {
        "npo": (-(2 / beta) * torch.nn.functional.logsigmoid(beta * risen)).mean(),
        "ga": torch.cat(answers).mean(),
        "gdr": torch.cat(ce).mean(),
        "klr": torch.cat(kl).mean(),
    }


def test_ten_updates_equal_torch_and_peft(base):
    frozen, folder = base
    sides = rows()
    config = load_config(folder)
    params = load_params(folder, config)
    model = build(config)
    wanted = objective(["npo", "ga", "gdr", "klr"])
    paces = [Pace(2, 2, 4, 11)]
    schedule = plan(sides, paces, buckets=1)
    h = stack([SETTINGS])
    adapter = lora(config, tuple(MODULES), 4)
    start = jax.device_get(init_state(adapter, params, index(h, 0)).trainable)
    result = train(Task(model, adapter, wanted, False), params, stores_for(model, params, sides, wanted), schedule, h)

    policy = OlmoForCausalLM.from_pretrained(folder).float()
    peft = get_peft_model(
        policy, LoraConfig(r=4, lora_alpha=8, target_modules=[m.split(".")[1] for m in MODULES.values()])
    )
    for name, module in MODULES.items():
        pair = start["layers"][config.linears[name][0]][name]
        for layer in range(config.layers):
            target = peft.get_submodule(f"base_model.model.model.layers.{layer}.{module}")
            target.lora_A["default"].weight.data = torch.tensor(pair["a"][layer])
            target.lora_B["default"].weight.data = torch.tensor(pair["b"][layer])
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: u / 2 if u < 2 else max(0.0, (12 - u) / 10))
    theirs = []
    pending = {}
    for step in schedule.steps:
        for micro in range(2):
            held = {s: step.rows[s][0][step.micro[0] == micro] for s in sides}
            held = {s: r[r >= 0] for s, r in held.items()}
            losses = torch_losses(peft, frozen, sides, held["forget"], held["retain"], SETTINGS["beta"])
            sum(SETTINGS["term_weights"][n] * x for n, x in losses.items()).div(2).backward()
            for name, x in losses.items():
                pending[name] = pending.get(name, 0.0) + float(x.detach()) / 2
        if step.update[0]:
            norm = torch.nn.utils.clip_grad_norm_(trained, SETTINGS["max_grad_norm"])
            theirs.append({**pending, "norm": float(norm)})
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            pending = {}
    curve = result.curves[0]
    assert len(theirs) == len(curve.update) == 12
    for name in ("npo", "ga", "gdr", "klr"):
        np.testing.assert_allclose(curve.terms[name], [t[name] for t in theirs], rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(curve.gradient_norm, [t["norm"] for t in theirs], rtol=2e-3)
    assert abs(theirs[-1]["npo"] - theirs[0]["npo"]) > 0.1  # the run went somewhere
    for name, module in MODULES.items():
        pair = result.states.trainable["layers"][config.linears[name][0]][name]
        target = peft.get_submodule(f"base_model.model.model.layers.1.{module}")
        np.testing.assert_allclose(pair["b"][0, 1], target.lora_B["default"].weight.detach(), atol=1e-3)


def test_the_kl_of_the_base_with_itself_is_zero(base):
    """KL = negative entropy - h . E_q[w] + Z cancels to rounding at the start."""
    _, folder = base
    sides = rows()
    config = load_config(folder)
    params = load_params(folder, config)
    model = build(config)
    wanted = objective(["klr"])
    h = stack([{**SETTINGS, "learning_rate": 0.0, "term_weights": {"klr": 1.0}}])
    schedule = plan({"retain": sides["retain"]}, [Pace(4, 1, 1, 0)], buckets=1)
    stores = stores_for(model, params, sides, wanted)
    result = train(Task(model, lora(config, ("q",), 4), wanted, False), params, stores, schedule, h)
    assert float(np.abs(result.curves[0].loss).max()) < 1e-4
    assert jnp.all(result.states.alive)
