"""Greedy generation against transformers' and PEFT's `generate(do_sample=False)`, token for token, in float32."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation import generate as generation
from unlearnjax.evaluation.generate import generate, generate_candidates
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import load_model
from unlearnjax.models.protocol import Variables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, PAD = 97, 1
TARGETS = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}


def hf_model(name):
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.3,
        "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if name == "olmo":
        config = transformers.OlmoConfig(**sizes, clip_qkv=2.0, tie_word_embeddings=False)
        return transformers.OlmoForCausalLM(config).eval()
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


def our_model(reference, folder):
    """The same weights, by way of a folder that transformers writes."""
    reference.save_pretrained(folder)
    ours = load_model(folder)
    return build(ours.config, unroll=reference.config.model_type == "olmo"), ours.params  # one of each kind


def reference_generate(reference, prompts, eos, limit):
    """One row at a time, as the official script does; the end token cut off."""
    rows = []
    for prompt in prompts:
        out = reference.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=limit, pad_token_id=PAD, eos_token_id=list(eos) or None,
        )[0, len(prompt):].tolist()  # fmt: skip
        rows.append(list(itertools.takewhile(lambda t: t not in eos, out)))
    return rows


def random_prompts(count, longest, seed=0):
    rng = np.random.RandomState(seed)
    lengths = [longest, *rng.randint(1, longest + 1, count - 1)]
    return [rng.randint(2, VOCAB, length).tolist() for length in lengths]


def random_lora(model, count, seed=0, rank=3):
    rng = np.random.RandomState(seed)
    tree = {"attention": {}, "mlp": {}}
    for name in TARGETS:
        block, out, inner = model.config.linears[name]
        shape = (count, model.config.layers)
        tree[block][name] = {
            "a": jnp.asarray(rng.randn(*shape, rank, inner) * 0.3, jnp.float32),
            "b": jnp.asarray(rng.randn(*shape, out, rank) * 0.3, jnp.float32),
        }
    return {"layers": tree}


@pytest.mark.parametrize("name", ["olmo", "llama"])
def test_equals_transformers(name, monkeypatch, tmp_path):
    reference = hf_model(name)
    model, params = our_model(reference, tmp_path)
    prompts = random_prompts(7, 30)
    free = reference_generate(reference, prompts, (), 48)
    # Two end tokens: a row's third, and one that about half of the rows ever meet.
    eos = (free[0][2], min(range(VOCAB), key=lambda t: abs(sum(t in row for row in free) - 4)))
    expected = reference_generate(reference, prompts, eos, 48)
    lengths = [len(row) for row in expected]
    assert min(lengths) <= 2 and max(lengths) == 48 and len(set(lengths)) > 2, lengths
    settings = {"pad_token_id": PAD, "batch_size": 4}
    variables = Variables(params)
    finished = []
    ours = generate(
        model, variables, prompts, eos_token_ids=eos, max_new_tokens=48, progress=finished.append, **settings
    )
    assert ours == expected
    assert sum(finished) == len(prompts)
    assert generate(model, variables, prompts, eos_token_ids=(), max_new_tokens=48, **settings) == free
    # The edges: one token, and exactly the first look and one beyond it.
    monkeypatch.setattr(generation, "FIRST_LOOK", 4)
    for limit in (1, 4, 5):
        ours = generate(model, variables, prompts[:4], eos_token_ids=(), max_new_tokens=limit, **settings)
        assert ours == [row[:limit] for row in free[:4]]


def test_dropping_ended_rows_changes_nothing(monkeypatch, tmp_path):
    reference = hf_model("olmo")
    model, params = our_model(reference, tmp_path)
    prompts = random_prompts(8, 16, seed=1)
    free = reference_generate(reference, prompts, (), 40)
    # An end token that most rows, but not all, meet.
    eos = min(range(VOCAB), key=lambda t: abs(sum(t in row[:20] for row in free) - 6))
    expected = reference_generate(reference, prompts, (eos,), 40)
    monkeypatch.setattr(generation, "FIRST_LOOK", 5)
    monkeypatch.setattr(generation, "SHRINK", 2)
    sizes = []
    run = generation.programs(model)

    def recording(params, lora, state, *rest, **options):
        sizes.append(state.last.shape[1])
        return run.run(params, lora, state, *rest, **options)

    monkeypatch.setattr(generation, "programs", lambda model, mesh: run._replace(run=recording))
    ours = generate(
        model, Variables(params), prompts, eos_token_ids=(eos,), pad_token_id=PAD, max_new_tokens=40, batch_size=8
    )
    assert ours == expected
    assert sizes[0] == 8 and len(set(sizes)) > 1, sizes


def test_candidates_equal_one_at_a_time_and_peft(tmp_path):
    peft = pytest.importorskip("peft")
    reference = hf_model("llama")
    model, params = our_model(reference, tmp_path)
    prompts = random_prompts(5, 16, seed=2)
    lora = random_lora(model, 3)
    free = generate_candidates(
        model, params, lora, prompts, eos_token_ids=(), pad_token_id=PAD, max_new_tokens=12, batch_size=4
    )
    assert free[0] != free[1] != free[2]
    settings = {"eos_token_ids": (free[1][0][4],), "pad_token_id": PAD, "max_new_tokens": 40, "batch_size": 4}
    together = generate_candidates(model, params, lora, prompts, **settings)
    assert any(len(row) < 40 for rows in together for row in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads names that transformers has deprecated
        settings_of_peft = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
        adapted = peft.get_peft_model(reference, settings_of_peft).eval()
    for n in range(3):
        one = {"layers": {b: {k: {x: v[n] for x, v in ab.items()} for k, ab in names.items()}
                          for b, names in lora["layers"].items()}}  # fmt: skip
        assert generate(model, Variables(params, one), prompts, **settings) == together[n]
        state = {}
        for name, path in TARGETS.items():
            leaf = one["layers"][model.config.linears[name][0]][name]
            for i in range(model.config.layers):
                stem = f"base_model.model.model.layers.{i}.{path}"
                state[f"{stem}.lora_A.weight"] = torch.tensor(np.asarray(leaf["a"][i]))
                # PEFT multiplies by alpha / r = 2; ours has the scale folded into b.
                state[f"{stem}.lora_B.weight"] = torch.tensor(np.asarray(leaf["b"][i]) / 2)
        missing = peft.set_peft_model_state_dict(adapted, state)
        assert not missing.unexpected_keys
        assert reference_generate(adapted, prompts, settings["eos_token_ids"], 40) == together[n]


def test_bad_rows_are_refused(tmp_path):
    reference = hf_model("olmo")
    model, params = our_model(reference, tmp_path)
    settings = {"eos_token_ids": (), "pad_token_id": PAD, "max_new_tokens": 20, "batch_size": 4}
    variables = Variables(params)
    with pytest.raises(UserError, match=r"row 'b': row longer than the context: 237 tokens and 20 new ones.*256"):
        generate(model, variables, [[5], [5] * 237], names=["row 'a'", "row 'b'"], **settings)
    with pytest.raises(UserError, match="row 2: no tokens"):
        generate(model, variables, [[5], []], **settings)
    with pytest.raises(UserError, match=f"row 1: token id {VOCAB} is outside"):
        generate(model, variables, [[5, VOCAB]], **settings)
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(model, variables, [[5]], **(settings | {"max_new_tokens": 0}))
    # Exactly the context's length is allowed.
    assert len(generate(model, variables, [[5] * 236], **settings)[0]) == 20
