"""The recipes selective-amnesia, sugd and agad as they ship: their first ten updates against torch renderings of the
authors' loops, from the same texts. A larger rate moves the losses; the number of rows is small, and so batches are."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax.adapters.lora import lora
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.rows import Row
from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.prepare import Data, Sources, prepare
from unlearnjax.recipes.train_step import train_candidates
from unlearnjax.training.hyperparameters import index
from unlearnjax.training.state import init_state

SENTENCE = "ada bob went home to see the old red fox near a long river and then they all came back"
WORDS = SENTENCE.split()
UPDATES, RATE = 10, 2e-3

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def texts(kind, count, seed):
    rng = np.random.default_rng(seed)
    say = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    lengths = rng.integers((3, 2), (9, 7), (count, 2))
    return [Row(f"{kind}{i}qa0", say(p), say(a), "Task1") for i, (p, a) in enumerate(lengths)]


FORGET, RETAIN = texts("f", 14, 0), texts("r", 11, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    tokenizer = train_tokenizer([f"{r.input} {r.output}" for r in FORGET + RETAIN], 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(base, name, **changes):
    """The recipe's candidate through prepare and training: (model, group, candidate, curve)."""
    lm, recipe = load_model(str(base)), load_recipe(name)
    candidate = dataclasses.replace(recipe.candidates[0], learning_rate=RATE, **changes)
    recipe = dataclasses.replace(recipe, candidates=(candidate,))
    data = Data(FORGET, RETAIN, None, None, None)
    groups = prepare(recipe, lm, data, Sources("f", "r"), {"mlp": (1, 2, 3)})
    trained = train_candidates(lm, groups, recipe)
    return lm, groups[0], candidate, trained.result.curves[0]


def row_ids(lm, candidate, row):
    """(ids, where the answer begins): input, the separator and the output; no end of text."""
    prompt = lm.tokenizer(row.input)["input_ids"]
    answer = lm.tokenizer(candidate.separator + row.output, add_special_tokens=False)["input_ids"]
    return torch.tensor([[*prompt, *answer]]), len(prompt)


def losses_of(model, lm, candidate, row):
    ids, first = row_ids(lm, candidate, row)
    scores = torch.log_softmax(model(ids).logits[0, first - 1 : -1], -1)
    return -scores.gather(1, ids[0, first:, None])[:, 0]


def steps_of(group):
    """Each step's pool rows, weight, whether it ends an update, epoch, share of the rate and restart."""
    for step in group.schedule.steps:
        rows = step.rows["pool"][0]
        yield rows[rows >= 0], step.micro_weight[0, 0], step.update[0], step.epochs[0], step.share[0], step.restart[0]


def text_of(row):
    return (FORGET + RETAIN)[row]


def trainable(model, layers, modules):
    for name, parameter in model.named_parameters():
        inside = any(f"model.layers.{i}." in name for i in layers)
        parameter.requires_grad_(inside and (modules is None or f".{modules}." in name))
    return [p for p in model.parameters() if p.requires_grad]


def compare(found, wanted):
    assert len(wanted) >= UPDATES and max(wanted[:UPDATES]) - min(wanted[:UPDATES]) > 0.05
    np.testing.assert_allclose(found[:UPDATES], wanted[:UPDATES], atol=1e-3)


@pytest.mark.slow
def test_selective_amnesia(base):
    """unlearn.py: rows of both sets in one batch, -CE of one side's answer tokens and m times CE of the other's."""
    lm, group, candidate, curve = ours(base, "selective-amnesia", micro_batch=5, accumulation=2, epochs=4)
    model = LlamaForCausalLM.from_pretrained(base).eval()
    own = trainable(model, (1, 2, 3), "mlp")
    optimizer = torch.optim.AdamW(own, lr=RATE, weight_decay=0.0)
    total = int(group.schedule.updates[0])
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / total)
    kept, running, first = [], 0.0, []
    for rows, weight, update, epoch, _, _ in steps_of(group):
        sides = [[losses_of(model, lm, candidate, text_of(r)) for r in rows if (r < len(FORGET)) == f] for f in (1, 0)]
        forget, retain = (torch.cat(x).mean() if x else torch.zeros(()) for x in sides)
        m, level = 1.2, float(retain.detach())
        if epoch == 0:
            first += [level] * bool(sides[1])
        elif level > np.mean(first):
            m = min(max(round(0.3 * 6 ** (level - np.mean(first)) + 0.8, 1), 1.2), 2.3)
        loss = (-forget + m * retain) * float(weight)
        loss.backward()
        running += float(loss.detach())
        if update:
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            kept.append(running)
            running = 0.0
    compare(curve.loss, kept)


def by_row(model, lm, candidate, rows, retained):
    """The mean over rows of factor times the row's mean loss."""
    factor = lambda r: -1.0 if r < len(FORGET) else retained  # noqa: E731
    return torch.stack([factor(r) * losses_of(model, lm, candidate, text_of(r)).mean() for r in rows]).mean()


def phases(model, own, group, loss_of):
    """A new optimizer for each phase, its rate falling linearly to 0."""
    fresh = lambda: torch.optim.AdamW(own, lr=RATE, weight_decay=0.0)  # noqa: E731
    optimizer, kept = fresh(), []
    for rows, _, _, _, share, restart in steps_of(group):
        for settings in optimizer.param_groups:
            settings["lr"] = RATE * float(share)
        loss = loss_of(rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        kept.append(float(loss.detach()))
        if restart:
            optimizer = fresh()
    return kept


@pytest.mark.slow
def test_sugd(base):
    """Chunks of 3 forget rows at ratio 7: the restart lies within the ten updates."""
    parameters = {"chunk": 3, "ratio": 7}
    lm, group, candidate, curve = ours(base, "sugd", order_parameters=parameters, epochs=2, layers="last-3")
    rows = [rows for rows, *_ in steps_of(group)]
    assert [sum(own < len(FORGET)) for own in rows] == [1] * len(rows) and {len(own) for own in rows} == {8}
    model = LlamaForCausalLM.from_pretrained(base).eval()
    own = trainable(model, (5, 6, 7), None)
    compare(curve.loss, phases(model, own, group, lambda r: by_row(model, lm, candidate, r, 0.5)))


@pytest.mark.slow
def test_agad(base):
    """Ascent on chunks of 6, then fine-tuning on a quarter of the retain rows, with PEFT's LoRA from the same A."""
    parameters = {"chunk": 6, "anneal_epochs": 2, "fraction": 0.25}
    lm, group, candidate, curve = ours(base, "agad", order_parameters=parameters, micro_batch=2, epochs=2)
    targets = ("q", "v", "up", "down")
    start = init_state(lora(lm.config, targets, 16), lm.params, index(group.hyperparameters, 0)).trainable
    names = [f"{n}_proj" for n in targets]
    model = LlamaForCausalLM.from_pretrained(base).eval()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=names))
    for name in targets:
        block = lm.config.linears[name][0]
        module = {"attention": "self_attn"}.get(block, block)
        for layer in range(lm.config.layers):
            place = model.get_submodule(f"base_model.model.model.layers.{layer}.{module}.{name}_proj")
            a = jax.device_get(start["layers"][block][name]["a"][layer])
            place.lora_A["default"].weight.data = torch.tensor(np.array(a))
    own = [p for p in model.parameters() if p.requires_grad]
    compare(curve.loss, phases(model, own, group, lambda r: by_row(model, lm, candidate, r, 1.0)))
