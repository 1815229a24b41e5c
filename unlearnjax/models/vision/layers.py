"""What image models are made of: convolutions, batch normalisation, pooling. Images: [batch, height, width, channels].

Kernels keep torch's orientation [out, in, height, width], as checkpoints hold them. BatchNorm's running statistics are
a collection of their own ("statistics"), never among the parameters: they are not trained, merged or negated.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unlearnjax.models.vision.convolution import convolve

MOMENTUM = 0.1  # torch's: the weight of the newest batch
EPSILON = 1e-5
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Conv(nn.Module):
    """A convolution with the same padding on all sides."""

    features: int
    size: int
    stride: int = 1
    padding: int | None = None  # None: size // 2
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 features"]:
        inputs = x.shape[-1]
        # He's initialisation by fan out, as torchvision's ResNet and VGG have it.
        scale = (2.0 / (self.features * self.size**2)) ** 0.5
        shape = (self.features, inputs, self.size, self.size)
        weight = self.param("weight", nn.initializers.normal(scale), shape, jnp.float32)
        pad = self.size // 2 if self.padding is None else self.padding
        out = convolve(x, weight.astype(x.dtype), self.stride, pad)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            out = out + bias.astype(out.dtype)[None, None, None]
        return out


class BatchNorm(nn.Module):
    """Batch normalisation as torch computes it.

    With `by_batch` the batch's own mean and variance normalise, and the running ones move towards them (the variance
    with n - 1 in its divisor); else the running ones do, and stay.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], by_batch: bool) -> Float[Array, "batch h w c"]:
        size = x.shape[-1]
        scale = self.param("weight", nn.initializers.ones, (size,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (size,), jnp.float32)
        mean = self.variable("statistics", "running_mean", jnp.zeros, (size,), jnp.float32)
        variance = self.variable("statistics", "running_var", jnp.ones, (size,), jnp.float32)
        centre, spread = mean.value, variance.value
        if by_batch:
            wide = x.astype(jnp.float32)
            axes = (0, 1, 2)
            centre = jnp.mean(wide, axis=axes)
            spread = jnp.mean(jnp.square(wide - centre[None, None, None]), axis=axes)
            if not self.is_initializing():
                count = x.size // size
                unbiased = spread * (count / max(count - 1, 1))
                mean.value = (1 - MOMENTUM) * mean.value + MOMENTUM * centre
                variance.value = (1 - MOMENTUM) * variance.value + MOMENTUM * unbiased
        factor = scale * jax.lax.rsqrt(spread + EPSILON)
        shift = bias - centre * factor
        return x * factor.astype(x.dtype)[None, None, None] + shift.astype(x.dtype)[None, None, None]


class Linear(nn.Module):
    """x @ weight.T + bias, with torch's orientation [out, in]."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... features"]:
        inputs = x.shape[-1]
        weight = self.param("weight", nn.initializers.normal(inputs**-0.5), (self.features, inputs), jnp.float32)
        out = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
        if not self.bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return out + bias.astype(x.dtype)[(None,) * (x.ndim - 1)]


class LayerNorm(nn.Module):
    """Over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        width = x.shape[-1]
        scale = self.param("weight", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.epsilon)
        lead = (None,) * (x.ndim - 1)
        return (normed * scale[lead] + bias[lead]).astype(x.dtype)


def max_pool(x: Float[Array, "batch h w c"], size: int, stride: int, padding: int = 0) -> Float[Array, "batch h2 w2 c"]:
    """The largest of each window."""
    return nn.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)


def average_pool(x: Float[Array, "batch h w c"], out: int = 1) -> Float[Array, "batch out out c"]:
    """torch's AdaptiveAvgPool2d: means over an out x out grid of (overlapping, where it does not divide) windows."""
    for axis in (1, 2):
        size = x.shape[axis]
        edges: Sequence[tuple[int, int]] = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
        windows = [jnp.mean(jax.lax.slice_in_dim(x, a, b, axis=axis), axis=axis, keepdims=True) for a, b in edges]
        x = jnp.concatenate(windows, axis=axis)
    return x
