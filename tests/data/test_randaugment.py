"""RandAugment's operations against Pillow's, and its arguments against timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from unlearnjax.data.randaugment import OPERATIONS, apply_operation, operation_argument

FILL = (200, 10, 255)
apply_jitted = jax.jit(apply_operation)


def smooth(height, width, channels):
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 120 * np.sin(x / 5 + y / 9 + c) for c in range(channels)], axis=-1).astype(np.uint8)


def images():
    rng = np.random.default_rng(0)
    few = rng.choice(np.array([3, 90, 200], np.uint8), (32, 32, 3), p=[0.2, 0.1, 0.7])  # Equalize clips at 255
    constant = rng.integers(0, 256, (32, 32, 3), np.uint8)
    constant[..., 1] = 77
    return {
        "random": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "narrow": rng.integers(30, 140, (32, 32, 3), np.uint8),
        "smooth": smooth(32, 32, 3),
        "few values": few,
        "a constant channel": constant,
        "grey": rng.integers(20, 190, (19, 27, 1), np.uint8),
        "grey, smooth": smooth(19, 27, 1),
        "two rows": rng.integers(0, 256, (2, 9, 3), np.uint8),
    }


IMAGES = images()
each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


def ours(image, name, argument=0.0):
    place = jnp.int32(OPERATIONS.index(name))
    fill = jnp.array(FILL[: image.shape[-1]], jnp.float32)
    out = apply_jitted(jnp.asarray(image, jnp.float32), place, jnp.float32(argument), fill)
    assert out.dtype == jnp.float32
    return np.asarray(out)


def pillow(image, function):
    grey = image.shape[-1] == 1
    out = function(Image.fromarray(image[..., 0] if grey else image))
    return np.asarray(out, np.float32).reshape(image.shape)


def solarize_add(x, added):
    return x.point([min(v + added, 255) if v < 128 else v for v in range(256)] * len(x.getbands()))


@each_image
@pytest.mark.parametrize(
    ("name", "argument", "function"),
    [
        ("Equalize", 0, ImageOps.equalize),
        ("Invert", 0, ImageOps.invert),
        *(("Posterize", bits, lambda x, bits=bits: ImageOps.posterize(x, bits)) for bits in (1, 2, 3, 4)),
        *(("Solarize", t, lambda x, t=t: ImageOps.solarize(x, t)) for t in (0, 1, 77, 128, 255, 256)),
        *(("SolarizeAdd", a, lambda x, a=a: solarize_add(x, a)) for a in (0, 33, 110)),
        *(("Brightness", f, lambda x, f=f: ImageEnhance.Brightness(x).enhance(f)) for f in (0.1, 0.437, 1, 1.318, 1.9)),
    ],
)  # fmt: skip
def test_equal_to_pillow(image, name, argument, function):
    np.testing.assert_array_equal(ours(image, name, argument), pillow(image, function))


@each_image
def test_autocontrast_is_pillows_but_for_its_rounding(image):
    low, high = (f(image.astype(np.float32), axis=(0, 1)) for f in (np.min, np.max))
    found, theirs = ours(image, "AutoContrast"), pillow(image, ImageOps.autocontrast)
    whole = (image - low) * 255 % np.maximum(high - low, 1) == 0  # where Pillow may fall just short
    np.testing.assert_array_equal(found[~whole], theirs[~whole])
    assert set(np.unique(found - theirs)) <= {0, 1}
    varied = high > low
    np.testing.assert_array_equal(found.min((0, 1))[varied], 0)
    np.testing.assert_array_equal(found.max((0, 1))[varied], 255)
    np.testing.assert_array_equal(found[..., ~varied], image[..., ~varied])


def test_autocontrast_of_the_whole_range_is_pillows():
    image = IMAGES["random"].copy()
    image[image == 0] = 1
    image[0, :2] = [[1], [255]]  # a range of 254: 255 times less than it is no multiple of it
    found = ours(image, "AutoContrast")
    assert (found != image).any()
    np.testing.assert_array_equal(found, pillow(image, ImageOps.autocontrast))


@each_image
def test_posterize_to_no_bits_is_black(image):
    assert not ours(image, "Posterize", 0).any()


@each_image
@pytest.mark.parametrize("name", ["Color", "Contrast", "Sharpness"])
@pytest.mark.parametrize("factor", [0.1, 0.437, 1, 1.318, 1.9])
def test_blends_are_pillows(image, name, factor):
    """Both truncate a float32, ours perhaps after a fused multiply-add: one less or more where it is near whole."""
    difference = np.abs(
        ours(image, name, factor) - pillow(image, lambda x: getattr(ImageEnhance, name)(x).enhance(factor))
    )
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


HALVES = (1.5 / 32, -1.5 / 32)  # of 32 pixels: some come from exactly the image's edge


def fill(x):
    return FILL if x.mode == "RGB" else FILL[0]


def affine(x, *matrix):
    return x.transform(x.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill(x))


@each_image
@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("Rotate", lambda x, a: x.rotate(a, Image.Resampling.BILINEAR, fillcolor=fill(x)), (0, 3.1, -17.3, 30, -30)),
        ("ShearX", lambda x, a: affine(x, 1, a, 0, 0, 1, 0), (0, 0.137, -0.211, 0.3)),
        ("ShearY", lambda x, a: affine(x, 1, 0, 0, a, 1, 0), (0, 0.137, -0.211, 0.3)),
        ("TranslateXRel", lambda x, a: affine(x, 1, 0, a * x.width, 0, 1, 0), (0, 0.0731, -0.2113, 0.45, *HALVES)),
        ("TranslateYRel", lambda x, a: affine(x, 1, 0, 0, 0, 1, a * x.height), (0, 0.0731, -0.2113, 0.45, *HALVES)),
    ],
)
def test_affine_operations_are_pillows(image, name, function, arguments):
    """Pillow interpolates in float64 and truncates: float32 is one off where that is near a whole number (0.3 of a
    pixel between values ten apart, say). What lies outside the image is the same pixels."""
    for argument in arguments:
        found, theirs = ours(image, name, argument), pillow(image, lambda x, a=argument: function(x, a))
        difference = np.abs(found - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() <= 0.03
        colour = np.array(FILL[: image.shape[-1]], np.float32)
        np.testing.assert_array_equal((found == colour).all(-1), (theirs == colour).all(-1))


@each_image
def test_none_of_the_operations(image):
    out = apply_jitted(jnp.asarray(image, jnp.float32), jnp.int32(-1), jnp.float32(7), jnp.zeros(image.shape[-1]))
    np.testing.assert_array_equal(out, image)


# timm 1.0.31, LEVEL_TO_ARG, the signs drawn as positive.
TIMM = {
    "Rotate": {0: 0, 1: 3, 7.3: 21.9, 10: 30},
    "Posterize": {0: 0, 2.4: 0, 2.5: 1, 7.3: 2, 7.5: 3, 10: 4},
    "Solarize": {0: 0, 1: 25, 5: 128, 7.3: 186, 10: 256},
    "SolarizeAdd": {0: 0, 1: 11, 3: 33, 7: 77, 7.3: 80, 10: 110},
    "Color": {0: 0.1, 5: 1.0, 7.3: 1.414, 10: 1.9},
    "Contrast": {0: 0.1, 5: 1.0, 7.3: 1.414, 10: 1.9},
    "Brightness": {0: 0.1, 5: 1.0, 7.3: 1.414, 10: 1.9},
    "Sharpness": {0: 0.1, 5: 1.0, 7.3: 1.414, 10: 1.9},
    "ShearX": {0: 0, 7.3: 0.219, 10: 0.3},
    "ShearY": {0: 0, 7.3: 0.219, 10: 0.3},
    "TranslateXRel": {0: 0, 7.3: 0.3285, 10: 0.45},
    "TranslateYRel": {0: 0, 7.3: 0.3285, 10: 0.45},
}
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


@pytest.mark.parametrize("name", TIMM)
def test_arguments_are_timms(name):
    place = jnp.int32(OPERATIONS.index(name))
    for level, want in TIMM[name].items():
        for negative in (False, True):
            found = operation_argument(place, jnp.float32(level), jnp.bool_(negative))
            sign = -1 if negative and name in SIGNED else 1
            np.testing.assert_allclose(found, sign * want, rtol=1e-6, atol=1e-7)


def test_blends_at_level_five_are_the_identity():
    assert operation_argument(jnp.int32(OPERATIONS.index("Color")), jnp.float32(5), jnp.bool_(False)) == 1
