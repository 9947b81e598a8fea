"""The one table of tolerances. A tolerance is never loosened to make a test pass."""

# ---------------------------------------------------------------- qwen_eqx
LOGITS_F32 = {"rtol": 1e-4, "atol": 1e-4}  # float32 logits against Hugging Face or the float64 oracle
SAME_F32 = {"rtol": 2e-5, "atol": 2e-5}  # the same float32 sums in another order: other batch, bucket, chunk or slots
BF16_ROW = 2**-5  # |error| / |row| of a bf16 pass against float64: a few dozen roundings of 2^-9 each

# ---------------------------------------------------------------- sae
CONVERTED = {"rtol": 1e-5, "atol": 1e-5}  # an SAE of another library: encode and decode against its own
METRIC = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums and differences of reconstructions against float64
