"""All hypothesis strategies, one section per package."""

from hypothesis import strategies as st

import sae

# ---------------------------------------------------------------- qwen_eqx

# ---------------------------------------------------------------- arc

# ---------------------------------------------------------------- sae


@st.composite
def manifest_fields(draw):
    """What sae.Manifest takes, for small stores: any dtype, one to three sites, at least one item."""
    return {
        "model_id": "m",
        "revision": draw(st.none() | st.just("main")),
        "config_digest": "sha256:0",
        "tokenizer_digest": "sha256:1",
        "sites": tuple(f"blocks.{layer}.hook_resid_post" for layer in range(draw(st.integers(1, 3)))),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "d_model": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 9)),
        "plan": sae.Plan(draw(st.integers(1, 9)), draw(st.integers(1, 10))),
        "config": {},
        "versions": {},
    }


def json_objects():
    """What run metadata may hold."""
    values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1e6, 1e6) | st.text(max_size=5)
    names = st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=5)
    return st.dictionaries(
        names,
        st.recursive(values, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=5),
        max_size=4,
    )
