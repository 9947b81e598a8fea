"""The feature page says and paints what it was given, and holds nothing that runs or is fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae
from sae.evaluation import report
from sae.evaluation.survey import EDGES

TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "dl", "dt", "dd", "div", "nav",
    "small", "label", "input", "a", "b", "span", "main", "article", "section", "figure", "figcaption", "svg", "rect",
    "path", "text", "p", "code", "mark",
}  # fmt: skip
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--><style>*{}</style>",
    "</title><b>",
    "&lt;&#60;",
    "\x00\x1b[0m",
    "\udc80",
]
WORDS = st.sampled_from(EVIL) | st.text(max_size=6)


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, name, value) for name, value in attrs)
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


GRIDS = st.tuples(WORDS, st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
EXAMPLES = st.tuples(WORDS, st.lists(WORDS, max_size=5), st.lists(GRIDS, max_size=2))
LATENTS = st.tuples(st.integers(0, 9999), st.floats(0, 1), st.lists(EXAMPLES, max_size=2), st.lists(WORDS, max_size=3))


def positive(shape, seed: int) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0)


def grid_of(title: str, rows: int, cols: int, seed: int) -> report.Grid:
    cells = np.random.default_rng(seed).integers(0, 10, (rows, cols))
    return report.Grid(title, cells, positive((rows, cols), seed))


def latent_of(index: int, density: float, examples, words) -> report.Latent:
    shown = [
        report.Example(title, tokens, positive(len(tokens), len(title)), [grid_of(*grid) for grid in grids])
        for title, tokens, grids in examples
    ]
    counts = np.arange(len(EDGES) - 1) * (index % 2)
    return report.Latent(
        index, density, 1.0, counts, shown, [(word, 1.5) for word in words], [(word, -1.5) for word in words]
    )


@given(WORDS, st.lists(LATENTS, max_size=3), st.dictionaries(WORDS, WORDS, max_size=3))
def test_no_text_becomes_markup_and_nothing_is_fetched_or_run(title, latents, facts):
    source = report.render(
        title, [latent_of(*each) for each in latents], facts=facts, density=np.array([0.0, 0.1, 1.0])
    )
    page = Page(source)
    assert set(page.tags) <= TAGS
    assert page.open == []
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in {"src", "srcset", "action", "formaction"}
        if name == "href":
            assert re.fullmatch(r"#latent-\d+", value)
        if name == "style":
            assert re.fullmatch(r"(--\w+:[\d.]+;?)+", value)
        if tag == "meta" and name == "content" and "src" in value:
            assert value.startswith("default-src 'none'")
    assert "url(" not in source
    assert page.tags.count("article") == len(latents)
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", source)


@given(GRIDS)
def test_every_cell_has_its_colour_and_every_firing_cell_its_dot(drawn):
    grid = grid_of(*drawn)
    example = report.Example("t", ["x"], np.array([grid.activations.max()]), [grid])
    source = report.render("t", [report.Latent(0, 0.5, 1.0, np.zeros(len(EDGES) - 1, int), [example])])
    painted = np.full(grid.cells.shape, -1)
    bright = np.zeros(grid.cells.shape, bool)
    for colour, faded, steps in re.findall(r'<path fill="(#\w+)"( opacity="\S+")? d="([^"]*)"/>', source):
        for col, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", steps):
            cells = np.s_[int(row), int(col) : int(col) + int(length)]
            assert (painted[cells] == -1).all()
            painted[cells] = report.COLOURS.index(colour)
            bright[cells] = not faded
    np.testing.assert_array_equal(painted, grid.cells)
    np.testing.assert_array_equal(bright, grid.activations > 0)
    size = np.zeros(grid.cells.shape)
    for width, places in re.findall(r'<path class="dot" stroke-width="([\d.]+)" d="([^"]*)"/>', source):
        for col, row in re.findall(r"M(\d+)\.5 (\d+)\.5h0", places):
            size[int(row), int(col)] = float(width)
    np.testing.assert_array_equal(size > 0, grid.activations > 0)
    order = np.argsort(grid.activations, axis=None)
    assert (np.diff(size.ravel()[order]) >= 0).all()  # the stronger, the larger


def example(values, tokens=None) -> report.Example:
    return report.Example("doc", tokens or [f"t{place}" for place in range(len(values))], np.asarray(values, float))


def latent(index: int, density: float, *examples: report.Example) -> report.Latent:
    return report.Latent(index, density, 1.0, np.ones(len(EDGES) - 1, int), examples)


def test_the_tokens_around_the_peak_are_shown_and_shaded_by_activation():
    values = np.zeros(200)
    values[[100, 101, 150]] = [4.0, 1.0, 2.0]
    source = report.render("t", [latent(3, 0.1, example(values))])
    marks = re.findall(r'<mark style="--a:([\d.]+)" title="\w+ \S+">(\w+)</mark>', source)
    assert marks == [("1.00", "t100"), ("0.25", "t101")]
    text = re.search(r'<p class="text">(.*?)</p>', source, re.S)[1]
    shown = [int(number) for number in re.findall(r"t(\d+)(?=[t…<])", re.sub(r"<[^>]*>", "", text))]
    assert shown == list(range(100 - report.CONTEXT, 100 + report.CONTEXT + 1))
    assert text.startswith("…")
    assert text.endswith("…")


def test_line_breaks_and_control_characters_are_seen():
    source = report.render("t", [latent(0, 0.1, example([1.0, 0.0], ["\n", "\x00"]))])
    assert "↵\n</mark>\\x00" in source


def test_latents_come_by_density_and_the_index_holds_the_other_orders():
    page = report.render(
        "t", [latent(7, 0.1, example([1.0])), latent(5, 0.3, example([3.0])), latent(6, 0.2, example([5.0]))]
    )
    assert re.findall(r'<article id="latent-(\d)"', page) == ["5", "6", "7"]
    rows = re.findall(r'href="#latent-(\d)" style="--density:(\d);--peak:(\d);--number:(\d)"', page)
    assert rows == [("5", "0", "1", "0"), ("6", "1", "0", "1"), ("7", "2", "2", "2")]


def test_a_page_is_written_whole_with_half_characters_spelled(tmp_path):
    report.write(tmp_path / "new" / "page.html", "title \udc80", [latent(0, 0.0)], facts={"model": "tiny"})
    text = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert "title \\udc80" in text
    assert "It fired on no example." in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_many_grids_stay_small():
    cells = np.random.default_rng(0).integers(0, 10, (30, 30))
    grid = report.Grid("g", cells, (cells % 3).astype(float))
    source = report.render("t", [latent(0, 0.5, report.Example("d", ["x"], np.ones(1), [grid] * 100))])
    assert len(source) < 100 * 30_000


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (example([1.0], ["a", "b"]), "2 tokens and 1 activations"),
        (example([np.nan]), "NaN or infinity"),
        (report.Example("d", [], np.zeros(0), [report.Grid("g", np.full((1, 1), 10), np.zeros((1, 1)))]), "colour 10"),
        (
            report.Example("d", [], np.zeros(0), [report.Grid("g", np.full((1, 1), -1), np.zeros((1, 1)))]),
            "expected 0 to 9",
        ),
        (
            report.Example("d", [], np.zeros(0), [report.Grid("g", np.zeros((1, 1), int), np.full((1, 1), np.inf))]),
            "NaN",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(broken, expected):
    with pytest.raises(sae.InputError, match=re.escape(expected)):
        report.render("t", [latent(0, 0.5, broken)])


@given(st.floats(1e-9, 1.0))
def test_densities_have_one_unit_and_two_digits_that_count(density):
    said = report._percent(density)
    number, unit = said.split(" ")
    assert unit == "%"
    assert "e" not in number
    assert float(number) == pytest.approx(100 * density, rel=0.051)
    assert report._percent(0.0) == "dead"
