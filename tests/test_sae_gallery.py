"""The gallery of latents: files that hold what was given and nothing that runs, and pages as a browser shows them."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae.evaluation import gallery
from sae.evaluation.survey import EDGES

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "');alert(1);//",
    "\x00\x1b[0m",
    "\udc80",
    "\u2028",
]
WORDS = st.sampled_from(EVIL) | st.text(max_size=6)
PROPERTIES = ("read: colour blue", "next: corner", "read: a cell")


def document(words=("I", "\n"), title: str = "task t, test 0", seed: int = 0) -> gallery.Document:
    """A pair and a test, every cell a token; the last grid is the answer."""
    rng = np.random.default_rng(seed)
    tokens, grids = [], []
    for number in range(4):
        cells = rng.integers(0, 10, (3, 4))
        tokens += list(words)
        held = len(tokens) + np.arange(12).reshape(3, 4)
        tokens += [str(cell) for cell in cells.ravel()]
        group = "example 1" if number < 2 else "test"
        grids.append(gallery.Grid(group, ("input", "output")[number % 2], cells, np.stack([held, held + 1], -1)))
    answer = gallery.Answer("wrong", "12\n3", np.array([[1, 2], [3, 4]]))
    return gallery.Document(title, tokens, int(grids[-1].tokens.min()), grids, answer)


def latent(index: int, density: float = 0.1, **fields) -> gallery.Latent:
    counts = np.zeros(len(EDGES) - 1, int)
    counts[20:24] = [1, 5, 2, 1]
    return gallery.Latent(index, density, 1.0, 4.0, counts, **fields)


def fired(*pairs: tuple[int, float]) -> gallery.Fired:
    tokens, values = zip(*pairs, strict=True)
    return gallery.Fired(0, np.asarray(tokens), np.asarray(values, np.float32))


def read(path: Path):
    """What a file of data holds: it is one call with its own name and JSON, all of it ASCII."""
    data = next(parent for parent in path.parents if parent.name == "data")
    name = path.relative_to(data).with_suffix("").as_posix()
    text = path.read_bytes().decode("ascii")
    assert text.startswith(f'receive("{name}",')
    assert text.endswith(");\n")
    return json.loads(text.removeprefix(f'receive("{name}",')[:-3])


@settings(max_examples=5)
@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), st.dictionaries(WORDS, WORDS, max_size=3))
def test_whatever_a_text_says_it_is_data(tmp_path_factory, title, words, facts):
    home = tmp_path_factory.mktemp("gallery")
    shown = latent(3, promoted=[(word, 1.5) for word in words], matches=[gallery.Match(title, 0.5, {title: 0.25})])
    given = gallery.Dictionary("0", title, title, [shown], facts, {"steered": title})
    gallery.write(home, title, [given], [document(words, title)], facts=facts)
    index, page = read(home / "data" / "index.js"), read(home / "data" / "0" / "0000.js")
    assert (index["title"], dict(index["facts"]), index["dictionaries"][0]["name"]) == (title, facts, title)
    assert page["latents"][0]["promoted"] == [[word, 1.5] for word in words]
    assert page["latents"][0]["matches"] == [[title, 0.5, [[title, 0.25]]]]
    held = read(home / "data" / "documents" / "0000.js")
    assert (held["title"], held["tokens"][: len(words)]) == (title, words)
    assert (home / "index.html").read_bytes() == (
        gallery.STATIC / "index.html"
    ).read_bytes()  # no text is ever put into it


def test_the_page_runs_nothing_but_its_own_files():
    page = (gallery.STATIC / "index.html").read_text()
    assert "default-src 'none'; style-src 'self' file:; script-src 'self' file:" in page
    assert re.findall(r"<script([^>]*)>(.*?)</script>", page) == [
        (f' src="{name}.js"', "") for name in ("draw", "latent", "gallery")
    ]
    assert not re.search(r"\son\w+=|style=|https?:", page)
    for path in gallery.STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(", path.read_text())


def test_latents_lie_in_files_of_a_few_and_the_index_in_columns(tmp_path: Path):
    many = [latent(index, near=[(index - 1, 0.5)]) for index in range(5, 5 + gallery.PER_PAGE + 2)]
    gallery.write(tmp_path, "t", [gallery.Dictionary("a", "a", "1", iter(many))], [])
    pages = sorted((tmp_path / "data" / "a").glob("0*.js"))
    assert [len(read(page)["latents"]) for page in pages] == [gallery.PER_PAGE, 2]
    columns = read(tmp_path / "data" / "a" / "index.js")
    assert columns["latent"] == list(range(5, 5 + gallery.PER_PAGE + 2))
    assert all(len(columns[name]) == len(many) for name in gallery.COLUMNS)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda: fired((0, np.nan)), "NaN or infinity"),
        (lambda: gallery.Dictionary("../x", "n", "", []), "expected letters and digits"),
        (lambda: gallery.Dictionary("documents", "n", "", []), "expected letters and digits"),
        (lambda: shown(cells=np.full((1, 1), 10)), "colours 10 to 10"),
        (lambda: shown(cells=np.full((1, 1), -1)), "expected 0 to 9"),
        (lambda: shown(tokens=np.full((1, 1, 2), 9)), "token 9, expected at most 1"),
        (lambda: shown(link="javascript:alert(1)"), "expected a relative path"),
        (lambda: shown(link="//evil.example/x"), "expected a relative path"),
        (
            lambda: shown(examples=[gallery.Example("top 1", gallery.Fired(1, np.zeros(0, int), np.zeros(0)))]),
            "found 1",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(wrong, expected, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sae.InputError, match=re.escape(expected)):
        wrong()


def shown(cells=None, tokens=None, link="", examples=()) -> None:
    cells = np.zeros((1, 1), int) if cells is None else cells
    grid = gallery.Grid("g", "t", cells, np.array([[[0, 1]]]) if tokens is None else tokens)
    text = gallery.Document("d", ["x"], 1, [grid], link=link)
    gallery.write("gallery", "t", [gallery.Dictionary("0", "n", "", [latent(0, examples=examples)])], [text])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two dictionaries, of which the first has 130 latents; latent 7 has all there is to show."""
    steered = gallery.Steered(0, 8.0, gallery.Answer("right", "1", np.array([[1]])))
    example = gallery.Example("top 1", fired((2, 4.0), (3, 1.0), (4 * 14 - 1, 2.0)), None)
    everything = {
        "examples": [example],
        "promoted": [("\n", 2.0), (EVIL[0], 1.0)],
        "suppressed": [("\x00", -1.0)],
        "near": [(9, 0.875), (11, 0.5)],
        "together": [(8, 0.25)],
        "invariance": {"turned": 0.75, "recoloured": None},
        "steered": steered,
    }
    latents = [
        latent(
            index,
            10.0 ** -(1 + index % 4),
            matches=[gallery.Match(PROPERTIES[index % 3], (index % 10) / 10, {"dimensions": 0.25})],
            **(everything if index == 7 else {}),
        )
        for index in range(130)
    ]
    home = tmp_path_factory.mktemp("gallery")
    dictionaries = [
        gallery.Dictionary("0", "first", "1", latents, {"L0": "16"}, {"steered": "Only one is steered."}),
        gallery.Dictionary("1", "second", "2", [latent(0)]),
    ]
    return gallery.write(home, EVIL[0], dictionaries, [document(EVIL[:2])], facts={"model": EVIL[1]})


def rows(page) -> list[int]:
    return [int(text) for text in page.locator("#rows th").all_inner_texts()]


def settled(page, expected: str) -> None:
    page.wait_for_function("want => document.getElementById('count').textContent === want", arg=expected)


def test_the_index_is_searched_filtered_and_turned(made: Path, browse):
    asked: list[str] = []
    with browse(made, asked=asked) as page:
        settled(page, "130 of 130 latents")
        assert sorted(Path(url).name for url in asked if "/data/" in url) == ["index.js", "index.js"]
        assert page.title() == page.inner_text("#title") == EVIL[0]
        assert EVIL[1] in page.inner_text("#facts")
        assert len(rows(page)) == 100
        page.click("#after")
        assert (len(rows(page)), page.inner_text("#where")) == (30, "page 2 of 2")
        page.fill("#search", "7")
        settled(page, "1 of 130 latents")
        page.fill("#search", "CORNER")
        settled(page, "43 of 130 latents")
        page.fill("#f1", "0.85")
        settled(page, "4 of 130 latents")
        assert {number % 10 for number in rows(page)} == {9}
        page.click("button[type=reset]")
        settled(page, "130 of 130 latents")
        page.select_option("#property", "read: a cell")
        settled(page, "43 of 130 latents")
        page.fill("#low", "5")
        settled(page, "11 of 130 latents")
        page.click("button[type=reset]")
        page.fill("#like", "7")
        settled(page, "3 of 130 latents")
        assert rows(page) == [7, 9, 11]
        page.click("button[type=reset]")
        page.fill("#twin", "0.8")
        settled(page, "1 of 130 latents")
        page.click("button[type=reset]")
        page.select_option("#layer", "*")
        settled(page, "131 of 131 latents")
        page.select_option("#order", "-latent")
        page.wait_for_selector("#rows tr:nth-child(3) th:has-text('1')")
        assert rows(page)[:3] == [0, 0, 1]


def test_a_latent_is_painted_on_its_grids_and_keys_lead_on(made: Path, browse):
    asked: list[str] = []
    with browse(f"{made.as_uri()}#/0/7", asked=asked) as page:
        page.wait_for_selector("article h1")
        assert page.evaluate("document.activeElement.textContent").startswith("Latent 7")
        assert [Path(url).name for url in asked if "/data/" in url].count("0000.js") == 2  # its page and its document
        text = page.inner_text("article")
        for said in ("Values where it fires", "recoloured\nsilent", "wrong", "turned or mirrored\n0.750", "\\x00"):
            assert said in text
        example = page.locator(".example svg.grid")
        assert example.count() == 5  # four grids of the document and what the model wrote
        colours = json.loads(json.dumps(gallery.COLOURS))
        first = document(EVIL[:2]).grids[0]
        painted = example.first.locator("path[fill]").evaluate_all(
            "all => all.map(path => [path.getAttribute('fill'), path.getAttribute('d')])"
        )
        found = np.full(first.cells.shape, -1)
        for colour, steps in painted:
            for col, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", steps):
                found[int(row), int(col) : int(col) + int(length)] = colours.index(colour)
        np.testing.assert_array_equal(found, first.cells)
        heat = example.first.locator("rect.heat").evaluate_all(
            "all => all.map(r => [r.className.baseVal, r.textContent])"
        )
        assert heat == [["heat h8", "4.00"], ["heat h2", "1.00"]]
        assert "fires on 2, most on row 1, column 1" in example.first.get_attribute("aria-label")
        assert page.locator(".example figure.generated").count() == 1
        assert page.locator(".example details p").count() == 0  # made when it is opened
        page.click("summary")
        page.wait_for_selector(".example p.text")
        assert "generated from here" in page.inner_text(".example details")
        assert page.locator(".example mark").count() == 3
        page.keyboard.press("u")
        page.wait_for_selector("#rows tr")
        first, second = rows(page)[:2]
        page.keyboard.press("/")
        page.wait_for_function("() => document.activeElement.id === 'search'")
        page.click(f"#rows a >> text='{first}'")
        page.wait_for_selector(f"text=Latent {first} ")
        page.locator("article h1").press("n")
        page.wait_for_selector(f"h1:has-text('Latent {second} ')")


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 400)])
def test_it_is_read_by_everyone(made: Path, browse, dark: bool, width: int):
    """Names for all that is used, contrast of at least 4.5, nothing wider than the window."""
    for address in ("", "#/0/7"):
        with browse(made.as_uri() + address, dark=dark, width=width) as page:
            page.wait_for_selector("#rows tr" if not address else "article h1")
            assert page.evaluate(UNNAMED) == []
            assert page.locator("main h1:visible").count() == 1
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.evaluate(CONTRAST) >= 4.5


UNNAMED = """() => [...document.querySelectorAll('input, select, svg, a, button')].filter(e =>
  e.labels ? !e.labels.length && !e.textContent.trim() :
  e.matches('svg') ? e.getAttribute('role') !== 'img' || !e.getAttribute('aria-label') :
  !e.textContent.trim()).map(e => e.outerHTML)"""
CONTRAST = """() => {
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const shown = [...document.querySelectorAll('a, dt, dd, h1, h2, h3, small, th, td, p, code, .verdict, label')]
    .filter(e => e.offsetParent && e.textContent.trim());
  return Math.min(...shown.map(e => { const a = light(getComputedStyle(e).color), b = light(behind(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
}"""


def test_many_latents_open_by_their_columns_alone(tmp_path: Path, browse):
    """16,384 of them, made of 64: the columns over and over, one file of latents as the last."""
    few = (latent(index, 10.0 ** -(1 + index % 5), promoted=[(f" t{index}", 1.0)] * 3) for index in range(64))
    page_of = gallery.write(tmp_path, "many", [gallery.Dictionary("0", "d", "", few)], [])
    data = tmp_path / "data" / "0"
    columns = read(data / "index.js")
    many = {name: values * 256 for name, values in columns.items() if name != "properties"}
    many |= {"properties": [], "latent": list(range(16_384))}
    (data / "index.js").write_text(f'receive("0/index",{json.dumps(many)});\n')
    last = (data / "0000.js").read_text().replace("0/0000", "0/0255").replace('"latent":63', '"latent":16383')
    (data / "0255.js").write_text(last)
    assert (data / "index.js").stat().st_size < 2_500_000
    asked: list[str] = []
    with browse(page_of, asked=asked) as page:
        settled(page, "16,384 of 16,384 latents")
        assert sum("/data/" in url for url in asked) == 2
        assert page.evaluate("document.querySelectorAll('*').length") < 3_000
        page.fill("#search", "16383")
        settled(page, "1 of 16,384 latents")
        page.click("#rows a")
        page.wait_for_selector("h1:has-text('Latent 16383')")
        assert [Path(url).name for url in asked if "/data/0/" in url] == ["index.js", "0255.js"]


def test_it_is_the_same_from_a_server(made: Path, browse):
    quiet = functools.partial(Quiet, directory=str(made.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browse(f"http://127.0.0.1:{server.server_port}/#/1/0") as page:
            page.wait_for_selector("article h1")
            assert "second" in page.inner_text("article h1")
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Says nothing of what is read."""

    def log_message(self, *_) -> None:
        pass


def test_what_is_missing_is_said(made: Path, tmp_path: Path, browse):
    page_of = gallery.write(tmp_path, "t", [gallery.Dictionary("0", "d", "", [latent(0)])], [])
    with browse(f"{page_of.as_uri()}#/0/5") as page:
        page.wait_for_selector("#wrong:not([hidden])")
        assert "no latent 5" in page.inner_text("#wrong")
    other = gallery.write(tmp_path / "cut", "t", [gallery.Dictionary("0", "d", "", [latent(0)])], [])
    (tmp_path / "cut" / "data" / "index.js").unlink()

    def opened_in_parts() -> None:
        with browse(other) as page:
            page.wait_for_selector("#wrong:not([hidden])")
            assert "data/index.js could not be read" in page.inner_text("#wrong")

    with pytest.raises(AssertionError, match=r"failed: .*index\.js"):
        opened_in_parts()
