"""RandAugment's fifteen operations on one image, chosen and parametrised by arrays.

RandAugment: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020. The
operations, their order and the arguments that a level maps to are timm's default set (`rand-mM-nN`, not "increasing"),
the arithmetic is Pillow's on its uint8 images; both differ between libraries.

Which operation an image gets is known on the device only, so a program that took one branch per operation would compute
all fifteen of every image. They share three forms: a table of 256 values per channel, a blend with a degenerate image,
and an affine transform. Each form is computed once, and is the identity where another was chosen.

Three differences from timm on Pillow, all deliberate:
- the affine operations interpolate bilinearly; timm draws bilinear or bicubic at random.
- AutoContrast maps the brightest value to 255 always. Of all (darkest, brightest, value) 0.4 % should map to a whole
  number that Pillow's float64 product falls just short of and truncates to the one below.
- Posterize may keep no bits (levels below 2.5) and gives black, as Pillow did before it began to refuse that.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
MAX_LEVEL = 10.0
_LUMA = (19595, 38470, 7471)  # ITU-R 601's red, green and blue in 1/65536, as Pillow rounds them


def operation_argument(
    operation: Int[Array, ""], level: Float[Array, ""], negative: Bool[Array, ""]
) -> Float[Array, ""]:
    """What an operation at a level is called with.

    Rotate: degrees, anticlockwise. Posterize: bits kept. Solarize: the threshold. SolarizeAdd: what is added.
    Color, Contrast, Brightness, Sharpness: the blend's factor. ShearX and ShearY: pixels per pixel. TranslateXRel and
    TranslateYRel: the share of the width or height. AutoContrast, Equalize and Invert take none (0).

    Args:
      operation: a place in OPERATIONS.
      level: 0 to MAX_LEVEL. More is stronger for the affine operations and SolarizeAdd, weaker for Posterize and
        Solarize; of the four blends, level 5 is the identity.
      negative: whether an affine operation goes the other way.
    """
    share = level / MAX_LEVEL
    signed = jnp.where(negative, -share, share)
    none = jnp.zeros_like(share)
    factor = 1.0 + 1.8 * (share - 0.5)  # exactly 1 at level 5
    return jnp.stack(
        [none, none, none, 30 * signed, jnp.floor(4 * share), jnp.floor(256 * share), jnp.floor(110 * share),
         factor, factor, factor, factor, 0.3 * signed, 0.3 * signed, 0.45 * signed, 0.45 * signed]
    )[operation]  # fmt: skip


def apply_operation(
    image: Float[Array, "h w c"], operation: Int[Array, ""], argument: Float[Array, ""], fill: Float[Array, " c"]
) -> Float[Array, "h w c"]:
    """One operation on one image.

    Args:
      image: whole numbers 0 to 255 in float32; 1 or 3 channels. So is what is returned.
      operation: a place in OPERATIONS, or -1 for none of them: the image as it is.
      argument: of that operation; see `operation_argument`.
      fill: the colour of what an affine operation moves in from outside the image.
    """
    image = _mapped(image, operation, argument)
    image = _blended(image, operation, argument)
    return _moved(image, operation, argument, fill)


def _is(operation: Int[Array, ""], name: str) -> Bool[Array, ""]:
    return operation == OPERATIONS.index(name)


def _mapped(
    image: Float[Array, "h w c"], operation: Int[Array, ""], argument: Float[Array, ""]
) -> Float[Array, "h w c"]:
    """Each value replaced by a table's: AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd.

    The histogram is a scatter and the look-up a gather: 2 and 1 ms on a CPU for 128 images of 32x32x3. As products of
    one-hot matrices (a value split into 16 x 16) they would suit a matrix unit, and took 46 and 73 ms.
    """
    height, width, channels = image.shape
    pixels = image.astype(jnp.int32)
    channel = jnp.arange(channels)[None, None]
    whole = argument.astype(jnp.int32)
    values = jnp.broadcast_to(jnp.arange(256), (channels, 256))

    lowest, highest = pixels.min((0, 1))[:, None], pixels.max((0, 1))[:, None]
    stretched = (values - lowest) * 255 // jnp.maximum(highest - lowest, 1)

    counts = jnp.zeros((channels, 256), jnp.int32).at[channel, pixels].add(1)
    step = (height * width - jnp.take_along_axis(counts, highest, axis=1)) // 255
    darker = jnp.cumsum(counts, axis=1) - counts
    equalized = jnp.minimum((step // 2 + darker) // jnp.maximum(step, 1), 255)

    tables = {
        "AutoContrast": jnp.where(highest > lowest, stretched, values),
        "Equalize": jnp.where(step > 0, equalized, values),
        "Invert": 255 - values,
        "Posterize": values >> (8 - whole) << (8 - whole),
        "Solarize": jnp.where(values < whole, values, 255 - values),
        "SolarizeAdd": jnp.where(values < 128, jnp.minimum(values + whole, 255), values),
    }
    table = values
    for name, candidate in tables.items():
        table = jnp.where(_is(operation, name), candidate, table)
    return table[channel, pixels].astype(image.dtype)


def _blended(
    image: Float[Array, "h w c"], operation: Int[Array, ""], argument: Float[Array, ""]
) -> Float[Array, "h w c"]:
    """Blended with, or moved away from, a degenerate image: Color, Contrast, Brightness, Sharpness."""
    luma = _luma(image)
    mean = (2 * luma.sum() + luma.size) // (2 * luma.size)  # rounded, halves up
    degenerates = {
        "Color": luma.astype(image.dtype)[..., None],
        "Contrast": mean.astype(image.dtype),
        "Brightness": jnp.zeros_like(argument),
        "Sharpness": _smoothed(image),
    }
    degenerate = image
    for name, candidate in degenerates.items():
        degenerate = jnp.where(_is(operation, name), candidate, degenerate)
    return jnp.floor(jnp.clip(degenerate + argument * (image - degenerate), 0, 255))


def _luma(image: Float[Array, "h w c"]) -> Int[Array, "h w"]:
    pixels = image.astype(jnp.int32)
    if pixels.shape[-1] == 1:
        return pixels[..., 0]
    return (jnp.sum(pixels * jnp.array(_LUMA)[None, None], axis=-1) + 32768) >> 16


def _smoothed(image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """The mean of 3 x 3 pixels, the centre counted five times, rounded; the outermost pixels stay."""
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set(jnp.floor((2 * total + 13) / 26))


def _moved(
    image: Float[Array, "h w c"], operation: Int[Array, ""], argument: Float[Array, ""], fill: Float[Array, " c"]
) -> Float[Array, "h w c"]:
    """Each pixel taken from another place, bilinearly: Rotate, ShearX, ShearY, TranslateXRel, TranslateYRel."""
    height, width, _ = image.shape

    def chosen(name: str) -> Float[Array, ""]:
        return jnp.where(_is(operation, name), argument, 0.0)

    # A pixel's coordinates are its middle's. Rotation is about the image's centre, shear about its top or left edge.
    x, y = jnp.arange(0.5, width)[None], jnp.arange(0.5, height)[:, None]
    right, down = x - width / 2, y - height / 2
    angle = jnp.radians(chosen("Rotate"))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    from_x = cos * right - sin * down + width / 2 + chosen("ShearX") * y + chosen("TranslateXRel") * width
    from_y = sin * right + cos * down + height / 2 + chosen("ShearY") * x + chosen("TranslateYRel") * height
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)

    left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
    across, along = (from_x - 0.5 - left)[..., None], (from_y - 0.5 - top)[..., None]
    column, row = left.astype(jnp.int32), top.astype(jnp.int32)

    def at(row: Int[Array, "h w"], column: Int[Array, "h w"]) -> Float[Array, "h w c"]:
        return image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]

    def between(first: Array, second: Array, share: Array) -> Array:
        return first + (second - first) * share  # exactly `first` where the two are equal

    upper, lower = (between(at(r, column), at(r, column + 1), across) for r in (row, row + 1))
    return jnp.where(inside[..., None], jnp.floor(between(upper, lower, along)), fill[None, None])
