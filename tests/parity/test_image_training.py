"""Fine-tuning against torch: transformers' ResNet on the same weights and batches, with torch's own optimizers, losses
and schedules. Losses and weights after twelve updates within 2e-5 (float32); logits in the tangent space and of CLIP
under its head within 1e-4."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn
from torch.func import functional_call, jvp
from transformers import (
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    get_constant_schedule,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from tests.parity.test_classifiers import unusual
from unlearnjax.data.labelled import labelled
from unlearnjax.evaluation.images import Sheet, re_estimated
from unlearnjax.models.vision import net as vision
from unlearnjax.models.vision.checkpoint import checkpoint_name
from unlearnjax.models.vision.classifier import FAMILIES, load_classifier
from unlearnjax.models.vision.clip import names as clip_names
from unlearnjax.models.vision.clip_model import load_clip
from unlearnjax.models.vision.net import classifier_subject, clip_subject
from unlearnjax.training.images.fine_tune import batches, fine_tune, shuffled
from unlearnjax.training.images.settings import ImageCandidate

# Of torch's own, where torch.func.jvp imports it.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
PROCESSOR = f'{{"size": 16, "image_mean": {list(MEAN)}, "image_std": {list(STD)}}}'
ROWS, BATCH = 10, 4  # three updates an epoch, of 4, 4 and 2 rows
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
LABELS = RNG.integers(0, 3, 16).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    place = tmp_path_factory.mktemp("resnet")
    unusual(ResNetForImageClassification(config)).save_pretrained(place)
    (place / "preprocessor_config.json").write_text(PROCESSOR)
    return place


def theirs(folder):
    return ResNetForImageClassification.from_pretrained(folder).eval()


def prepared(pixels, mean=MEAN, std=STD):
    scaled = torch.from_numpy(pixels.astype(np.float32)) / 255
    return ((scaled - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def by_name(tree, config):
    """Our tree as {transformers' name: array}."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = FAMILIES["resnet"].names(config)
    return {checkpoint_name(tuple(key.key for key in path), names): np.asarray(leaf) for path, leaf in flat}


def pace_of(candidate, optimizer, updates):
    warm = candidate.warmup_updates
    return {
        "constant": lambda: get_constant_schedule(optimizer),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warm, updates),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warm, updates),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [updates // 2, 3 * updates // 4], 0.1),
    }[candidate.schedule]()


def train_torch(model, candidate, rows, *, optimizer="sgd", by_batch=False, only=""):
    """What a user of torch writes. `only`: the weights under that name alone are trained."""
    model.train(by_batch)
    own = [p for name, p in model.named_parameters() if name.startswith(only)]
    settings = {"lr": candidate.learning_rate, "weight_decay": candidate.weight_decay}
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(own, **settings)
    else:
        optimizer = torch.optim.SGD(own, momentum=candidate.momentum, **settings)
    plan = list(batches(candidate, shuffled(rows), BATCH))
    pace = pace_of(candidate, optimizer, len(plan))
    images, labels, losses, norms = prepared(PIXELS), torch.from_numpy(LABELS).long(), [], []
    for done, (chosen, weight) in enumerate(plan):
        kept = chosen[weight > 0]
        entropy = tnn.CrossEntropyLoss(label_smoothing=candidate.label_smoothing)
        loss = entropy(model(images[kept]).logits, labels[kept])
        losses.append(float(loss.detach()))
        magnitudes = sum(p.abs().sum() for p in model.parameters())
        objective = (-loss if candidate.ascend else loss) + candidate.l1 * (1 - done / len(plan)) * magnitudes
        model.zero_grad()
        objective.backward()
        norms.append(float(tnn.utils.clip_grad_norm_(own, candidate.max_grad_norm or float("inf"))))
        optimizer.step()
        pace.step()
    return losses, norms


BASE = ImageCandidate("base", learning_rate=0.05, weight_decay=0.02, epochs=4, schedule="constant", seed=3)
SGD = {
    "cosine, warm-up, smoothing, clipped": dataclasses.replace(
        BASE, schedule="cosine", warmup_updates=3, label_smoothing=0.1, max_grad_norm=2.0
    ),
    "linear, no momentum": dataclasses.replace(BASE, schedule="linear", warmup_updates=2, momentum=0.0),
    "steps": dataclasses.replace(BASE, schedule="steps"),
    "l1": dataclasses.replace(BASE, l1=2e-3),
    "ascend": dataclasses.replace(BASE, ascend=True, learning_rate=5e-3, max_grad_norm=1.2),
}


def check(subject, found, model, losses, close=2e-5):
    """The same losses and weights, which went somewhere."""
    np.testing.assert_allclose(found.losses, losses, atol=close, rtol=close)
    assert found.diverged_at is None and abs(losses[-1] - losses[0]) > 100 * close
    start, state = by_name(subject.trained, subject.model.config), model.state_dict()
    for name, leaf in by_name(found.trained, subject.model.config).items():
        np.testing.assert_allclose(leaf, state[name].numpy(), atol=close, rtol=close, err_msg=name)
    assert max(np.abs(state[name].numpy() - leaf).max() for name, leaf in start.items()) > 1000 * close


@pytest.mark.parametrize("kind", SGD)
def test_twelve_updates_of_sgd_equal_torch(folder, kind):
    subject, model = classifier_subject(load_classifier(folder)), theirs(folder)
    (found,) = fine_tune(subject, labelled(PIXELS[:ROWS], LABELS[:ROWS]), [SGD[kind]], batch_size=BATCH)
    losses, norms = train_torch(model, SGD[kind], ROWS)
    check(subject, found, model, losses)
    if SGD[kind].max_grad_norm:
        assert min(norms) < SGD[kind].max_grad_norm < max(norms)  # some were clipped, and some were not
    jax.tree.map(np.testing.assert_array_equal, found.fixed, dict(subject.fixed))


def test_twelve_updates_of_adamw_equal_torch(folder):
    subject, model = classifier_subject(load_classifier(folder)), theirs(folder)
    candidate = dataclasses.replace(SGD["cosine, warm-up, smoothing, clipped"], learning_rate=1e-2, weight_decay=0.1)
    data = labelled(PIXELS[:ROWS], LABELS[:ROWS])
    (found,) = fine_tune(subject, data, [candidate], optimizer="adamw", batch_size=BATCH)
    losses, _ = train_torch(model, candidate, ROWS, optimizer="adamw")
    check(subject, found, model, losses)


def test_batch_statistics_while_training_equal_torch(folder):
    """Also the running ones, whose variance is the unbiased one. All batches are full: rows that only fill the last
    one of an epoch would count in its statistics."""
    subject, model = classifier_subject(load_classifier(folder)), theirs(folder)
    candidate = dataclasses.replace(BASE, epochs=3)
    (found,) = fine_tune(subject, labelled(PIXELS, LABELS), [candidate], batch_size=BATCH, batch_norm="batch")
    losses, _ = train_torch(model, candidate, len(LABELS), by_batch=True)
    check(subject, found, model, losses)
    state, before = model.state_dict(), by_name(subject.fixed["statistics"], subject.model.config)
    for name, leaf in by_name(found.fixed["statistics"], subject.model.config).items():
        np.testing.assert_allclose(leaf, state[name].numpy(), atol=2e-5, rtol=2e-5, err_msg=name)
        assert np.abs(leaf - before[name]).max() > 0.01


def test_a_mask_equals_training_only_some_weights(folder):
    """Also for the gradient's norm, which is that of what is trained."""
    subject, model = classifier_subject(load_classifier(folder)), theirs(folder)
    candidate = dataclasses.replace(BASE, max_grad_norm=0.3)
    mask = jax.tree.map(jnp.zeros_like, subject.trained)
    mask["classifier"] = jax.tree.map(jnp.ones_like, mask["classifier"])
    data = labelled(PIXELS[:ROWS], LABELS[:ROWS])
    (found,) = fine_tune(subject, data, [candidate], batch_size=BATCH, masks=[mask])
    losses, norms = train_torch(model, candidate, ROWS, only="classifier")
    assert max(norms) > 0.3
    check(subject, found, model, losses)


def test_the_tangent_space_equals_torchs(folder):
    """f(start) + J (weights - start) by torch's forward mode, at the weights of a fine-tune in that space."""
    subject = classifier_subject(load_classifier(folder)).linearised()
    (found,) = fine_tune(subject, labelled(PIXELS, LABELS), [BASE], batch_size=8)
    model = theirs(folder)
    start = {name: p.detach() for name, p in model.named_parameters()}
    delta = by_name(found.delta(subject.trained), subject.model.config)
    direction = {name: torch.from_numpy(delta[name].copy()) for name in start}
    run = lambda weights: functional_call(model, weights, (prepared(PIXELS),)).logits  # noqa: E731
    at_start, change = jvp(run, (start,), (direction,))
    assert change.abs().max() > 0.1
    pixels = jnp.asarray(PIXELS, jnp.float32)
    ours, _ = jax.jit(subject.net.logits)(found.trained, subject.fixed, pixels)
    np.testing.assert_allclose(ours, at_start + change, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("running_mean", [0.1, 1e4])
def test_statistics_are_estimated_anew_as_torch_does_without_a_momentum(folder, running_mean):
    """However far the old ones are from the new. 14 rows in batches of 4: the last 2 are left out."""
    subject, model = classifier_subject(load_classifier(folder)), theirs(folder)
    for module in model.modules():
        if isinstance(module, tnn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative: the mean over batches
    model.train()
    with torch.no_grad():
        for begin in range(0, 12, 4):
            model(prepared(PIXELS[begin : begin + 4]))
    fixed = jax.tree.map(lambda x: jnp.full_like(x, running_mean), subject.fixed)
    found = re_estimated(subject.net, subject.trained, Sheet(labelled(PIXELS[:14], LABELS[:14]), fixed), batch=4)
    state = model.state_dict()
    for name, leaf in by_name(found["statistics"], subject.model.config).items():
        np.testing.assert_allclose(leaf, state[name].numpy(), atol=1e-5, rtol=1e-5, err_msg=name)


CLASSES, TEMPLATES = ("cat", "a dog", "the ship"), ("a photo of a {}.", "{}!", "one {} here")


def tokens(texts, padding, return_tensors):
    """A stand-in for CLIP's tokenizer: a token a word, padded with the end token."""
    rows = [[1, *(3 + sum(word.encode()) % 45 for word in text.split()), 49] for text in texts]
    longest = max(map(len, rows))
    return {"input_ids": np.array([row + [49] * (longest - len(row)) for row in rows])}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"hidden_size": 16, "intermediate_size": 24, "image_size": 16, "patch_size": 8, **sizes}
    text = {"hidden_size": 16, "intermediate_size": 20, "vocab_size": 50, "max_position_embeddings": 12,
            "eos_token_id": 49, "bos_token_id": 1, **sizes}  # fmt: skip
    config = CLIPConfig(vision_config=image, text_config=text, projection_dim=10, attn_implementation="eager")
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    place = tmp_path_factory.mktemp("clip")
    model.save_pretrained(place)
    return model, dataclasses.replace(load_clip(place), tokenizer=tokens)


class ZeroShot(tnn.Module):
    """CLIP as a classifier, written as the papers' code has it: one class after the other."""

    def __init__(self, clip):
        super().__init__()
        self.clip, rows = clip, []
        for label in CLASSES:
            ids = torch.from_numpy(tokens([t.format(label) for t in TEMPLATES], True, "np")["input_ids"])
            read = clip.get_text_features(ids).pooler_output
            mean = (read / read.norm(dim=-1, keepdim=True)).mean(dim=0)
            rows.append(mean / mean.norm())
        self.head = (torch.stack(rows) * clip.logit_scale.exp()).detach()

    def forward(self, images):
        return self.logits(self.clip.get_image_features(images).pooler_output)

    def logits(self, seen):
        return seen / seen.norm(dim=-1, keepdim=True) @ self.head.T


class ImageSide(tnn.Module):
    """CLIP's image features."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip

    def forward(self, images):
        return self.clip.get_image_features(images).pooler_output


@pytest.mark.parametrize("at_once", [1000, 4])
def test_zero_shot_logits_equal_transformers(clip, monkeypatch, at_once):
    model, ours = clip
    monkeypatch.setattr(vision, "TEXTS", at_once)  # nine texts
    subject = clip_subject(ours, CLASSES, TEMPLATES)
    assert subject.labels == CLASSES and set(subject.trained) == {"vision", "visual_projection"}
    with torch.no_grad():
        expected = ZeroShot(model)(prepared(PIXELS, ours.mean, ours.std))
    assert expected.std(dim=0).min() > 0.05  # the images differ
    found, _ = jax.jit(subject.net.logits)(subject.trained, subject.fixed, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_clips_tangent_space_equals_torchs(clip):
    """The image features are linearised; they are normalised and classified after that."""
    model, ours = clip
    subject = clip_subject(ours, CLASSES, TEMPLATES).linearised()
    (found,) = fine_tune(subject, labelled(PIXELS, LABELS), [dataclasses.replace(BASE, epochs=1)], batch_size=8)
    flat = jax.tree_util.tree_flatten_with_path(found.delta(subject.trained))[0]
    names, direction = clip_names(ours.config), {}
    for path, leaf in flat:
        name = checkpoint_name(tuple(key.key for key in path), names)
        direction[name] = torch.from_numpy(leaf.copy())
    weights = dict(model.named_parameters())
    start = {name: weights[name].detach() for name in direction}
    images = prepared(PIXELS, ours.mean, ours.std)

    def features(weights):
        return functional_call(ImageSide(model), {f"clip.{k}": w for k, w in weights.items()}, (images,))

    at_start, change = jvp(features, (start,), (direction,))
    assert change.abs().max() > 0.1
    with torch.no_grad():
        expected = ZeroShot(model).logits(at_start + change)
    logits, _ = jax.jit(subject.net.logits)(found.trained, subject.fixed, jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
