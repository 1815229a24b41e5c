"""Causal tracing against hooks on transformers' models: one forward pass per restoration, the same noise."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.trace import run_trace
from unlearnjax.tracing.mediation import KINDS, Facts, mediate, window_of
from unlearnjax.tracing.trace import Settings

DRAWS = 3
LAYERS = 4
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Families that norm inputs, outputs, and both; one with grouped queries, one with scaled embeddings and windows.
FAMILIES = {
    "olmo": lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**WIDE)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE, num_key_value_heads=2)),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**WIDE)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Token ids, subject [begin, end): inside, at the beginning, of one token, and as far as the end.
PROMPTS = [
    ([5, 9, 23, 31, 8, 44, 12, 7, 3], (2, 4)),
    ([17, 6, 29, 40, 11], (0, 3)),
    ([33, 4, 50, 21, 60, 38, 10], (3, 4)),
    ([14, 52, 19, 26], (2, 4)),
]


def _by_hooks(model, ids, span, noise, kind, window):
    """ROME's trace_with_patch as its paper says it: [positions, layers], the clean and the corrupted probability."""
    begin, end = span
    batch = torch.tensor([ids] * (DRAWS + 1))
    decoder = model.model

    def site(layer):
        block = decoder.layers[layer]
        after = {"mlp": "post_feedforward_layernorm", "attention": "post_attention_layernorm"}.get(kind, "")
        if type(model).__name__ in ("Olmo2ForCausalLM", "Gemma3ForCausalLM") and after:
            return getattr(block, after)  # what is added to the residual stream
        return {"hidden": block, "mlp": block.mlp, "attention": block.self_attn}[kind]

    def corrupt(_, __, out):
        out = out.clone()
        out[1:, begin:end] += torch.from_numpy(noise[:, : end - begin])
        return out

    def run(token=None, layers=()):
        def restore(_, __, out):
            first = out[0] if isinstance(out, tuple) else out
            first = first.clone()
            first[1:, token] = first[0, token]
            return (first, *out[1:]) if isinstance(out, tuple) else first

        hooks = [decoder.embed_tokens.register_forward_hook(corrupt)]
        hooks += [site(layer).register_forward_hook(restore) for layer in layers]
        with torch.no_grad():
            last = torch.softmax(model(batch).logits[:, -1].double(), dim=-1)
        for hook in hooks:
            hook.remove()
        return last

    plain = run()
    answer = int(plain[0].argmax())
    scores = np.zeros((len(ids), LAYERS))
    for token in range(len(ids)):
        for layer in range(LAYERS):
            layers = [layer] if kind == "hidden" else range(*window_of(layer, LAYERS, window))
            scores[token, layer] = run(token, layers)[1:, answer].mean()
    return answer, float(plain[0, answer]), float(plain[1:, answer].mean()), scores


def _loud(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)  # a fresh model says nearly the same of everything
    return model


def _facts(noise, width):
    """The prompts as one batch, padded on the left: some of them in both parts."""
    rest = max(len(ids) - begin for ids, (begin, _) in PROMPTS)
    whole = max(rest + 1, *(len(ids) for ids, _ in PROMPTS))
    tokens = np.zeros((len(PROMPTS), whole), np.int32)
    added = np.zeros((len(PROMPTS), DRAWS, rest, width), np.float32)
    for i, (ids, (begin, end)) in enumerate(PROMPTS):
        tokens[i, whole - len(ids) :] = ids
        first = rest - len(ids) + begin
        added[i, :, first : first + end - begin] = noise[:, : end - begin]
    lengths = np.int32([len(ids) for ids, _ in PROMPTS])
    parts = (tokens[:, : whole - rest], tokens[:, whole - rest :], lengths, added)
    return Facts(*(jnp.asarray(x) for x in parts))


@pytest.mark.parametrize("family", ["olmo", "gemma3", *(slow(family) for family in ("llama", "olmo2"))])
def test_scores_are_those_of_hooks(family, tmp_path):
    torch_model = _loud(family)
    torch_model.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    noise = np.random.RandomState(1).randn(DRAWS, 3, 32).astype(np.float32)
    got = mediate(lm.config, lm.params, _facts(noise, 32), KINDS, 3)
    seen = []
    for i, (ids, span) in enumerate(PROMPTS):
        for kind in KINDS:
            answer, clean, corrupted, scores = _by_hooks(torch_model, ids, span, noise, kind, 3)
            assert int(got.answer[i]) == answer
            np.testing.assert_allclose(got.clean[i], clean, atol=1e-4)
            np.testing.assert_allclose(got.corrupted[i], corrupted, atol=1e-4)
            own = np.asarray(got.restored[kind][i])[span[0] - len(ids) :]
            np.testing.assert_allclose(own, scores[span[0] :], atol=1e-4)
            np.testing.assert_allclose(scores[: span[0]], corrupted, atol=1e-6)
            seen.append(np.abs(scores - corrupted).max())
    assert max(seen) > 0.05  # there is something to see


@pytest.mark.parametrize(("family", "semantics"), [("olmo", "rome"), slow("gemma3", "sha256")])
def test_a_trace_of_facts_is_that_of_hooks(family, semantics, tmp_path):
    """From a file of facts to the report: subjects' tokens, the noise's scale and draws, averages."""
    torch_model = _loud(family)
    prompts = [("Ann Lee is", "Ann Lee"), ("Where did Bob go with him", "Bob"), ("Oslo", "Oslo")]
    tokenizer = train_tokenizer([p for p, _ in prompts] * 9, 290)
    torch_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        torch_model.get_input_embeddings().weight.normal_(0, 0.4)
    torch_model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    coded = [tokenizer(p, return_offsets_mapping=True) for p, _ in prompts]
    embed = torch_model.get_input_embeddings()
    with torch.no_grad():  # as collect_embedding_std of ROME's code: its layer's output, of each subject alone
        alone = [embed(torch.tensor(tokenizer(s, add_special_tokens=False)["input_ids"])) for _, s in prompts]
    sigma = 3 * torch.cat(alone).std().item()
    facts, wanted = [], []
    for (prompt, subject), own in zip(prompts, coded, strict=True):
        at = prompt.index(subject), prompt.index(subject) + len(subject)
        inside = [i for i, (a, b) in enumerate(own["offset_mapping"]) if a < at[1] and b > at[0]]
        span = inside[0], inside[-1] + 1
        draws = sigma * np.random.RandomState(1).randn(DRAWS, span[1] - span[0], 32)
        by_kind = {k: _by_hooks(torch_model, own["input_ids"], span, draws.astype(np.float32), k, 2) for k in KINDS}
        answer, clean, corrupted, _ = by_kind["mlp"]
        wanted.append((span, clean, corrupted, {k: x[3] for k, x in by_kind.items()}))
        facts.append({"prompt": prompt, "subject": subject, "attribute": tokenizer.decode([answer])})
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    settings = Settings(window=2, draws=DRAWS)
    report = run_trace(
        str(tmp_path / "m"), str(tmp_path / "facts.json"), tmp_path / "out", settings, semantics=semantics,
        progress=False, say=lambda _: None,
    )  # fmt: skip
    np.testing.assert_allclose(report["settings"]["sigma"], sigma, rtol=1e-5)
    assert report["counts"]["traced"] == len(facts)
    found = [json.loads(line) for line in (tmp_path / "out" / "facts.jsonl").read_text().splitlines()]
    means = {kind: [] for kind in KINDS}
    for own, (span, clean, corrupted, scores) in zip(found, wanted, strict=True):
        np.testing.assert_allclose([own["clean"], own["corrupted"]], [clean, corrupted], atol=1e-4)
        for kind in KINDS:
            np.testing.assert_allclose(own["restored"][kind], scores[kind], atol=1e-4)
            means[kind].append(scores[kind][span[1] - 1] - corrupted if semantics == "rome" else scores[kind][span[0]])
    for kind in KINDS:
        average = report["effects"]["kinds"][kind]["subject's last"]["mean"]
        np.testing.assert_allclose(average, np.mean(means[kind], axis=0), atol=1e-4)
        assert np.ptp(average) > 1e-3
    curve = np.mean([scores["mlp"][span[1] - 1] - corrupted for span, _, corrupted, scores in wanted], axis=0)
    np.testing.assert_allclose(report["recommended"]["curve"], curve, atol=1e-4)


@pytest.mark.parametrize("window", [4, slow(1), slow(6), slow(9)])
def test_windows_that_share_layers(window, tmp_path):
    """Those that begin at the first layer leave one run after the other; 9 holds all layers wherever it lies."""
    torch.manual_seed(1)
    torch_model = FAMILIES["olmo"]().eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.mul_(20)
    torch_model.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    noise = np.random.RandomState(2).randn(DRAWS, 3, 32).astype(np.float32)
    got = mediate(lm.config, lm.params, _facts(noise, 32), ("attention", "mlp"), window)
    for kind in ("attention", "mlp"):
        ids, span = PROMPTS[0]
        scores = _by_hooks(torch_model, ids, span, noise, kind, window)[3]
        np.testing.assert_allclose(got.restored[kind][0], scores[span[0] :], atol=1e-4)


def test_a_single_layer():
    """Nothing is between its hidden states and the answer; its sub-layers still can be put back."""
    config = ModelConfig("olmo", 61, 32, 48, 1, 4, 4, 8, "layer")
    params = init_params(build(config).abstract(jnp.float32), jax.random.key(0))
    noise = np.random.RandomState(1).randn(DRAWS, 3, 32).astype(np.float32)
    got = mediate(config, params, _facts(noise, 32), ("hidden",), 1)
    for i, (ids, (begin, _)) in enumerate(PROMPTS):
        scores = np.asarray(got.restored["hidden"][i])[begin - len(ids) :, 0]
        np.testing.assert_allclose(scores[:-1], got.corrupted[i])
        np.testing.assert_allclose(scores[-1], got.clean[i])
    assert mediate(config, params, _facts(noise, 32), ("mlp",), 1).restored["mlp"].shape == (4, 7, 1)


def test_windows_are_romes():
    assert [window_of(layer, 16, 10) for layer in (0, 5, 8, 15)] == [(0, 5), (0, 10), (3, 13), (10, 16)]
    assert window_of(3, 8, 1) == (3, 4)
