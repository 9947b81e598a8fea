"""A dictionary with one latent held at a value: what an intervention puts in its place."""

import equinox as eqx
from jaxtyping import Array, Float, Int

from sae import shown
from sae.forms.abstract import AbstractDictionary


class Clamped(eqx.Module):
    """x -> decode(z(x) with z_latent = value) + beside(x)."""

    module: AbstractDictionary
    latent: Int[Array, ""]
    value: Float[Array, ""]

    def __repr__(self) -> str:
        return shown.by_field(self)

    def __call__(self, x: Float[Array, "*rows"]) -> Float[Array, "..."]:
        z = self.module.encode(x)
        return self.module.complete(z.at[..., self.latent].set(self.value), x)
