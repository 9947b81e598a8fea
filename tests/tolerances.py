"""The one table of tolerances. A tolerance is never loosened to make a test pass."""

# ---------------------------------------------------------------- qwen_eqx
LOGITS_F32 = {"rtol": 1e-4, "atol": 1e-4}  # float32 logits against Hugging Face or the float64 oracle

# ---------------------------------------------------------------- sae
CONVERTED = {"rtol": 1e-5, "atol": 1e-5}  # an SAE of another library: encode and decode against its own
METRIC = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums and differences of reconstructions against float64
