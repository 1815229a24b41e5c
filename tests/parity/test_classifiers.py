"""ResNet and Swin against transformers on folders that it wrote, VGG against torch: logits within 1e-4 (float32)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn
from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

from unlearnjax.errors import UserError
from unlearnjax.models.vision import resnet, swin, vgg
from unlearnjax.models.vision.checkpoint import checkpoint_name
from unlearnjax.models.vision.classifier import (
    FAMILIES,
    forward,
    load_classifier,
    new_classifier,
    save_classifier,
)

LABELS = tuple("abcde")
PROCESSOR = '{"size": {"height": 64, "width": 64}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
KINDS = {
    "basic": {"layer_type": "basic", "hidden_sizes": [8, 16, 24], "depths": [2, 1, 2]},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [16, 32], "depths": [2, 2]},
    "stride early": {
        "layer_type": "bottleneck", "hidden_sizes": [16, 32], "depths": [1, 2], "downsample_in_first_stage": True,
        "downsample_in_bottleneck": True,
    },
}  # fmt: skip


def unusual(model):
    """Normalisations that do something."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, tnn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model


def theirs(kind):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, num_labels=5, **KINDS[kind])
    config.id2label = dict(enumerate(LABELS))
    return unusual(ResNetForImageClassification(config)).eval()


def images(size=64, batch=3):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    model = theirs(request.param)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(PROCESSOR)
    return model, load_classifier(tmp_path / "theirs"), tmp_path


def test_resnet_logits_equal_transformers(pair):
    model, ours, _ = pair
    assert ours.labels == LABELS and ours.image_size == 64 and ours.mean == (0.5,) * 3
    x = images()
    with torch.no_grad():
        expected = model(channels_first(x)).logits.numpy()
    np.testing.assert_allclose(ours.logits(x), expected, atol=1e-4, rtol=1e-4)


def test_resnet_statistics_by_batch_equal_torch(pair):
    model, ours, _ = pair
    x = images()
    model.train()
    with torch.no_grad():
        expected = model(channels_first(x)).logits.numpy()
    logits, moved = forward(ours.family, ours.config, ours.params, ours.statistics, jnp.asarray(x), by_batch=True)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    names, state = FAMILIES["resnet"].names(ours.config), model.state_dict()
    for path, leaf in jax.tree_util.tree_flatten_with_path(moved)[0]:
        name = checkpoint_name(tuple(key.key for key in path), names)
        np.testing.assert_allclose(leaf, state[name].numpy(), atol=1e-5, rtol=1e-5)


def test_resnet_gradients_equal_torch(pair):
    model, ours, _ = pair
    x, labels = images(), np.array([0, 3, 1])
    loss = tnn.functional.cross_entropy(model(channels_first(x)).logits, torch.from_numpy(labels))
    loss.backward()

    def own(params):
        logits, _ = forward(ours.family, ours.config, params, ours.statistics, jnp.asarray(x))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], axis=1))

    value, gradient = jax.value_and_grad(own)(ours.params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    grads, names = dict(model.named_parameters()), FAMILIES["resnet"].names(ours.config)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        name = checkpoint_name(tuple(key.key for key in path), names)
        np.testing.assert_allclose(leaf, grads[name].grad.numpy(), atol=2e-4, rtol=1e-3)


def test_what_is_saved_transformers_loads(pair):
    model, ours, tmp_path = pair
    save_classifier(ours, tmp_path / "ours")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "ours").eval()
    x = channels_first(images())
    with torch.no_grad():
        assert torch.equal(again(x).logits, model.eval()(x).logits)
    assert again.config.id2label == dict(enumerate(LABELS))


SWINS = {
    "shifted": {"image_size": 32, "patch_size": 2, "window_size": 4, "depths": [2, 2], "num_heads": [2, 4]},
    "padded": {"image_size": 42, "patch_size": 4, "window_size": 3, "depths": [2, 1, 2], "num_heads": [1, 2, 4],
               "qkv_bias": False, "mlp_ratio": 2.0, "layer_norm_eps": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("kind", SWINS)
def test_swin_logits_equal_transformers_both_ways(tmp_path, kind):
    torch.manual_seed(0)
    config = SwinConfig(embed_dim=8, num_labels=5, **SWINS[kind])
    config.id2label = dict(enumerate(LABELS))
    model = SwinForImageClassification(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(PROCESSOR.replace("64", str(config.image_size)))
    ours = load_classifier(tmp_path / "theirs")
    x = images(config.image_size)
    with torch.no_grad():
        expected = model(channels_first(x)).logits
    np.testing.assert_allclose(ours.logits(x), expected, atol=1e-4, rtol=1e-4)
    save_classifier(ours, tmp_path / "ours")
    again = SwinForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(channels_first(x)).logits, expected)


def test_a_swin_whose_window_does_not_fit_is_refused():
    with pytest.raises(UserError, match="stage 2 has 2x2 places, fewer than its window of 3"):
        swin.from_json({"image_size": 30, "patch_size": 4, "window_size": 3, "depths": [1] * 3}, 5, "config.json")
    with pytest.raises(UserError, match="use_absolute_embeddings"):
        swin.from_json({"use_absolute_embeddings": True}, 5, "config.json")


class TorchVGG(tnn.Module):
    def __init__(self, stages, hidden, pooled, classes):
        super().__init__()
        layers, inputs = [], 3
        for stage in stages:
            for width in stage:
                layers += [tnn.Conv2d(inputs, width, 3, padding=1), tnn.BatchNorm2d(width), tnn.ReLU()]
                inputs = width
            layers.append(tnn.MaxPool2d(2))
        self.features, self.pool = tnn.Sequential(*layers), tnn.AdaptiveAvgPool2d(pooled)
        inputs *= pooled**2
        head = []
        for width in hidden:
            head += [tnn.Linear(inputs, width), tnn.ReLU(), tnn.Dropout()]
            inputs = width
        last = tnn.Linear(inputs, classes)
        self.classifier = tnn.Sequential(*head, last) if hidden else last

    def forward(self, x):
        return self.classifier(self.pool(self.features(x)).flatten(1))


@pytest.mark.parametrize(("hidden", "pooled"), [((), 1), ((12, 10), 3)])
def test_vgg_logits_equal_a_torch_rendering(tmp_path, hidden, pooled):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    stages = ((4, 4), (8,), (8, 12))
    model = unusual(TorchVGG(stages, hidden, pooled, 5)).eval()
    config = vgg.VGGConfig(5, stages=stages, hidden=hidden, pooled=pooled)
    save_classifier(new_classifier("vgg", config, LABELS, 40, jax.random.key(0)), tmp_path / "vgg")
    save_file(model.state_dict(), tmp_path / "vgg" / "model.safetensors")
    ours = load_classifier(tmp_path / "vgg")
    assert ours.config == config
    x = images(40)
    with torch.no_grad():
        expected = model(channels_first(x)).numpy()
    np.testing.assert_allclose(ours.logits(x), expected, atol=1e-4, rtol=1e-4)


def test_the_cifar_stem_keeps_the_resolution(tmp_path):
    config = dataclasses.replace(resnet.resnet18(5), embedding=8, widths=(8, 16), depths=(1, 1))
    model = new_classifier("resnet", config, LABELS, 32, jax.random.key(0))
    save_classifier(model, tmp_path / "out")
    again = load_classifier(tmp_path / "out")
    assert again.config == config
    x = images(32)
    np.testing.assert_array_equal(again.logits(x), model.logits(x))
    block = FAMILIES["resnet"].module(config)
    tree = {"params": model.params, "statistics": model.statistics}
    _, seen = block.apply(tree, jnp.asarray(x), capture_intermediates=True)
    assert seen["intermediates"]["embedder"]["__call__"][0].shape == (3, 32, 32, 8)


def test_folders_that_do_not_fit_are_refused(pair):
    _, _, tmp_path = pair
    folder = tmp_path / "theirs"
    text = (folder / "config.json").read_text()
    for change, word in (
        (lambda t: t.replace('"relu"', '"gelu"'), "hidden_act is 'gelu'"),
        (lambda t: t.replace('"resnet"', '"levit"'), "model_type is 'levit'"),
        (lambda t: t.replace('"num_channels": 3', '"num_channels": 1'), "is .* and config.json wants"),
        (lambda t: t.replace('"depths": [\n    ', '"depths": [\n    1'), "is missing"),
        (lambda t: t.replace('"0": "a"', '"7": "a"'), "id2label"),
    ):
        assert change(text) != text
        (folder / "config.json").write_text(change(text))
        with pytest.raises(UserError, match=word):
            load_classifier(folder)
    (folder / "config.json").write_text(text)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: missing"):
        load_classifier(folder)
