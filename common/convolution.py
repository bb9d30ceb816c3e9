"""Convolutions that are fast on a CPU too, measured in docs/lab_notes.md."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def on_cpu() -> bool:  # asked when a function is traced: --help need not start a GPU
    return jax.default_backend() == "cpu"


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str, **others: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for flax's `nn.Conv`: [n, height, width, c] by [3, 3, c,
    features], equal strides, padding "VALID".

    On a CPU as matrix products: XLA's gradient of a convolution takes far longer there
    (docs/lab_notes.md).
    """
    if on_cpu():
        return _matrix_products(x, kernel, strides[0])
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **others)


@partial(jax.checkpoint, static_argnums=2)  # windows are cut again rather than kept
def _matrix_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    rows, columns = ((size - 3) // stride + 1 for size in x.shape[-3:-1])

    def every(x: jax.Array, axis: int, start: int, count: int) -> jax.Array:
        return jax.lax.slice_in_dim(x, start, start + stride * (count - 1) + 1, stride, axis)

    windows = jnp.concatenate([every(x, -2, j, columns) for j in range(3)], -1)
    width, features = windows.shape[-1], kernel.shape[-1]
    output = sum(
        every(windows, -3, i, rows).reshape(-1, width) @ kernel[i].reshape(width, features)
        for i in range(3)
    )
    return output.reshape(*x.shape[:-3], rows, columns, features)


def few_at_a_time(encoder: Callable[[jax.Array], jax.Array], pictures: jax.Array) -> jax.Array:
    """`encoder(pictures)`; on a CPU four at a time, so that what it computes stays in the cache."""
    return jax.lax.map(encoder, pictures, batch_size=4) if on_cpu() else encoder(pictures)
