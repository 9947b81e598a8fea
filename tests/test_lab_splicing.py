"""A dictionary in a model: with its error term it changes nothing, with a latent held it changes just that."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_eqx
import sae

X = jax.random.normal(jax.random.key(3), (1, 60, 6))
HEAD = jax.random.normal(jax.random.key(4), (6, 9))
ONE_SITE = [name for name, form in sae.FORMS.items() if not form.several_sites]


def make(form: str) -> sae.AbstractDictionary:
    extra = {"k": 3} if "k" in sae.FORMS[form].details else {}
    return sae.FORMS[form].init(d_model=6, d_sae=12, key=jax.random.key(0), **extra)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ONE_SITE)
def test_an_sae_with_its_error_term_changes_no_logit(form, dtype):
    module, x = make(form), X.astype(dtype)
    edit = qwen_eqx.Replace(module, error_of=module, site="blocks.0.hook_resid_post")
    positions = jnp.arange(60)[None]

    @jax.jit
    def head(site):
        return jax.nn.tanh(site) @ HEAD.astype(dtype)

    for splice in (edit.edited, eqx.filter_jit(edit.edited)):
        site = splice(x, positions)
        assert site.dtype == x.dtype
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (site, x)))
        np.testing.assert_array_equal(*(np.asarray(head(a), np.float32) for a in (site, x)))


@pytest.mark.parametrize("form", ["relu", "topk", "gated"])
def test_a_latent_that_is_held_moves_its_own_direction_alone(form):
    module = make(form)
    held = sae.Clamped(module, jnp.int32(3), jnp.float32(2))
    edit = qwen_eqx.Replace(held, error_of=module, site="blocks.0.hook_resid_post")
    moved = edit.edited(X, jnp.arange(60)[None]) - X
    change = 2 - module.encode(X)[..., 3]
    np.testing.assert_allclose(moved, change[..., None] * module.decoder[3][None, None], atol=1e-5)
