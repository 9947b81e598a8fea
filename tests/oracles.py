"""NumPy float64 oracles: the plainest possible statement of each formula, one section per package."""

# ---------------------------------------------------------------- qwen_eqx

# ---------------------------------------------------------------- sae
