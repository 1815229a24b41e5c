"""CLIP against transformers on folders that it wrote: features and logits within 1e-4 (float32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from unlearnjax.errors import UserError
from unlearnjax.models.vision.clip import CLIP
from unlearnjax.models.vision.clip_model import load_clip, new_clip, save_clip

TOWERS = {
    "quick_gelu": {"hidden_act": "quick_gelu"},
    "gelu, old end": {"hidden_act": "gelu", "layer_norm_eps": 1e-4, "eos_token_id": 2},
}


@pytest.fixture(params=TOWERS)
def pair(request, tmp_path):
    torch.manual_seed(0)
    more = dict(TOWERS[request.param])
    end = more.pop("eos_token_id", 49)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, **more}
    image = {"hidden_size": 24, "intermediate_size": 40, "image_size": 32, "patch_size": 8, **sizes}
    text = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": 50, "max_position_embeddings": 12,
            "eos_token_id": end, "bos_token_id": 0, **sizes}  # fmt: skip
    model = CLIPModel(CLIPConfig(vision_config=image, text_config=text, projection_dim=10)).eval()
    for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "theirs")
    return model, load_clip(tmp_path / "theirs"), tmp_path


def inputs():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    tokens = rng.integers(3, 48, (4, 9))
    tokens[:, -1] = 49
    tokens[1, 5:] = 49  # padded with the end token, as CLIP's tokenizer does
    return images, tokens


def test_features_and_logits_equal_transformers(pair):
    model, ours, _ = pair
    images, tokens = inputs()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(tokens), pixel_values=pixels)
        seen = model.get_image_features(pixels).pooler_output
        read = model.get_text_features(torch.from_numpy(tokens)).pooler_output
    close = {"atol": 1e-4, "rtol": 1e-4}
    np.testing.assert_allclose(ours.image_features(images), seen, **close)
    np.testing.assert_allclose(ours.text_features(tokens), read, **close)
    logits = CLIP(ours.config).apply({"params": ours.params}, jnp.asarray(images), jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(logits, found.logits_per_image, **close)


def test_what_is_saved_transformers_loads(pair):
    model, ours, tmp_path = pair
    save_clip(ours, tmp_path / "ours")
    again = CLIPModel.from_pretrained(tmp_path / "ours").eval()
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    images, tokens = inputs()
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        whole = [m(input_ids=torch.from_numpy(tokens), pixel_values=pixels).logits_per_image for m in (model, again)]
    assert torch.equal(*whole)
    assert load_clip(tmp_path / "ours").config == ours.config


def test_bad_input_is_refused(pair):
    _, ours, tmp_path = pair
    with pytest.raises(UserError, match="at most 12"):
        ours.text_features(np.zeros((1, 13), np.int32))
    with pytest.raises(UserError, match=r"0\.\.49"):
        ours.text_features(np.full((1, 3), 50))
    config = tmp_path / "theirs" / "config.json"
    text = config.read_text()
    for change, word in (
        (lambda t: t.replace('"model_type": "clip"', '"model_type": "siglip"'), "model_type is 'siglip'"),
        (lambda t: t.replace('"hidden_act": "', '"hidden_act": "x'), "hidden_act is 'x"),
        (lambda t: t.replace('"patch_size": 8', '"patch_size": 16'), "config.json wants"),
    ):
        assert change(text) != text
        config.write_text(change(text))
        with pytest.raises(UserError, match=word):
            load_clip(tmp_path / "theirs")


def test_a_new_model_has_the_shapes(pair):
    _, ours, _ = pair
    fresh = new_clip(ours.config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh.params) == jax.tree.map(jnp.shape, ours.params)
