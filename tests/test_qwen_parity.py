"""The same numbers as live transformers: models both ways, tokenizers, chats, bfloat16 (CI runs this with torch pinned)."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_eqx
import strategies
import tolerances
from qwen_eqx.weights.hf import load_model, skeleton
from qwen_eqx.weights.hub import EMBEDDED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch and transformers say while loading is theirs to mend
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from golden import make, make_tokens

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
GOLDEN = Path(__file__).parent / "golden"
TINY = EMBEDDED / "tiny-random"
LENGTHS = (1, 2, 3, 17, 29)


def theirs(directory: Path, dtype="float32"):
    """The model as transformers opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids))[None]).logits[0].float().numpy()


def assert_same_numbers(model: qwen_eqx.Qwen, expected: dict[str, np.ndarray]) -> None:
    """Logits and every residual of one prompt."""
    last = model.config.layers - 1
    sites = ("blocks.0.hook_resid_pre", *(f"model.layers.{layer}" for layer in range(last + 1)))
    logits, acts = eqx.filter_jit(model.run_with_capture)(jnp.asarray(expected["ids"]), sites)
    np.testing.assert_allclose(logits, expected["logits"], **tolerances.LOGITS_F32)
    residuals = [acts[site] for site in sites[:-1]] + [model.norm(acts[sites[-1]])]
    for found, wanted in zip(residuals, expected["hidden"], strict=True):
        np.testing.assert_allclose(found, wanted, **tolerances.LOGITS_F32)


@pytest.mark.parametrize("name", make.CASES)
def test_a_directory_from_transformers(name: str, tmp_path: Path):
    make.write(name, make.build(name, seed=1), tmp_path)
    reference, model = theirs(tmp_path), load_model(tmp_path, dtype=jnp.float32)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, make.COMMON["vocab_size"], length) for length in LENGTHS]
    wanted = [make.expected(reference, row) for row in rows]
    for expected in wanted:
        assert_same_numbers(model, expected)
    out = qwen_eqx.generate(model, [row.tolist() for row in rows], max_new_tokens=make.NEW_TOKENS)
    np.testing.assert_array_equal(out.tokens, np.stack([expected["greedy"] for expected in wanted]))


@pytest.mark.parametrize("name", make.CASES)
def test_transformers_still_computes_the_golden_numbers(name: str):
    golden = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    reference = theirs(GOLDEN / name)
    for index, ids in enumerate(make.prompts(name)):
        np.testing.assert_array_equal(golden[f"{index}.ids"], ids)
        found = make.expected(reference, ids)
        np.testing.assert_array_equal(golden[f"{index}.greedy"], found["greedy"])
        np.testing.assert_allclose(golden[f"{index}.logits"], found["logits"], **tolerances.LOGITS_F32)


@given(config=strategies.configs(), shard=st.sampled_from([2000, 10**9]), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_a_directory_saved_here_opens_there(tmp_path_factory, config: qwen_eqx.QwenConfig, shard: int, seed: int):
    directory = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(seed)
    shapes = skeleton(config, jnp.dtype(jnp.float32))
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)
    qwen_eqx.save_pretrained(model, None, directory, max_shard_bytes=shard)
    opened, loading = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    ids = rng.integers(0, config.vocab, 9)
    np.testing.assert_allclose(model(jnp.asarray(ids)), their_logits(opened.eval(), ids), **tolerances.LOGITS_F32)


@pytest.mark.parametrize("name", ["tiny-arc", "tiny-random"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_embedded_models_saved_in_any_dtype(name: str, dtype: str, tmp_path: Path):
    model, tokenizer = qwen_eqx.from_pretrained(name, dtype=dtype)
    qwen_eqx.save_pretrained(model, tokenizer, tmp_path)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "### Input 123"}], add_generation_prompt=True)
    wide = load_model(tmp_path, dtype=jnp.float32)
    np.testing.assert_allclose(wide(jnp.asarray(ids)), their_logits(theirs(tmp_path), ids), **tolerances.LOGITS_F32)
    assert theirs(tmp_path, dtype).dtype == getattr(torch, dtype)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened("### Input 123<|im_end|>").input_ids == tokenizer.encode("### Input 123<|im_end|>")


def test_transformers_saves_it_back_for_us(tmp_path: Path):
    """There and back again: what transformers writes after opening ours is ours."""
    theirs(TINY, "bfloat16").save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    (ours, tokenizer), (back, opened) = (qwen_eqx.from_pretrained(name) for name in ("tiny-random", tmp_path))
    assert back.config == ours.config
    for found, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    messages = [{"role": "user", "content": "1 + 1 = "}]
    assert opened.apply_chat_template(messages, True) == tokenizer.apply_chat_template(messages, True)
    assert opened.pad_id == tokenizer.pad_id
    assert set(opened.eos_ids) == set(tokenizer.eos_ids)


@pytest.mark.parametrize("name", ["tiny-arc", "tiny-random"])
def test_greedy_tokens_of_the_embedded_models(name: str):
    model, tokenizer = qwen_eqx.from_pretrained(name, dtype=jnp.float32)
    reference = theirs(EMBEDDED / name)
    texts = ["### Input\n\n```grid shape: 2x2\n1 00\n2 00\n```", "Hello", "You will be given a task. " * 8]
    rows = [tokenizer.encode(text) for text in texts]
    out = qwen_eqx.generate(model, rows, max_new_tokens=40)
    for row, tokens in zip(rows, np.asarray(out.tokens), strict=True):
        given_ids = torch.tensor(row)[None]
        with torch.no_grad():
            wanted = reference.generate(
                given_ids,
                attention_mask=torch.ones_like(given_ids),
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
            )
        np.testing.assert_array_equal(tokens, wanted[0, len(row) :].numpy())


def test_bfloat16_is_no_further_from_float32_than_transformers_is():
    """Rounding differs between two right programs, so each is held to float32: over all cases, ours errs no more."""
    ours, others = [], []
    for name in make.CASES:
        exact, rounded = theirs(GOLDEN / name), theirs(GOLDEN / name, "bfloat16")
        model = eqx.filter_jit(load_model(GOLDEN / name, dtype=jnp.bfloat16))
        for ids in make.prompts(name):
            truth = their_logits(exact, ids)
            scale = np.sqrt(np.mean(truth**2))
            ours.append(np.sqrt(np.mean((np.asarray(model(jnp.asarray(ids))) - truth) ** 2)) / scale)
            others.append(np.sqrt(np.mean((their_logits(rounded, ids) - truth) ** 2)) / scale)
    print(f"relative error of the logits in bfloat16: ours {np.mean(ours):.4f}, transformers' {np.mean(others):.4f}")
    assert np.mean(ours) <= np.mean(others)
    assert np.max(ours) < 0.05


@cache
def both_tokenizers(name: str):
    directory = make_tokens.DIRECTORIES[name]
    if not directory.exists():
        pytest.skip(f"{name}'s tokenizer files are not here")
    return qwen_eqx.Tokenizer.from_directory(directory), transformers.AutoTokenizer.from_pretrained(directory)


PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "```grid", " ", "\n\n", "12", "it's", "é", "e\u0301"]
)
TEXT = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=8).map("".join)


@pytest.mark.parametrize("name", make_tokens.DIRECTORIES)
@given(text=TEXT)
@settings(max_examples=100)
def test_tokenizers_agree(name: str, text: str):
    ours, reference = both_tokenizers(name)
    ids = ours.encode(text)
    assert ids == reference(text).input_ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT})


@pytest.mark.parametrize("name", make_tokens.DIRECTORIES)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4), prompt=st.booleans())
@settings(max_examples=50)
def test_chats_agree(name: str, messages: list[dict[str, str]], prompt: bool):
    ours, reference = both_tokenizers(name)
    shown = reference.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert ours.render_chat(messages, add_generation_prompt=prompt) == shown


@pytest.mark.parametrize("name", make_tokens.DIRECTORIES)
def test_transformers_still_gives_the_golden_tokens(name: str):
    both_tokenizers(name)
    golden = json.loads((GOLDEN / "tokens.json").read_text())
    assert make_tokens.golden(make_tokens.DIRECTORIES[name]) == golden[name]


def test_tools_in_qwens_own_template():
    ours, reference = both_tokenizers("qwen2.5")
    arguments = {"type": "object", "properties": {"x": {"type": "number", "description": "<é> & 'so'"}}}
    tools = [{"type": "function", "function": {"name": "square", "parameters": arguments}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "square", "arguments": {"x": 2}}}]}
    messages = [{"role": "user", "content": "2 squared?"}, call, {"role": "tool", "content": "4"}]
    shown = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert ours.render_chat(messages, add_generation_prompt=True, tools=tools) == shown


def test_a_directory_of_qwens_own_tokenizer(tmp_path: Path):
    """The real tokenizer beside a small random model with the real vocabulary, out and in on both sides."""
    source = make_tokens.DIRECTORIES["qwen2.5"]
    if not source.exists():
        pytest.skip("qwen2.5's tokenizer files are not here")
    config = qwen_eqx.QwenConfig("qwen2", 151936, 8, 1, 2, 1, 4, 12, 64, tied=True)
    model = qwen_eqx.Qwen.init(config, key=jax.random.key(0), dtype=jnp.dtype(jnp.float32))
    tokenizer = qwen_eqx.Tokenizer.from_directory(source, vocab_size=config.vocab)
    qwen_eqx.save_pretrained(model, tokenizer, tmp_path / "out")
    ids = tokenizer.encode("naïve 日本 123")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("naïve 日本 123").input_ids == ids
    np.testing.assert_allclose(
        model(jnp.asarray(ids)), their_logits(theirs(tmp_path / "out"), ids), **tolerances.LOGITS_F32
    )
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_finds_the_same_sequences(beams: int):
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    ids, stops = tokenizer.encode("### Input\n\n```grid\n1 230\n2 405\n```"), list(range(100, 140))
    found = qwen_eqx.beam_search(model, ids, beams=beams, max_new_tokens=12, stop_tokens=stops)
    out = theirs(TINY).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    np.testing.assert_allclose(found.log_probs, out.sequences_scores, **tolerances.LOGITS_F32)
    for row, wanted in zip(found.tokens, out.sequences[:, len(ids) :].tolist(), strict=True):
        assert wanted[: len(row)] == row.tolist()
