"""Places are spelled two ways, and a wrong one is refused with those that exist."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
import tiny
from qwen_eqx import Capture, InputError, Qwen, QwenConfig, Site
from qwen_eqx.model.sites import D_MODEL_KINDS, FINAL_KINDS, KINDS, OUTER, OUTER_SITES, Recorder, Tap

CONFIG = tiny.CONFIGS["qwen2"]


@given(config=strategies.configs(), kind=st.sampled_from(list(KINDS)), data=st.data())
def test_every_spelling_reads_back(config: QwenConfig, kind: str, data: st.DataObject):
    site = Site(data.draw(st.integers(0, config.layers - 1)), kind)
    assert Site.parse(str(site), config) == site
    assert Site.parse(site, config) == site
    module = KINDS[kind][1]
    if module is not None:
        assert Site.parse(f"model.layers.{site.layer}.{module}".rstrip("."), config) == site


def test_the_contract_s_spellings():
    assert (
        Site.parse("blocks.1.hook_resid_post", CONFIG) == Site.parse("model.layers.1", CONFIG) == Site(1, "resid_post")
    )
    assert str(Site(1, "q")) == "blocks.1.attn.hook_q"
    assert str(Site(0, "mlp_post")) == "blocks.0.mlp.hook_post"


def traced(tap: Tap):
    """A pass with this tap, without a calculation."""

    def passed(model: Qwen, tokens: jax.Array) -> jax.Array:
        x, _ = model.forward(tokens, jnp.zeros(1, jnp.int32), tap=tap)
        return model.logits(x, tap)

    eqx.filter_eval_shape(passed, tiny.model(), jnp.arange(3)[None])


def test_sites_sort_as_the_model_computes_them():
    """And so do the kinds of one block, as listed: what a tap meets, in order."""
    met = []
    every = [Site(layer, kind) for layer in range(CONFIG.layers) for kind in KINDS]
    tap = Recorder(every, lambda site, x: met.append(site) or x)
    traced(tap)
    assert met == [OUTER_SITES[0], *every, *OUTER_SITES[1:]]
    assert met == sorted(set(met)) == sorted(set(met), key=lambda site: site.depth)
    assert Site(0, "resid_post") < Site(1, "resid_pre") <= Site(1, "resid_pre") < Site(1, "attn_out")


def test_what_is_dear_is_made_only_if_asked_for():
    met = []
    traced(lambda site, x: met.append(site.kind) or x)
    assert {*KINDS, *OUTER} - set(met) == {"pattern", "result"}


def test_the_spellings_of_what_no_block_holds():
    for site, (name, module) in zip(OUTER_SITES, OUTER.values(), strict=True):
        assert Site.parse(name, CONFIG) == Site.parse(module or name, CONFIG) == site
        assert str(site) == name
    assert Site.parse("blocks.1.mlp.hook_out", CONFIG) == Site(1, "mlp_out")  # circuit-tracer's name for it
    assert Capture(sites=["hook_embed", "blocks.0.mlp.hook_in"]).resolve(CONFIG) == (OUTER_SITES[0], Site(0, "mlp_in"))
    for kind in FINAL_KINDS:
        with pytest.raises(InputError, match="run_with_capture"):
            Capture(sites=[Site(0, kind)]).resolve(CONFIG)


UNKNOWN = [
    "", "blocks", "blocks.0", "blocks.0.hook_resid", "blocks.2.hook_resid_post", "blocks.-1.hook_resid_post",
    "blocks.0.hook_resid_post ", "blocks.0.hook_resid_post\n", "blocks.00000000000000000000.hook_resid_post",
    "blocks.1e0.hook_resid_post", "Blocks.0.hook_resid_post", "model.layers.2", "model.layers.0.", "model.layers.0.foo",
    "model.layers.0.self_attn.o_proj", "layers.0", "resid_post", "blocks.٠.attn.hook_nothing",
    "model.norm", "blocks.0.hook_embed", Site(1, "embed"), Site(2, "q"), Site(-1, "q"), Site(0, "nothing"),
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN, ids=repr)
def test_an_unknown_site_is_refused_in_one_line(name: str | Site):
    with pytest.raises(InputError) as caught:
        Site.parse(name, CONFIG)
    assert "does not exist" in str(caught.value)
    assert "blocks.0 … blocks.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_capture_keeps_the_order_asked_for():
    capture = Capture(layers=[1, 0], sites=["blocks.1.hook_attn_out", "model.layers.0.mlp"])
    assert capture.resolve(CONFIG) == (
        Site(1, "resid_post"), Site(0, "resid_post"), Site(1, "attn_out"), Site(0, "mlp_out"),
    )  # fmt: skip
    assert Capture(layers=range(2)).resolve(CONFIG) == (Site(0, "resid_post"), Site(1, "resid_post"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_d_model_wide_sites_are_captured(kind: str):
    capture = Capture(sites=[Site(0, kind)])
    if kind in D_MODEL_KINDS:
        assert capture.resolve(CONFIG) == (Site(0, kind),)
        return
    with pytest.raises(InputError, match=r"run_with_capture") as caught:
        capture.resolve(CONFIG)
    assert str(Site(0, kind).width(CONFIG)) in str(caught.value)


BAD_CAPTURES = {
    "nothing": (Capture(), "no site"),
    "an unknown layer": (Capture(layers=[2]), "blocks.2.hook_resid_post"),
    "a negative layer": (Capture(layers=[-1]), "blocks.-1.hook_resid_post"),
    "twice in one spelling": (Capture(layers=[0, 0]), "more than once"),
    "twice in two spellings": (Capture(layers=[0], sites=["model.layers.0"]), "more than once"),
    "another width": (Capture(sites=["model.layers.0.self_attn.q_proj"]), "24 wide"),
}


@pytest.mark.parametrize("name", BAD_CAPTURES)
def test_bad_captures_are_refused_in_one_line(name: str):
    capture, part = BAD_CAPTURES[name]
    with pytest.raises(InputError, match=part) as caught:
        capture.resolve(CONFIG)
    assert "\n" not in str(caught.value)
