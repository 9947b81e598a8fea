"""NumPy float64 oracles: the plainest possible statement of each formula, one section per package."""

import numpy as np

# ---------------------------------------------------------------- qwen_eqx

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
