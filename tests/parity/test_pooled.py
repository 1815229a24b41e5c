"""Selective Amnesia's and SUGD's first updates against torch renderings of their code; the multiplier's table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax.adapters.restricted import restricted
from unlearnjax.data.sequences import chunked, lockstep, mixed
from unlearnjax.data.tokens import pack, pooled
from unlearnjax.io.huggingface import load_config, load_params
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.objectives.pooled import ADAPTIVE, multiplier
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task

LAYERS, FORGET, RETAIN = 3, 9, 10


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    model.lm_head.weight.data *= 20.0  # spread the logits: a random head gives flat losses
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def sides():
    rng = np.random.default_rng(0)
    made = []
    for count in (FORGET, RETAIN):
        texts = [rng.integers(2, 53, rng.integers(8, 16)).tolist() for _ in range(count)]
        made.append(pack(texts, [int(rng.integers(2, len(t) - 2)) for t in texts]))
    return made


def ours(folder, sequence, weights, layers, modules, rate, decay):
    """Train one candidate; returns its curve and its weights' changes."""
    config = load_config(folder)
    params = load_params(folder, config, "float32")
    forget, retain = sides()
    pool = pooled(forget, retain)
    model, adapter, wanted = build(config, unroll=True), restricted(config, layers, modules), objective(weights)
    schedule = lockstep(pool, [sequence], buckets=2)
    names = {t.name: dict(t.parameters) for t in wanted.terms if t.parameters}
    settings = {
        "learning_rate": rate, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": int(schedule.updates[0]),
        "schedule": decay, "max_grad_norm": 1.0, "term_weights": weights, "beta": 0.1, "term_parameters": names,
        "lora_alpha": 1, "lora_rank": 1, "dropout": 0.0, "init_seed": 0,
    }  # fmt: skip
    h = stack([settings])
    stores = stores_for(model, params, {"pool": pool}, wanted)
    result = train(Task(model, adapter, wanted, False), params, stores, schedule, h)
    delta = adapter.delta(params, jax.tree.map(lambda x: x[0], result.states.trainable), index(h, 0))
    return result.curves[0], delta, params


def ce_of(model, pool, row):
    """Log-probabilities of a row's answer tokens, negated."""
    ids = torch.tensor(pool.row(row).astype(np.int64))[None]
    first = int(pool.answer_start[row])
    scores = torch.log_softmax(model(ids).logits[0, first - 1 : -1], -1)
    return -scores.gather(1, ids[0, first:, None])[:, 0]


def trained_of(model, layers, modules):
    """Freeze all but these; returns what trains."""
    for name, parameter in model.named_parameters():
        inside = any(f"layers.{layer}." in name for layer in layers)
        parameter.requires_grad_(inside and (modules == "all" or f".{modules}." in name))
    return [p for p in model.parameters() if p.requires_grad]


def selective_amnesia(folder, sequence, layers, modules, rate, by_rows):
    """The loop of the authors' unlearn.py, micro-batch by micro-batch; returns each update's loss and the model."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    pool, kept, summed, count = pooled(*sides()), [], 0.0, 0
    own = trained_of(model, layers, modules)
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
    total = sum(m.update for m in sequence)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / total)
    running = 0.0
    for micro in sequence:
        parts = {}
        for name, rows in (("forget", micro.rows[micro.rows < FORGET]), ("retain", micro.rows[micro.rows >= FORGET])):
            tokens = [ce_of(model, pool, int(r)) for r in rows]
            parts[name] = torch.cat(tokens).mean() if tokens else torch.zeros(())
        m, retain = 1.2, float(parts["retain"].detach())
        if micro.epoch == 0:
            summed += retain
            held = int((micro.rows >= FORGET).sum())
            count += held if by_rows else int(held > 0)
        elif retain > summed / count:
            m = min(max(round(0.3 * 6 ** (retain - summed / count) + 0.8, 1), 1.2), 2.3)
        loss = (-parts["forget"] + m * parts["retain"]) * micro.weight
        loss.backward()
        running += float(loss.detach())
        if micro.update:
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            kept.append(running)
            running = 0.0
    return kept, model


def sugd(folder, sequence, layers, rate):
    """AILS-NTUA's loop on 1 + ratio devices: a trainer per chunk, each with its own optimizer."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    pool, kept = pooled(*sides()), []
    own = trained_of(model, layers, "all")
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
    for micro in sequence:
        for group in optimizer.param_groups:
            group["lr"] = rate * micro.share
        each = [(-1.0 if r < FORGET else 0.5) * ce_of(model, pool, int(r)).mean() for r in micro.rows]
        loss = torch.stack(each).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        kept.append(float(loss.detach()))
        if micro.restart:
            optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
    return kept, model


def same_weights(delta, params, model, tolerance):
    places = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "q": "self_attn.q_proj"}
    state, moved = model.state_dict(), 0.0
    for block, linears in delta["layers"].items():
        for name, leaf in linears.items():
            if name not in places:
                continue
            for layer in range(LAYERS):
                wanted = state[f"model.layers.{layer}.{places[name]}.weight"].numpy()
                start = np.asarray(params["layers"][block][name]["weight"][layer])
                np.testing.assert_allclose(leaf["weight"][layer], wanted - start, atol=tolerance)
                moved = max(moved, float(np.abs(wanted - start).max()))
    assert moved > 20 * tolerance


@pytest.mark.parametrize(("term", "by_rows"), [("pool_retain", False), ("pool_retain_rows", True)])
def test_selective_amnesia(base, term, by_rows):
    """Ten updates: two epochs of mixed batches, two micro-batches each, MLPs of the first two layers, linear decay."""
    sequence = mixed(FORGET, RETAIN, batch=2, accumulation=2, epochs=2, seed=1)
    curve, delta, params = ours(base, sequence, {"pool_ga": 1.0, term: 1.0}, [0, 1], "mlp", 2e-3, 1)
    losses, model = selective_amnesia(base, sequence, [0, 1], "mlp", 2e-3, by_rows)
    assert len(losses) == len(curve.loss) >= 10
    np.testing.assert_allclose(curve.loss, losses, atol=1e-3)
    same_weights(delta, params, model, 2e-5)


def test_the_two_references_differ(base):
    """Divided by rows the reference is smaller, and the multiplier is raised more often."""
    sequence = mixed(FORGET, RETAIN, batch=4, accumulation=1, epochs=2, seed=1)
    runs = [selective_amnesia(base, sequence, [0, 1], "mlp", 2e-3, by_rows)[0] for by_rows in (False, True)]
    assert np.abs(np.subtract(*runs)).max() > 0.1


def test_sugd(base):
    """Chunks of 4 rows at ratio 3, two epochs each: restarts of optimizer and rate, all of the last layer."""
    sequence = chunked(FORGET, RETAIN, chunk=4, ratio=3, epochs=2)[:12]
    assert [m.restart for m in sequence].index(True) == 7
    curve, delta, params = ours(base, sequence, {"row_ga": 1.0, "row_retain": 0.5}, [2], "all", 1e-3, 0)
    losses, model = sugd(base, sequence, [2], 1e-3)
    np.testing.assert_allclose(curve.loss, losses, atol=1e-3)
    same_weights(delta, params, model, 2e-5)


def test_without_the_restart_it_would_differ(base):
    sequence = chunked(FORGET, RETAIN, chunk=4, ratio=3, epochs=2)[:12]
    weights = {"row_ga": 1.0, "row_retain": 0.5}
    _, with_restart, _ = ours(base, sequence, weights, [2], "all", 1e-3, 0)
    dropped = [m._replace(restart=False) for m in sequence]
    _, without, _ = ours(base, dropped, weights, [2], "all", 1e-3, 0)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), with_restart, without)
    assert max(jax.tree.leaves(apart)) > 1e-4


@pytest.mark.parametrize(
    ("risen", "m"),
    [(-1.0, 1.2), (0.0, 1.2), (0.2, 1.2), (0.3, 1.3), (0.4, 1.4), (0.5, 1.5), (0.6, 1.7), (0.7, 1.9), (0.8, 2.1),
     (0.88, 2.3), (3.0, 2.3), (50.0, 2.3)],
)  # fmt: skip
def test_the_multipliers_table(risen, m):
    """The spec's (language_models.md, 3.2)."""
    own = {name: jnp.float32(value) for name, value in ADAPTIVE.items()}
    got = multiplier(jnp.float32(2.0 + risen), jnp.float32(2.0), own)
    np.testing.assert_allclose(got, m, rtol=1e-6)
