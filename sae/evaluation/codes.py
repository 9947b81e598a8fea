"""The latents of whole documents, on the host."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sae.forms.abstract import AbstractDictionary


def encoded(module: AbstractDictionary, x: Float[Array, "seq ..."]) -> Float[np.ndarray, "seq d_sae"]:
    """The latents at every position of one document; documents of about one length share a compilation."""
    room = _room(len(x))
    padded = jnp.pad(x, ((0, room - len(x)), *[(0, 0)] * (x.ndim - 1)))
    return np.asarray(_encode(module, padded))[: len(x)]


@eqx.filter_jit
def _encode(module: AbstractDictionary, x: Float[Array, "seq ..."]) -> Float[Array, "seq d_sae"]:
    return module.encode(x)


def _room(length: int) -> int:
    """16, 24, 32, 48, 64, …: the next one that is not below `length`."""
    power = 16
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power
