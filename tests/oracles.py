"""NumPy float64 oracles: the plainest possible statement of each formula, one section per package."""

from collections.abc import Callable, Sequence

import numpy as np

# ---------------------------------------------------------------- qwen_eqx


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def rotate(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Each pair (x[i], x[i + half]) is a complex number turned by position * theta^(-2i / d_head)."""
    half = len(x) // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def pattern(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """One head's attention weights, causal: [seq, d_head] each in, [seq, seq] out."""
    weights = np.zeros((len(q), len(k)))
    for i in range(len(q)):
        scores = k[: i + 1] @ q[i] / np.sqrt(q.shape[1])
        weights[i, : i + 1] = np.exp(scores - scores.max())
    return weights / weights.sum(axis=1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head, causal: [seq, d_head] each."""
    return pattern(q, k) @ v


def decoder(
    model, tokens: Sequence[int], edit: Callable[[int, str, np.ndarray], np.ndarray] = lambda layer, kind, x: x
) -> tuple[np.ndarray, dict[tuple[int, str], np.ndarray]]:
    """Logits of a Qwen2 or Qwen3 decoder after each token, and what stood at every (layer, kind of site).

    `edit(layer, kind, x)` says what goes on from there.
    """
    config, sites = model.config, {}

    def array(leaf) -> np.ndarray:
        return np.asarray(leaf).astype(np.float64)

    def site(layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        sites[layer, kind] = edit(layer, kind, x)
        return sites[layer, kind]

    def linear(part, x: np.ndarray) -> np.ndarray:
        return x @ array(part.weight).T + (0 if part.bias is None else array(part.bias))

    def heads(x: np.ndarray, norm) -> list[np.ndarray]:
        """Normed where the model norms, and rotated."""
        parts = np.split(x, x.shape[1] // config.d_head, axis=1)
        if norm is not None:
            parts = [rms_norm(part, array(norm.weight), config.norm_eps) for part in parts]
        return [np.stack([rotate(row, p, config.rope_theta) for p, row in enumerate(part)]) for part in parts]

    def norm(layer: int, name: str, part, x: np.ndarray) -> np.ndarray:
        scale = site(layer, f"{name}_scale", np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps))
        return site(layer, f"{name}_normalized", x / scale) * array(part.weight)

    def mixed(layer: int, block, z: np.ndarray) -> np.ndarray:
        """What attention adds: the sum over heads of each one's result."""
        weight = array(block.attn.o.weight).T.reshape(config.heads, config.d_head, -1)
        each = np.einsum("shd,hdo->sho", z.reshape(len(z), config.heads, -1), weight)
        return site(layer, "result", each.reshape(len(z), -1)).reshape(each.shape).sum(axis=1)

    x = site(0, "embed", array(model.embed.table)[list(tokens)])
    for layer, block in enumerate(model.blocks):
        x = site(layer, "resid_pre", x)
        normed = norm(layer, "ln1", block.attn_norm, x)
        q = heads(site(layer, "q", linear(block.attn.q, normed)), block.attn.q_norm)
        k = heads(site(layer, "k", linear(block.attn.k, normed)), block.attn.k_norm)
        v = np.split(site(layer, "v", linear(block.attn.v, normed)), config.kv_heads, axis=1)
        group = config.heads // config.kv_heads
        patterns = np.stack([pattern(q[head], k[head // group]) for head in range(config.heads)])
        z = [each @ v[head // group] for head, each in enumerate(site(layer, "pattern", patterns))]
        x = x + site(layer, "attn_out", mixed(layer, block, site(layer, "z", np.concatenate(z, axis=1))))
        x = site(layer, "resid_mid", x)
        normed = site(layer, "mlp_in", norm(layer, "ln2", block.mlp_norm, x))
        hidden = silu(linear(block.mlp.gate, normed)) * linear(block.mlp.up, normed)
        x = x + site(layer, "mlp_out", linear(block.mlp.down, site(layer, "mlp_post", hidden)))
        x = site(layer, "resid_post", x)
    head = model.embed.table if config.tied else model.head.weight
    return norm(0, "final", model.norm, x) @ array(head).T, sites


def frozen_decoder(
    model, tokens: Sequence[int], skip: Callable[[int, np.ndarray], np.ndarray] = lambda layer, mid: np.zeros_like(mid)
):
    """(embed, written) -> (x_mid of every block, the stream after the last), patterns and norm scales held, and both inputs.

    `skip(layer, x_mid)` is added to what is written there: it is not held.
    """
    config, (_, sites), seq = model.config, decoder(model, tokens), len(tokens)
    group = config.heads // config.kv_heads

    def array(leaf) -> np.ndarray:
        return np.asarray(leaf).astype(np.float64)

    def heads(x: np.ndarray, norm) -> list[np.ndarray]:
        parts = np.split(x, x.shape[1] // config.d_head, axis=1)
        if norm is not None:
            parts = [rms_norm(part, array(norm.weight), config.norm_eps) for part in parts]
        return [np.stack([rotate(row, p, config.rope_theta) for p, row in enumerate(part)]) for part in parts]

    def pattern(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        scores = np.where(np.tril(np.ones((seq, seq), bool)), q @ k.T / np.sqrt(config.d_head), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    scales, patterns = [], []
    for n, block in enumerate(model.blocks):
        scales.append(1 / np.sqrt((sites[n, "resid_pre"] ** 2).mean(axis=1) + config.norm_eps))
        q, k = heads(sites[n, "q"], block.attn.q_norm), heads(sites[n, "k"], block.attn.k_norm)
        patterns.append([pattern(q[head], k[head // group]) for head in range(config.heads)])

    def streams(embed: np.ndarray, written: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, found = embed, []
        for n, block in enumerate(model.blocks):
            v = (x * scales[n][:, None] * array(block.attn_norm.weight)) @ array(block.attn.v.weight).T
            v = v if block.attn.v.bias is None else v + array(block.attn.v.bias)
            apart = np.split(v, config.kv_heads, axis=1)
            z = np.concatenate([patterns[n][head] @ apart[head // group] for head in range(config.heads)], axis=1)
            found.append(x + z @ array(block.attn.o.weight).T)
            x = found[-1] + written[n] + skip(n, found[-1])
        return np.stack(found), x

    embed = array(model.embed.table)[list(tokens)]
    return streams, embed, np.stack([sites[n, "mlp_out"] for n in range(config.layers)])


def nucleus(probs: np.ndarray, p: float) -> np.ndarray:
    """The most probable tokens that together first reach p, and any as probable as the last of them; [vocab] booleans."""
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    return probs >= probs[order][before < p].min()


# ---------------------------------------------------------------- sae


def sae_metrics(y, z, y_hat, mean, dense_above=0.1):
    """What sae.metrics.summary states, one row at a time."""
    rows = len(y)
    y, y_hat, mean = (np.asarray(a, np.float64) for a in (y, y_hat, mean))
    error = sum(float(np.sum((a - b) ** 2)) for a, b in zip(y, y_hat, strict=True))
    variance = sum(float(np.sum((a - mean) ** 2)) for a in y)
    frequency = [sum(1 for row in z if row[j] > 0) / rows for j in range(z.shape[1])]
    length, length_hat = [float(np.sqrt(a @ a)) for a in y], [float(np.sqrt(b @ b)) for b in y_hat]
    return {
        "rows": rows,
        "fvu": error / variance,
        "explained_variance": 1 - error / variance,
        "l0": sum(int(np.count_nonzero(row > 0)) for row in z) / rows,
        "dead_fraction": sum(f == 0 for f in frequency) / len(frequency),
        "dense_fraction": sum(f > dense_above for f in frequency) / len(frequency),
        "cosine": sum(float(a @ b) / (n * m) for a, b, n, m in zip(y, y_hat, length, length_hat, strict=True)) / rows,
        "norm_ratio": sum(m / n for n, m in zip(length, length_hat, strict=True)) / rows,
    }


def recovered(clean, spliced, zero, labels):
    """Cross-entropy and KL recovered from three tables of float64 logits."""

    def log_softmax(table):
        return table - np.log(np.sum(np.exp(table), axis=-1, keepdims=True))

    p, q, r = (log_softmax(table) for table in (clean, spliced, zero))
    ce, ce_sae, ce_zero = (-np.mean([row[label] for row, label in zip(t, labels, strict=True)]) for t in (p, q, r))
    kl_sae, kl_zero = (np.mean(np.sum(np.exp(p) * (p - t), axis=-1)) for t in (q, r))
    return {
        "ce": ce,
        "ce_sae": ce_sae,
        "ce_zero": ce_zero,
        "ce_recovered": (ce_zero - ce_sae) / (ce_zero - ce),
        "kl_sae": kl_sae,
        "kl_zero": kl_zero,
        "kl_recovered": 1 - kl_sae / kl_zero,
    }
