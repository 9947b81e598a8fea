"""What stands in an attribution graph: features, errors, tokens and logits, and what they are called."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from qwen_lab.errors import InputError

FEATURE, ERROR, TOKEN, LOGIT = range(4)
KINDS = ("feature", "error", "token", "logit")


@dataclasses.dataclass(frozen=True)
class Features:
    """The latents that fire, in the order of layer, position and latent."""

    layer: Int[np.ndarray, " features"]
    position: Int[np.ndarray, " features"]
    latent: Int[np.ndarray, " features"]
    value: Float[np.ndarray, " features"]

    def __len__(self) -> int:
        return len(self.layer)


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Features, errors, tokens and logits, in this order; what a kind does not have is 0.

    reading = Σ weights of edges in + left_out + bias: of a feature its value before the nonlinearity, of a logit the
    logit less the mean of all.
    """

    kind: Int[np.ndarray, " nodes"]  # number in KINDS
    layer: Int[np.ndarray, " nodes"]  # −1 for tokens, the number of blocks for logits
    position: Int[np.ndarray, " nodes"]
    index: Int[np.ndarray, " nodes"]  # latent, −1 for errors, token id
    activation: Float[np.ndarray, " nodes"]  # of a feature
    probability: Float[np.ndarray, " nodes"]  # of a logit
    reading: Float[np.ndarray, " nodes"]  # of a feature or logit: what its edges add up to
    bias: Float[np.ndarray, " nodes"]  # the part of it that is constant
    left_out: Float[np.ndarray, " nodes"]  # the part of it that features outside the graph add
    influence: Float[np.ndarray, " nodes"]  # on the logits, by paths of any length
    cumulative: Float[np.ndarray, " nodes"]  # share of all influence of this node and those above it

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, chosen: Bool[np.ndarray, " nodes"] | Int[np.ndarray, " chosen"]) -> "Nodes":
        return Nodes(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    @property
    def ids(self) -> list[str]:
        """Neuronpedia's names: L_f_p, L_-1_p for errors, E_id_p for tokens, {blocks + 1}_id_p for logits."""
        names = zip(self.kind, self.layer, self.index, self.position, strict=True)
        return [
            f"{'E' if kind == TOKEN else layer + 1 if kind == LOGIT else layer}_{index}_{position}"
            for kind, layer, index, position in names
        ]

    def find(self, name: str) -> int:
        """The number of the node of this name."""
        try:
            return self.ids.index(name)
        except ValueError:
            raise InputError(f"node: found {name!r}, expected one of the graph's, such as {self.ids[0]!r}") from None
