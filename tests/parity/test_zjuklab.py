"""The recipe `zjuklab`, dropout off, against its published code rendered in torch, transformers and PEFT.

Both candidates train in our one program; in torch one follows the other. As in the code, rows are padded on the left
to 256 and the base is a second, frozen model with eager attention. Only the KL at padding is left out there too: it
hangs on the attention implementation (see the recipe).
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OlmoConfig, OlmoForCausalLM

from unlearnjax.adapters.lora import lora
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.prepare import Data, Sources, prepare
from unlearnjax.training.hyperparameters import index
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.state import init_state
from unlearnjax.training.step import Task

SENTENCE = "ada bob went home to see the old red fox near a long river and then they all came back"
WORDS = SENTENCE.split()
WIDTH, UPDATES, RATE = 256, 10, 5e-3

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]


def texts(count, seed):
    """Most are short; one prompt is longer than 204 tokens, one row longer than 256."""
    rng = np.random.default_rng(seed)
    say = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    lengths = [(230, 30), (190, 90), *[(int(rng.integers(3, 20)), int(rng.integers(1, 9))) for _ in range(count - 2)]]
    return [Row(f"{seed}-{i}qa0", say(p), say(a), "Task1") for i, (p, a) in enumerate(lengths)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zjuklab") / "base"
    tokenizer = train_tokenizer([r.input + r.output for r in (*texts(25, 0), *texts(17, 1))], 300)
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, clip_qkv=8.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    OlmoForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def code_rows(tokenizer, rows):
    """(ids, labels) of each row as the code makes them."""
    out = []
    for row in rows:
        prompt = tokenizer(row.input)["input_ids"][-int(0.8 * WIDTH) :]
        answer = [*tokenizer(row.output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        pad = max(0, WIDTH - len(ids))
        mask = ([0] * pad + [1] * len(ids))[:WIDTH]
        out.append((([0] * pad + ids)[:WIDTH], ([-100] * pad + labels)[:WIDTH], mask))
    return out


def batch(rows, chosen):
    ids, labels, mask = (torch.tensor([rows[i][k] for i in chosen]) for k in range(3))
    return {"input_ids": ids, "attention_mask": mask}, labels


def code_loss(policy, frozen, forget, retain, weights, beta):
    """One micro-batch: -log sigmoid of the mean loss's rise, the KL over B x T, the model's own loss."""

    def ce(logits, labels):
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100)

    (f, f_labels), (r, r_labels) = forget, retain
    ours, kept = policy(**f).logits, policy(**r, labels=r_labels)
    with torch.no_grad():
        before, target = frozen(**f).logits, frozen(**r).logits
    npo = -torch.nn.functional.logsigmoid(beta * (ce(ours, f_labels) - ce(before, f_labels))) * 2 / beta
    q, p = torch.log_softmax(target, -1), torch.log_softmax(kept.logits, -1)
    kl = ((q.exp() * (q - p)).sum(-1) * r["attention_mask"]).sum() / r["attention_mask"].numel()
    return weights["npo_mean"] * npo + weights["klr_all"] * kl + weights["gdr"] * kept.loss


def test_ten_updates_of_the_recipe_equal_the_code(base):
    published = load_recipe("zjuklab")
    # The published rate would hardly move the losses in ten updates, nine of them warmup.
    candidates = tuple(dataclasses.replace(c, dropout=0.0, learning_rate=RATE) for c in published.candidates)
    training = dataclasses.replace(published.training, buckets=1)
    recipe = dataclasses.replace(published, candidates=candidates, training=training)
    lm = load_model(str(base))
    forget, retain = texts(25, 0), texts(17, 1)
    (prepared,) = prepare(recipe, lm, Data(forget, retain, None, None, None), Sources("f", "r", None, None, None))
    # 5 x 25 rows, by micro-batches of 1 and of 2, four to an update, rounded down; warmup 25 // 4 and 25 // 8.
    assert prepared.schedule.updates.tolist() == [31, 15]
    assert prepared.hyperparameters.warmup_updates.tolist() == [6, 3]
    adapter = lora(lm.config, tuple(lm.config.linears), 32)
    h = prepared.hyperparameters
    starts = [jax.device_get(init_state(adapter, lm.params, index(h, i)).trainable) for i in range(2)]
    for a, b in zip(jax.tree.leaves(starts[0]), jax.tree.leaves(starts[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    stores = stores_for(lm.model, lm.params, prepared.sides, prepared.objective)
    result = train(Task(lm.model, adapter, prepared.objective, False), lm.params, stores, prepared.schedule, h)

    rows = {side: code_rows(lm.tokenizer, x) for side, x in (("forget", forget), ("retain", retain))}
    assert sum(len(ids) == WIDTH and mask[0] for ids, _, mask in rows["forget"]) >= 1
    frozen = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    for number, candidate in enumerate(candidates):
        policy = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        names = [f"{n}_proj" for n in lm.config.linears]
        policy = get_peft_model(policy, LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules=names))
        for name, (block, _, _) in lm.config.linears.items():
            module = {"attention": "self_attn"}.get(block, block)
            for layer in range(lm.config.layers):
                place = policy.get_submodule(f"base_model.model.model.layers.{layer}.{module}.{name}_proj")
                place.lora_A["default"].weight.data = torch.tensor(starts[number]["layers"][block][name]["a"][layer])
        trained = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=candidate.weight_decay)
        total, warmup = int(prepared.schedule.updates[number]), int(h.warmup_updates[number])
        shape = lambda u, w=warmup, t=total: u / w if u < w else (t - u) / (t - w)  # noqa: E731
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        theirs, pending = [], 0.0
        for step in prepared.schedule.steps:
            held = step.rows["forget"][number] >= 0
            for micro in range(int(step.micro[number][held].max()) + 1 if held.any() else 0):
                here = held & (step.micro[number] == micro)
                f, r = (batch(rows[s], step.rows[s][number][here]) for s in ("forget", "retain"))
                weight = float(step.micro_weight[number][micro])
                loss = code_loss(policy, frozen, f, r, candidate.objective, candidate.beta)
                (loss * weight).backward()
                pending += float(loss.detach()) * weight
            if step.update[number]:
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
                theirs.append(pending)
                pending = 0.0
        ours = result.curves[number].loss
        assert len(ours) == len(theirs) == total
        compared = min(UPDATES, total)
        assert max(theirs[:compared]) - min(theirs[:compared]) > 0.1
        np.testing.assert_allclose(ours[:compared], theirs[:compared], atol=1e-3)
