"""Logits against transformers on folders that transformers wrote, and taps against torch's forward hooks.

The random weights are large enough that logits are of order 1 to 10, so that 1e-4 in float32 means something.
"""

import contextlib
import gc
import json
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

from unlearnjax import UserError, load_model, save_model
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.models.protocol import Taps

VOCAB = 160
OLMO = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "eos_token_id": 159, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {**OLMO, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 1, "rms_norm_eps": 1e-5}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "olmo": (OlmoForCausalLM, OLMO),
    "olmo clipped": (OlmoForCausalLM, OLMO | {"clip_qkv": 0.6}),
    "olmo tied": (OlmoForCausalLM, OLMO | {"tie_word_embeddings": True}),
    "olmo clipped tied, grouped": (
        OlmoForCausalLM, OLMO | {"clip_qkv": 0.6, "tie_word_embeddings": True, "num_key_value_heads": 2},
    ),
    "llama grouped, own head_dim, llama3 rope": (LlamaForCausalLM, LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama tied, one key head, eps": (
        LlamaForCausalLM, LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.05},
    ),
    "llama linear rope": (
        LlamaForCausalLM, LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}},
    ),
}  # fmt: skip


def make(kind, keywords, seed=0):
    """A model whose every weight matters: unit-gain linears, unit embeddings, norm scales away from 1."""
    config = {LlamaForCausalLM: LlamaConfig, OlmoForCausalLM: OlmoConfig}[kind](**keywords)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim == 1 else 0.5 if "embed" in name else p.shape[1] ** -0.5
            p.data = (1.0 if p.ndim == 1 else 0.0) + scale * torch.randn(p.shape)
    model.tie_weights()
    return model


def tokens(batch=2, length=24, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


@torch.no_grad()
def theirs(model, ids, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    return model(torch.tensor(ids), attention_mask=mask).logits.float().numpy()


def close(ours, reference, mask=None, atol=1e-4):
    ours = np.asarray(ours)
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    keep = np.ones(reference.shape[:2], bool) if mask is None else mask.astype(bool)
    assert np.abs(reference[keep]).max() > 0.5, "too small to tell anything"
    np.testing.assert_allclose(ours[keep], reference[keep], atol=atol, rtol=0)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """A torch model, and ours loaded from the folder that it wrote."""
    model = make(*CASES[request.param])
    folder = tmp_path_factory.mktemp("model")
    # Every other case in shards, down to one tensor per file.
    sharded = list(CASES).index(request.param) % 2 == 1
    model.save_pretrained(folder, max_shard_size="8KB" if sharded else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 5) == sharded
    return model, load_model(folder), folder


def test_logits(saved):
    model, ours, _ = saved
    close(ours.logits(tokens(5)), theirs(model, tokens(5)))


def test_padding_on_either_side(saved):
    model, ours, _ = saved
    mask = np.ones((5, 24), np.int64)
    mask[1, :7] = mask[2, :23] = mask[3, 17:] = mask[4, 1:] = 0
    close(ours.logits(tokens(5), mask), theirs(model, tokens(5), mask), mask)


@pytest.mark.parametrize("saved", ["olmo clipped", "llama grouped, own head_dim, llama3 rope"], indirect=True)
def test_scanned_layers_and_unpadded_rows(saved):
    model, ours, folder = saved
    scanned = load_model(folder, unroll=False)
    mask = np.ones((2, 24), np.int64)
    mask[1, :7] = 0
    reference = theirs(model, tokens(), mask)
    close(scanned.logits(tokens(), mask), reference, mask)
    # A row alone has the logits that it has behind padding, though its positions are others.
    close(ours.logits(tokens()[1:, 7:]), reference[1:, 7:])


def test_clip_matters():
    clipped, plain = (make(OlmoForCausalLM, OLMO | {"clip_qkv": c}) for c in (0.6, None))
    assert np.abs(theirs(clipped, tokens()) - theirs(plain, tokens())).max() > 0.1


def test_bfloat16_folder(tmp_path):
    make(LlamaForCausalLM, LLAMA).to(torch.bfloat16).save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(load_model(tmp_path).logits(tokens()), theirs(wide, tokens()))
    narrow = load_model(tmp_path, dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrow.params))
    weight = wide.model.layers[1].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(narrow.params["layers"]["mlp"]["up"]["weight"][1].astype(jnp.float32), weight)
    # bfloat16 arithmetic differs by its own rounding (8 bits), no more.
    reference = theirs(wide, tokens())
    difference = np.abs(np.asarray(narrow.logits(tokens())) - reference)
    assert difference.mean() < 0.02 * np.abs(reference).max()


@pytest.mark.parametrize(
    "rope",
    [None, {"type": "linear", "factor": 4.0}, {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}],
    ids=["theta", "linear", "llama3"],
)
def test_rope_keys_of_older_configs(tmp_path, rope):
    old = {"type": "default"} if rope is None else rope
    new = {"rope_type" if key == "type" else key: value for key, value in old.items()}
    model = make(LlamaForCausalLM, LLAMA | {"rope_parameters": new | {"rope_theta": 700.0}})
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 700.0, "rope_scaling": rope}))
    close(load_model(tmp_path).logits(tokens()), theirs(model, tokens()))


def test_the_command_that_converts_pickled_weights_works(tmp_path):
    model = make(OlmoForCausalLM, OLMO)
    model.config.architectures = ["OlmoForCausalLM"]
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    train_tokenizer(["some words"], 258).save_pretrained(tmp_path / "old")
    with pytest.raises(UserError, match="pickled weights only") as caught:
        load_model(tmp_path / "old")
    command = str(caught.value).split("convert them once: ")[1]
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    exec(code)
    ours = load_model(tmp_path / "old-safetensors")
    assert ours.tokenizer("words")["input_ids"]
    close(ours.logits(tokens()), theirs(model, tokens()))


@pytest.mark.slow
def test_olmo_1b_at_full_width(tmp_path):
    config = OlmoConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1, num_attention_heads=16,
        max_position_embeddings=4096, clip_qkv=8.0, tie_word_embeddings=False, eos_token_id=50279, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OlmoForCausalLM(config).eval()
    model.model.layers[0].self_attn.q_proj.weight.data *= 5  # so that clipping at 8 happens
    queries = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, o: queries.append(o.abs().max()))
    ids = np.random.default_rng(0).integers(0, 50304, (1, 16))
    reference = theirs(model, ids)
    assert queries[0] > 9
    hook.remove()
    model.save_pretrained(tmp_path, max_shard_size="500MB")
    del model
    gc.collect()
    ours = load_model(tmp_path)
    shutil.rmtree(tmp_path)  # 1 GB; the arrays do not need the files any more
    assert sum(leaf.size for leaf in jax.tree.leaves(ours.params)) == 273_154_048
    close(ours.logits(ids), reference)


def test_our_folder_loads_in_transformers(saved, tmp_path):
    model, ours, _ = saved
    save_model(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert type(back) is type(model) and back.dtype == torch.float32
    np.testing.assert_array_equal(theirs(back, tokens()), theirs(model, tokens()))
    again = load_model(tmp_path / "ours")
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


# Taps, on one model of each family.

SITES = ("attention", "mlp", "hidden")
tapped = pytest.mark.parametrize("saved", ["olmo clipped", "llama tied, one key head, eps"], indirect=True)


def run_tapped(ours, taps):
    out = ours.model.forward(ours.params, None, jnp.asarray(tokens(), jnp.int32), taps=taps)
    logits = jnp.einsum("btd,vd->btv", out.hidden, ours.model.head(ours.params), precision="highest")
    return logits, out.taps


def site_module(model, layer, site):
    block = model.model.layers[layer]
    return {"attention": block.self_attn, "mlp": block.mlp, "hidden": block}[site]


def first(output):
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def hooked(model, sites, hook):
    """`hook(site, layer, activation)` returns the activation to go on with."""

    def adapted(site, i):
        def call(module, args, out):
            new = hook(site, i, first(out))
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return call

    handles = [
        site_module(model, i, site).register_forward_hook(adapted(site, i))
        for site in sites
        for i in range(model.config.num_hidden_layers)
    ]
    yield
    for handle in handles:
        handle.remove()


@tapped
def test_reading_equals_a_forward_hook(saved):
    model, ours, _ = saved
    seen = {}

    def keep(site, i, x):
        seen[site, i] = x.detach().numpy()
        return x

    with hooked(model, SITES, keep):
        reference = theirs(model, tokens())
    logits, read = run_tapped(ours, Taps(read=SITES))
    close(logits, reference)
    for site in SITES:
        stacked = np.stack([seen[site, i] for i in range(model.config.num_hidden_layers)])
        assert np.abs(stacked).max() > 0.5
        np.testing.assert_allclose(read[site], stacked, atol=1e-4, rtol=0)


@tapped
def test_replacing_equals_a_forward_hook(saved):
    model, ours, _ = saved
    shape = (model.config.num_hidden_layers, 2, 24, model.config.hidden_size)
    rng = np.random.default_rng(1)
    where = {site: rng.random(shape[:3]) < 0.2 for site in SITES}
    value = {site: rng.normal(size=shape).astype(np.float32) for site in SITES}
    with hooked(
        model, SITES, lambda s, i, x: torch.where(torch.tensor(where[s][i])[..., None], torch.tensor(value[s][i]), x)
    ):
        reference = theirs(model, tokens())
    assert np.abs(reference - theirs(model, tokens())).max() > 0.1
    logits, _ = run_tapped(ours, Taps(replace={s: (jnp.asarray(where[s]), jnp.asarray(value[s])) for s in SITES}))
    close(logits, reference)


@tapped
def test_noise_on_embeddings_equals_a_forward_hook(saved):
    model, ours, _ = saved
    noise = np.random.default_rng(2).normal(size=(2, 24, model.config.hidden_size)).astype(np.float32)
    handle = model.model.embed_tokens.register_forward_hook(lambda m, args, out: out + torch.tensor(noise))
    reference = theirs(model, tokens())
    handle.remove()
    logits, _ = run_tapped(ours, Taps(embed_add=jnp.asarray(noise)))
    close(logits, reference)
