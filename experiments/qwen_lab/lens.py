"""The logit lens of directions, and tokens as they are read."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import qwen_eqx
import sae

PRINTED = [
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
]  # bytes that stand for themselves in byte-level BPE
BYTES = {chr(byte): byte for byte in PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(PRINTED)))
}


def lens_of(model: qwen_eqx.Qwen) -> Float[jax.Array, "d_model vocab"]:
    """The unembedding with the final norm's gain, in float32 as logits are."""
    head = model.embed.table if model.head is None else model.head.weight
    return (head.astype(jnp.float32) * model.norm.weight.astype(jnp.float32)[None]).T


def effects(
    model: qwen_eqx.Qwen, directions: Float[np.ndarray, "chosen d_out"]
) -> Float[np.ndarray, "chosen vocab"] | None:
    """What each direction adds to the logits by the lens; None where it is not of the stream's width."""
    lens = lens_of(model)
    return np.asarray(jnp.asarray(directions) @ lens) if directions.shape[1] == lens.shape[0] else None


def tokens_along(
    directions: Float[jax.Array, "chosen d_model"],
    lens: Float[jax.Array, "d_model vocab"],
    tokenizer: qwen_eqx.Tokenizer,
) -> list[list[tuple[str, float]]]:
    """The tokens that each direction promotes most, with their logits."""
    ids, logits = sae.promoted_tokens(directions, lens)
    text = {token: token_text(tokenizer, token) for token in np.unique(ids).tolist()}
    return [
        [(text[token], float(logit)) for token, logit in zip(row.tolist(), values, strict=True)]
        for row, values in zip(ids, logits, strict=True)
    ]


def token_text(tokenizer: qwen_eqx.Tokenizer, token: int) -> str:
    """A token's text; bytes that are no characters by themselves as \\xNN."""
    spelled = tokenizer.backend.id_to_token(token)
    if spelled is None or any(each not in BYTES for each in spelled):
        return tokenizer.decode([token])
    return bytes(BYTES[each] for each in spelled).decode("utf-8", "backslashreplace")
