"""What the repository says of itself is so: README, examples, flags, the wheel, and what no tracked file may hold."""

import ast
import contextlib
import inspect
import io
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from test_architecture import ORDER, home

ROOT = Path(__file__).parent.parent
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
TREE = runpy.run_path(str(ROOT / "docs" / "tree.py"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.run(" in path.read_text())
README = (ROOT / "README.md").read_text()


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


EXAMPLES = [page for page in PAGES if blocks(page, "python")]


def test_the_tree_is_what_its_script_makes():
    assert (ROOT / "docs" / "tree.md").read_text() == TREE["make"](), "run `python docs/tree.py`"


def test_every_file_says_what_it_is_for():
    for folder in TREE["folders"]():
        for path in TREE["files"](folder) + [folder / "__init__.py"] * TREE["is_package"](folder):
            assert TREE["sentence"](path), f"{path.relative_to(ROOT)}: expected a docstring"


def test_the_readme_names_every_folder():
    """Folders at the top, packages and what lies in them; those of a package in the order of imports."""
    there = TREE["folders"]()
    packages = [folder for folder in there if TREE["is_package"](folder)]
    held = [(folder, path) for folder in packages for path in folder.glob("*/**/*") if "__pycache__" not in path.parts]
    inner = {folder / path.relative_to(folder).parts[0] for folder, path in held if path.is_file()}
    named = re.findall(r"^\| `([\w./-]+)/` \| \w", README, re.MULTILINE)
    assert set(named) == {path.relative_to(ROOT).as_posix() for path in inner.union(there)}
    for top in ROOT.glob("*/"):
        inside = [path for path in there if path.is_relative_to(top)]
        assert [ROOT / name for name in named if ROOT / name in inside] == inside, f"README: the order in {top.name}/"


@pytest.mark.parametrize("page", DOCS)
def test_every_page_is_reached_from_the_readme_and_the_site(page: str):
    assert f"]({page})" in README
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\n\n")[0]
    name = page.removeprefix("docs/")  # one without a title gives its section's its own
    assert re.search(rf"(: |- ){name}$", nav, re.MULTILINE), f"mkdocs.yml: {page} is not in nav"


def prose(page: str) -> list[tuple[int, str]]:
    """Numbered lines outside of fences and tables."""
    text = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), read(page), flags=re.M | re.S)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES)
def test_prose_wraps_at_100(page: str):
    one_piece = re.compile(r"\s*(- )?(\[[^\]]*\]\(\S*\)|`[^`]*`|\S+)[.,:;)]*")  # a link or name that cannot be cut
    long = [number for number, line in prose(page) if len(line) > 100 and not one_piece.fullmatch(line)]
    assert not long, f"{page}: lines {long} are longer than 100"


def test_the_log_is_newest_first():
    headings = re.findall(r"^## (.*)$", read("docs/LOG.md"), re.MULTILINE)
    dates = [heading.partition(" · ")[0] for heading in headings]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates), "a heading is: YYYY-MM-DD · what was asked"
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page's examples run one after another, as somebody who reads it would run them."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "toml"):
        Path(block.partition("\n")[0].removeprefix("# ")).write_text(block)  # its first line names the file
    names = {"__name__": "example"}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, block in enumerate(blocks(page, "python"), 1):
            exec(compile(block, f"{page}, example {number}", "exec"), names)


def test_the_readme_has_an_example_and_two_commands():
    assert blocks("README.md", "python")
    commands = blocks("README.md", "bash")
    assert [command.count("\n") for command in commands] == [1, 1]
    main, tests = (command.strip() for command in commands)
    assert re.fullmatch(r"pip install -e '\.\[(\w+)\]' && python experiments/\w+\.py", main)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]", main + tests)) <= extras.keys()
    assert (ROOT / main.split()[-1]).exists()


def test_ci_runs_the_readme_test_command():
    tests = blocks("README.md", "bash")[1].strip()
    assert re.findall(r'^TESTS="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == [tests]


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings, and the site too (docs/reference.py)."""
    headings = [line.lstrip("# ") for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", read(page)):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), f"{page}: {link} does not exist"
        assert not anchor or anchor in anchors(str(target.relative_to(ROOT))), (
            f"{page}: {link}#{anchor}: no such heading"
        )
    inside = page.startswith("docs/")
    assert not (inside and re.search(r"\]\(\.\./", read(page))), f"{page}: the site has nothing outside of docs/"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/LOG.md"])
def test_files_that_are_named_exist(page: str):
    for name in re.findall(r"`((?:qwen_eqx|arc|sae|experiments|benchmarks|tests|docs)/[\w/]+\.py)", read(page)):
        assert (ROOT / name).exists(), f"{page}: {name} does not exist"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_flag_says_what_it_is_for(name: str, capsys: pytest.CaptureFixture[str]):
    source = ast.parse((ROOT / "experiments" / f"{name}.py").read_text())
    runs = [call for call in ast.walk(source) if isinstance(call, ast.Call) and ast.unparse(call.func) == "cli.run"]
    assert len(runs) == 1
    config = ast.unparse(runs[0].args[1])
    for kind in getattr(import_module(name), config).__mro__[:-1]:  # flags that scripts share stand in a base
        defined = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(defined, ast.ClassDef)
        for field, after in zip(defined.body, [*defined.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert said, f"{name}.{config}.{ast.unparse(field.target)}: expected a sentence under it"
                assert field.value is not None, f"{name}.{config}.{ast.unparse(field.target)}: expected a default"
    with pytest.raises(SystemExit) as done:
        tyro.cli(getattr(import_module(name), config), args=["--help"])
    assert done.value.code == 0
    assert "--" in capsys.readouterr().out


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_on_one_machine():
    place = re.compile(rb"(?<![\w.:/~*}-])/(?:root|home|Users|work|workspace|mnt|opt|srv|scratch)/\w|\b[A-Z]:\\\\Users")
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked()
        if b"\0" not in (data := path.read_bytes()) and (match := place.search(data))
    ]
    assert not found


def test_nothing_is_unpickled_or_evaluated():
    calls = {"eval", "exec", "__import__", "torch.load", "pickle.load", "pickle.loads"}
    modules = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in tracked():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            here = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & modules, here
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in modules, here
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, here
                for word in node.keywords:
                    allows = isinstance(word.value, ast.Constant) and word.value.value is False
                    assert word.arg != "allow_pickle" or allows, here


def test_the_wheel_is_whole(tmp_path: Path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in opened.namelist() if name.endswith("METADATA"))
        facts = opened.read(metadata).decode()
    expected = {
        path.relative_to(home(package)).as_posix()
        for package in ORDER
        for path in (home(package) / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert {f"{package}/py.typed" for package in ORDER} <= held
    assert {f"qwen_eqx/pretrained/{name}/model.safetensors" for name in ("tiny-arc", "tiny-random")} <= held
    assert "License-Expression: MIT" in facts
    assert "Requires-Python: >=3.11" in facts
