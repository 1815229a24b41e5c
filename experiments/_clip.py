"""The small CLIP of the experiments: trained from scratch on captioned classes of several data sets."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from tokenizers.processors import Sequence as OneAfterAnother
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from unlearnjax.data.augment import Strength, augment
from unlearnjax.data.bpe import MINIMUM_VOCABULARY, train_tokenizer
from unlearnjax.data.images import Images
from unlearnjax.data.labelled import Labelled, labelled
from unlearnjax.models.vision.clip import CLIP, CLIPConfig, Tower, normed
from unlearnjax.models.vision.clip_model import MEAN, STD, ClipModel, new_clip

MERGES = 200  # of the tokenizer, at most: the captions hold some forty words
LARGEST_SCALE = 100.0  # of the logits, as CLIP bounds it
CROP_PADDING = 2  # pixels; no flips, since a mirrored digit is none


class Captioned(NamedTuple):
    """A data set with the texts that its classes' names are put into."""

    images: Images
    templates: tuple[str, ...]


class Captions(NamedTuple):
    """All texts of all classes, class by class; classes are numbered over all data sets.

    tokens: [texts, n], padded. first, count: where a class's texts begin, and how many it has.
    """

    tokens: Int[np.ndarray, "texts n"]
    first: Int[np.ndarray, " classes"]
    count: Int[np.ndarray, " classes"]


class Batch(NamedTuple):
    """Rows of the data, and the text of each."""

    rows: Int[Array, " batch"]
    texts: Int[Array, " batch"]


def train_clip(sets: Sequence[Captioned], *, epochs: int, batch: int, learning_rate: float, seed: int) -> ClipModel:
    """Train a CLIP of 0.4M weights (images 32x32 RGB) on all rows of the sets together: see `contrastive`.

    AdamW with decay 0.05 of matrices, gradient norm clipped at 1, a cosine to 0 after a tenth of the updates as warmup.
    Images are cropped at random (2 pixels of padding); an image's text is drawn anew from its class's in every epoch.
    """
    texts = [_texts(one) for one in sets]
    tokenizer = _with_end(train_tokenizer([t for own in texts for t in own], MINIMUM_VOCABULARY + MERGES))
    captions = _captions(tokenizer, sets, texts)
    data = _together(sets)
    start = new_clip(_config(tokenizer, captions.tokens.shape[1]), jax.random.key(seed))
    per_epoch = len(data.labels) // batch
    updates = epochs * per_epoch
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, updates // 10, updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=0.05, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
    )
    tokens = jnp.asarray(captions.tokens)
    params, state = start.params, optimizer.init(start.params)
    bar = tqdm(_batches(data, captions, epochs, batch, seed), total=updates, desc="CLIP", dynamic_ncols=True)
    for number, own in enumerate(bar):
        key = jax.random.fold_in(jax.random.key(seed), number)
        params, state, loss = _step(start.config, optimizer, params, state, data, tokens, own, key)
        if number % per_epoch == 0:  # reading it waits for the device
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return ClipModel(params, start.config, tokenizer)


def contrastive(logits: Float[Array, "batch batch"], same: Bool[Array, "batch batch"]) -> Float[Array, ""]:
    """Symmetric InfoNCE in which all pairs of a class are positive (UniCL, 2204.03610).

    With s[i, j] = exp(logit_scale) cos(image i, text j), and P(i) the places of a batch whose class is i's: the mean of

        1/B sum_i 1/|P(i)| sum_{j in P(i)} -log softmax_j(s[i, :])_j    (which text an image has)
        1/B sum_j 1/|P(j)| sum_{i in P(j)} -log softmax_i(s[:, j])_i    (which image a text has)

    CLIP's own loss has P(i) = {i}: it would push an image away from the texts of its own class.

    Args:
      logits: s. same: whether place i's class is place j's; symmetric.
    """
    weight = same.astype(jnp.float32)
    share = weight / jnp.sum(weight, axis=1, keepdims=True)
    one_way = lambda s: -jnp.mean(jnp.sum(share * jax.nn.log_softmax(s, axis=1), axis=1))  # noqa: E731
    return (one_way(logits) + one_way(logits.T)) / 2


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(
    config: CLIPConfig, optimizer: optax.GradientTransformation, params: PyTree[Array], state: Any, data: Labelled,
    tokens: Int[Array, "texts n"], batch: Batch, key: Array,
) -> tuple[PyTree[Array], Any, Float[Array, ""]]:  # fmt: skip
    """One update, and the loss before it. Each text is encoded once, however many images of the batch have it."""
    none = jnp.zeros((), jnp.float32)
    strength = Strength(none, jnp.asarray(CROP_PADDING, jnp.int32), none, jnp.zeros((), jnp.int32), none)
    pixels = augment(key, data.pixels[batch.rows].astype(jnp.float32), strength, most_operations=0)
    images = (pixels / 255.0 - jnp.asarray(MEAN, jnp.float32)) / jnp.asarray(STD, jnp.float32)
    classes = data.labels[batch.rows]

    def loss(params: PyTree[Array]) -> Float[Array, ""]:
        model, own = CLIP(config), {"params": params}
        seen = normed(model.apply(own, images, method="image_features"))
        read = normed(model.apply(own, tokens, method="text_features"))[batch.texts]
        logits = jnp.exp(params["logit_scale"]) * jnp.einsum("id,td->it", seen, read)
        return contrastive(logits, classes[:, None] == classes[None, :])

    value, gradient = jax.value_and_grad(loss)(params)
    change, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, change)
    bounded = jnp.minimum(params["logit_scale"], np.log(LARGEST_SCALE))
    return {**params, "logit_scale": bounded}, state, value


def _texts(one: Captioned) -> list[str]:
    """Class by class."""
    return [template.replace("{}", name) for name in one.images.names for template in one.templates]


def _with_end(tokenizer: Any) -> Any:
    """The tokenizer with the end token behind every text: CLIP takes the text's feature there."""
    end, backend = tokenizer.eos_token, tokenizer.backend_tokenizer
    ending = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    backend.post_processor = OneAfterAnother([backend.post_processor, ending])
    return tokenizer


def _config(tokenizer: Any, positions: int) -> CLIPConfig:
    image = Tower(96, 384, 3, 4, "quick_gelu", 1e-5)
    text = Tower(64, 256, 2, 4, "quick_gelu", 1e-5)
    return CLIPConfig(image, text, 64, 32, 4, 3, len(tokenizer), positions, tokenizer.eos_token_id)


def _captions(tokenizer: Any, sets: Sequence[Captioned], texts: Sequence[list[str]]) -> Captions:
    found = tokenizer([t for own in texts for t in own], padding=True, return_tensors="np")["input_ids"]
    count = np.concatenate([np.full(len(one.images.names), len(one.templates)) for one in sets])
    return Captions(found.astype(np.int32), np.cumsum(count) - count, count)


def _together(sets: Sequence[Captioned]) -> Labelled:
    """All rows, with classes numbered on from set to set."""
    offsets = np.cumsum([0, *(len(one.images.names) for one in sets)])
    labels = [one.images.labels + offset for one, offset in zip(sets, offsets[:-1], strict=True)]
    return labelled(np.concatenate([one.images.pixels for one in sets]), np.concatenate(labels))


def _batches(data: Labelled, captions: Captions, epochs: int, size: int, seed: int) -> Iterator[Batch]:
    """Every epoch in an order of its own; rows that do not fill a batch wait for another epoch."""
    labels = np.asarray(data.labels)
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(labels.size)
        texts = captions.first[labels] + rng.integers(captions.count[labels])
        for begin in range(0, labels.size - size + 1, size):
            own = order[begin : begin + size]
            yield Batch(jnp.asarray(own, jnp.int32), jnp.asarray(texts[own], jnp.int32))
