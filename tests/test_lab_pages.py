"""What the site of an evaluation computes: cells of augmented tasks, answers with something added, tokens as read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import qwen_eqx
import qwen_lab
import sae
from qwen_lab import answers, invariance, lens

SITE = "blocks.1.hook_resid_post"
MODEL, TOKENIZER = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
TASKS = list(arc.generators.held_out((3, 4), ("mirror", "frame"), 1))
DOCUMENTS = qwen_lab.documents(TASKS, TOKENIZER, max_tokens=400, encoder="padded(4)", format="compact")
DATA = qwen_lab.Data(MODEL, TOKENIZER, "tiny-random", DOCUMENTS, [])


def colours(document: qwen_lab.Document) -> np.ndarray:
    """A latent that says the colour of the cell that is read, from 1."""
    values = np.zeros((len(document.tokens), 1), np.float32)
    for grid in document.grids:
        for at, colour in np.ndenumerate(grid.cells):
            values[slice(*document.tokens_of(grid)[at])] = 1 + colour
    return values


def test_cells_of_a_changed_task_stand_where_the_task_has_them():
    twins = invariance.twins(DATA, 2, seed=0)
    assert [twin.kind for twin in twins] == [*invariance.KINDS] * 2
    for twin in twins:
        document = DOCUMENTS[twin.original]
        pairs = list(invariance._matched(twin, document, colours(document), colours(twin.document)))
        assert len(pairs) == len(document.grids)
        here, there = (np.concatenate(each).ravel() for each in zip(*pairs, strict=True))
        assert len(here) == sum(grid.cells.size for grid in document.grids)
        renamed = np.asarray(twin.augmentation.colours)[here.astype(int) - 1] + 1
        np.testing.assert_array_equal(there, renamed)
        if twin.kind == "turned":
            assert twin.document.text != document.text


def test_correlation_is_pearsons_and_silence_has_none():
    module = sae.ReLU.init(d_model=64, d_sae=6, key=jax.random.key(0))
    place = qwen_lab.Place((SITE,), (SITE,))
    dictionary = qwen_lab.Dictionary("d", module, place, {})
    data = qwen_lab.Data.read(MODEL, TOKENIZER, DOCUMENTS[:1], [place])
    twins = invariance.twins(data, 1, seed=0)
    read = qwen_lab.Data.read(MODEL, TOKENIZER, [twin.document for twin in twins], [place])
    found, cells = invariance.correlations(dictionary, data, twins, read)
    assert cells == 3 * sum(grid.cells.size for grid in DOCUMENTS[0].grids)
    codes = sae.encoded(module, dictionary.read(data.acts[0]))
    for twin, acts in zip(twins, read.acts, strict=True):
        other = sae.encoded(module, dictionary.read(acts))
        pairs = zip(*invariance._matched(twin, DOCUMENTS[0], codes, other), strict=True)
        x, y = (np.concatenate(each).astype(np.float64) for each in pairs)
        for latent in range(6):
            if x[:, latent].std() > 0 and y[:, latent].std() > 0:
                expected = np.corrcoef(x[:, latent], y[:, latent])[0, 1]
                assert found[twin.kind][latent] == pytest.approx(expected, abs=1e-6)
            else:
                assert np.isnan(found[twin.kind][latent])


def test_a_direction_changes_the_answer_that_it_is_added_to_and_no_other():
    module = sae.ReLU.init(d_model=64, d_sae=6, key=jax.random.key(0))
    dictionary = qwen_lab.Dictionary("d", module, qwen_lab.Place((SITE,), (SITE,)), {})
    plain = answers.write(DATA, [0, 1])
    added = answers.write(DATA, [0, 1], [(dictionary, 2, 0.0), (dictionary, 3, 1e4)])
    assert added[0].text == plain[0].text
    assert added[1].text != plain[1].text
    assert all(one.grid is None or one.verdict in ("right", "wrong") for one in plain)


def test_tokens_are_text_or_bytes_that_are_spelled_out():
    for token in range(0, TOKENIZER.backend.get_vocab_size(), 7):
        if TOKENIZER.backend.id_to_token(token) is None:
            continue
        text, said = TOKENIZER.decode([token]), lens.token_text(TOKENIZER, token)
        assert said == text if "\ufffd" not in text else "\\x" in said
    whole = TOKENIZER.encode("é")
    spelled = "".join(lens.token_text(TOKENIZER, token) for token in whole)
    assert spelled in ("é", r"\xc3\xa9")
