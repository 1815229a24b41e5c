"""Every term and its gradient against torch, from full logits and the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp_and_mean

from unlearnjax.data.tokens import Every, Side
from unlearnjax.objectives.objective import TERMS, answer_scores, score, unscored
from unlearnjax.objectives.rmu import direction
from unlearnjax.training.hyperparameters import index, stack

ROWS, ANSWERS, HIDDEN, VOCAB = 4, 5, 8, 37
LENGTHS = (5, 2, 3, 4)  # answer tokens of each row
MICRO = ((0, 2), (1,), (3,))
OWN = {
    "simnpo": {"beta": 0.4, "delta": 0.3}, "wga": {"beta": 0.7}, "satimp": {"beta1": 2.0, "beta2": 0.5},
    "undial": {"strength": 3.0}, "ceu": {"skip": 1.0}, "klr_all": {"width": 11.0},
    "bound": {"bound": 0.7, "multiplier": 1.0, "rate": 1.0}, "rmu": {"scale": 3.0},
}  # fmt: skip
BETA = 0.4
VALUES = {
    "learning_rate": 1.0, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": 1, "schedule": 0,
    "max_grad_norm": 1.0, "term_weights": {"npo": 1.0}, "beta": BETA, "term_parameters": OWN, "lora_alpha": 1,
    "lora_rank": 1, "dropout": 0.0, "init_seed": 0,
}  # fmt: skip


def scored(hidden, head, side, *more):
    head = jnp.asarray(head)
    return score(hidden, answer_scores(hidden, head, side.targets, False), head, side, False, *more)


@pytest.fixture(scope="module", params=[1.0, 6.0], ids=["spread", "memorised"])
def arrays(request):
    """Hidden states of model and base, head, targets; `memorised`: the base is all but sure of most targets."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, ANSWERS)).astype(np.int32)
    base = rng.normal(size=(ROWS, ANSWERS, HIDDEN)) * 0.5 + (request.param - 1) * 0.5 * head[targets]
    hidden = base + 0.3 * rng.normal(size=base.shape)
    return hidden.astype(np.float32), base.astype(np.float32), head, targets


def make_side(base, head, targets):
    mask = np.arange(ANSWERS)[None] < np.asarray(LENGTHS)[:, None]
    assign = np.zeros((ROWS, ROWS), np.float32)
    for micro, rows in enumerate(MICRO):
        assign[micro, list(rows)] = 1.0
    base, head, ids = jnp.asarray(base), jnp.asarray(head), jnp.asarray(targets)
    total, mean = vocab_logsumexp_and_mean(base, head)
    entropy = jnp.sum(base * mean, -1) - total
    logit = jnp.sum(base * head[ids], -1)
    without, others = vocab_logsumexp_and_mean(base, head, without=ids)
    nll = jnp.sum(jnp.where(mask, total - logit, 0.0), axis=1)
    every = Every(jnp.asarray(mask), mean, entropy)
    retained = jnp.asarray([_retained(row) for row in range(ROWS)])
    return Side(
        ids, jnp.asarray(mask), jnp.asarray(assign), nll, mean, entropy, others, logit - without, every,
        retained=retained,
    )  # fmt: skip


def _retained(row):
    """Of a pool: whether the row is the retain set's."""
    return row % 2 == 1


def torch_term(name, hidden, base, head, targets):
    """One number per micro-batch, each from the logits of its rows."""
    out = []
    for rows in MICRO:
        picked = [(r, t) for r in rows for t in range(LENGTHS[r])]
        at = tuple(torch.tensor(x) for x in zip(*picked))
        row = at[0]
        logits, frozen = hidden[at] @ head.T, base[at] @ head.T
        target = targets[at]
        logp, q = torch.log_softmax(logits, -1), torch.log_softmax(frozen, -1)
        ce, base_ce = (-x.gather(1, target[:, None])[:, 0] for x in (logp, q))
        p = torch.exp(-ce).detach()
        by_row = lambda x, row=row, rows=rows: torch.stack([x[row == r].sum() for r in rows])  # noqa: E731
        own = OWN.get(name, {})
        sigmoid = torch.nn.functional.logsigmoid
        kl = (q.exp() * (q - logp)).sum(-1)
        if name == "ga":
            loss = -ce.mean()
        elif name in ("gdr", "idk", "forget_ce"):
            loss = ce.mean()
        elif name == "klr":
            loss = kl.mean()
        elif name == "klr_all":
            loss = kl.sum() / (len(rows) * own["width"])
        elif name == "npo":
            loss = (-(2 / BETA) * sigmoid(BETA * (by_row(ce) - by_row(base_ce)))).mean()
        elif name == "npo_mean":
            loss = -(2 / BETA) * sigmoid(BETA * (ce.mean() - base_ce.mean()))
        elif name == "simnpo":
            length = torch.tensor([float(LENGTHS[r]) for r in rows])
            loss = (-(2 / own["beta"]) * sigmoid(own["beta"] * (by_row(ce) / length - own["delta"]))).mean()
        elif name == "wga":
            loss = -(p ** own["beta"] * ce).mean()
        elif name == "satimp":
            loss = -(p ** own["beta1"] * (1 - p) ** own["beta2"] * ce).mean()
        elif name == "undial":
            lowered = frozen.clone()
            lowered[range(len(target)), target] -= own["strength"]
            loss = -(torch.softmax(lowered, -1) * logp).sum(-1).mean()
        elif name == "margin":
            loss = ((logits.max(-1).values - logits.mean(-1)) ** 2).mean()
        elif name == "bound":
            loss = ce.mean() - own["bound"]
        elif name == "ceu":
            out_of = logits.detach().clone()
            out_of[range(len(target)), target] = -torch.inf
            loss = -(torch.softmax(out_of, -1) * logp).sum(-1)[at[1] >= own["skip"]].mean()
        elif name in ("pool_ga", "pool_retain", "pool_retain_rows"):
            kept = ce[torch.tensor([_retained(int(r)) == (name != "pool_ga") for r in row])]
            loss = (kept.mean() if len(kept) else 0.0 * ce.sum()) * (-1 if name == "pool_ga" else 1)
        elif name in ("row_ga", "row_retain"):
            factor = [(1.0 if _retained(r) else 0.0) if name == "row_retain" else _retained(r) - 1.0 for r in rows]
            means = torch.stack([ce[row == r].mean() for r in rows])
            loss = (torch.tensor(factor, dtype=ce.dtype) * means).mean()
        out.append(loss)
    return torch.stack(out)


@pytest.mark.parametrize("name", [n for n in TERMS if n not in ("dpo", "rmu", "rmu_retain")])
def test_value_and_gradient_equal_torch(arrays, name):
    hidden, base, head, targets = arrays
    theirs = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    fixed = (torch.tensor(x, dtype=torch.float64) for x in (base, head))
    expected = torch_term(name, theirs, *fixed, torch.tensor(targets, dtype=torch.int64))

    h, term, side = index(stack([VALUES]), 0), TERMS[name], make_side(base, head, targets)

    def losses(x):
        every = x if "every" in term.reads else None
        return term.loss(scored(x, head, side, every, term.reads), side, h)

    compare(losses, hidden, expected, theirs)


def compare(losses, hidden, expected, theirs):
    """Values by micro-batch and the gradient of their weighted sum; torch's graph is used up."""
    pull = np.asarray([1.0, -0.5, 2.0, 3.0], np.float32)
    (expected * torch.tensor(pull[:3])).sum().backward()
    got = losses(jnp.asarray(hidden))
    assert float(got[3]) == 0.0  # no such micro-batch
    np.testing.assert_allclose(got[:3], expected.detach(), rtol=2e-4, atol=2e-5)
    gradient = jax.grad(lambda x: jnp.sum(losses(x) * pull))(jnp.asarray(hidden))
    largest = float(theirs.grad.abs().max())
    assert largest > 0.0
    np.testing.assert_allclose(gradient, theirs.grad, rtol=2e-3, atol=2e-3 * largest)


def test_dpo_and_its_gradients_to_both_answers_equal_torch(arrays):
    hidden, base, head, targets = arrays
    rng = np.random.default_rng(1)
    better = rng.integers(0, VOCAB, targets.shape).astype(np.int32)
    both = np.stack([hidden, hidden + 0.2 * rng.normal(size=hidden.shape).astype(np.float32)])
    frozen = np.stack([base, base + 0.1 * rng.normal(size=base.shape).astype(np.float32)])
    theirs = torch.tensor(both, dtype=torch.float64, requires_grad=True)

    def log_likelihood(x, which, row):
        logits = x[which, row, : LENGTHS[row]] @ torch.tensor(head, dtype=torch.float64).T
        ids = torch.tensor((targets, better)[which][row, : LENGTHS[row]], dtype=torch.int64)
        return torch.log_softmax(logits, -1).gather(1, ids[:, None]).sum()

    fixed = torch.tensor(frozen, dtype=torch.float64)
    ratio = lambda which, row: log_likelihood(theirs, which, row) - log_likelihood(fixed, which, row)  # noqa: E731
    logistic = torch.nn.functional.logsigmoid
    by_row = {r: -(2 / BETA) * logistic(BETA * (ratio(1, r) - ratio(0, r))) for rows in MICRO for r in rows}
    expected = torch.stack([torch.stack([by_row[r] for r in rows]).mean() for rows in MICRO])

    h = index(stack([VALUES]), 0)
    sides = [make_side(frozen[k], head, (targets, better)[k]) for k in (0, 1)]

    def losses(x):
        lose, win = (scored(x[k], head, sides[k]) for k in (0, 1))
        return TERMS["dpo"].loss(lose._replace(beside=(win, sides[1])), sides[0], h)

    compare(losses, both, expected, theirs)


@pytest.mark.parametrize("name", ["rmu", "rmu_retain"])
def test_rmu_and_its_gradient_equal_torch(arrays, name):
    hidden, base, head, targets = arrays
    h = index(stack([VALUES]), 0)
    theirs = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    u = np.asarray(direction(h, HIDDEN), np.float64)
    assert (u >= 0).all() and abs(np.linalg.norm(u) - 1.0) < 1e-6
    goal = torch.tensor(base, dtype=torch.float64)
    if name == "rmu":
        goal = torch.tensor(OWN["rmu"]["scale"] * u).expand(ROWS, ANSWERS, HIDDEN)
    # Here a row's tokens are what the other tests take for its answer.
    by_row = [torch.nn.functional.mse_loss(theirs[r, :n], goal[r, :n]) for r, n in enumerate(LENGTHS)]
    expected = torch.stack([torch.stack([by_row[r] for r in rows]).mean() for rows in MICRO])
    side = make_side(base, head, targets)
    side = side._replace(inside=side.mask, layer_hidden=jnp.asarray(base))
    compare(lambda x: TERMS[name].loss(unscored(side, x), side, h), hidden, expected, theirs)
