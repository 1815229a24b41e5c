"""The convolution's derivatives against XLA's own, in both modes, for the shapes that ResNets and patches have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.models.vision.convolution import convolve

# inputs, outputs, height, width, size, stride, padding
SHAPES = [
    (3, 4, 8, 8, 3, 1, 1), (4, 6, 8, 6, 3, 2, 1), (4, 6, 7, 9, 3, 2, 1), (3, 4, 16, 16, 7, 2, 3), (4, 6, 8, 8, 1, 2, 0),
    (4, 6, 5, 5, 1, 1, 0), (3, 5, 8, 8, 4, 4, 0), (3, 5, 6, 6, 3, 1, 0),
]  # fmt: skip


def xla(images, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_derivatives_are_xlas(shape):
    inputs, outputs, height, width, size, stride, padding = shape
    keys = jax.random.split(jax.random.key(0), 5)
    images = jax.random.normal(keys[0], (2, height, width, inputs))
    kernel = jax.random.normal(keys[1], (outputs, inputs, size, size))
    changes = jax.random.normal(keys[2], images.shape), jax.random.normal(keys[3], kernel.shape)

    def everything(convolution, images, kernel, changes):
        run = lambda x, w: convolution(x, w, stride, padding)  # noqa: E731
        out, change = jax.jvp(run, (images, kernel), changes)
        back = jax.vjp(run, images, kernel)[1](jax.random.normal(keys[4], out.shape))
        # The gradient of a directional derivative: what training in the tangent space takes.
        tangent = lambda dw: jnp.sum(jnp.sin(jax.jvp(lambda w: run(images, w), (kernel,), (dw,))[1]))  # noqa: E731
        return out, change, back, jax.grad(tangent)(changes[1])

    ours, theirs = (jax.jit(everything, static_argnums=0)(f, images, kernel, changes) for f in (convolve, xla))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_mapped_over_kernels():
    keys = jax.random.split(jax.random.key(1), 2)
    images, kernels = jax.random.normal(keys[0], (2, 6, 6, 3)), jax.random.normal(keys[1], (3, 4, 3, 3, 3))
    gradient = jax.grad(lambda kernel: jnp.sum(jnp.square(convolve(images, kernel, 1, 1))))
    alone = jnp.stack([gradient(kernel) for kernel in kernels])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(kernels), alone, rtol=1e-5, atol=1e-4)
