"""The tree of all files, made from their docstrings: `python docs/tree.py` rewrites docs/tree.md."""

import ast
import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# Every file

`python docs/tree.py` makes this page: a file is described by the first sentence of its docstring.
Files of a package stand in the order of imports, so a file reads only files above it.
"""


def import_order() -> dict[str, dict[str, list[str]]]:
    """Package -> folder -> files, as tests/test_architecture.py has them; read without importing the tests."""
    for node in ast.parse((ROOT / "tests" / "test_architecture.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER":
            return ast.literal_eval(node.value)
    raise LookupError("tests/test_architecture.py: found no ORDER, expected package -> folder -> files")


ORDER = import_order()


def is_package(folder: Path) -> bool:
    return (folder / "__init__.py").exists()


def folders() -> list[Path]:
    """Every folder that is a package or stands at the top and holds Python, each before those inside it."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and f"{path.name}/" not in ignored]
    found = [path for path in tops if any(path.rglob("*.py"))]
    return [inner for top in sorted(found, key=_place(list(ORDER))) for inner in _with_packages_inside(top)]


def _with_packages_inside(folder: Path) -> list[Path]:
    inside = [path.parent for path in folder.glob("*/__init__.py")]
    ordered = sorted(inside, key=_place(list(rooms(folder))))
    return [folder, *(inner for path in ordered for inner in _with_packages_inside(path))]


def files(folder: Path) -> list[Path]:
    """A folder's own Python files in the order of imports; scripts in folders that are no packages come last."""
    loose = [path for path in folder.rglob("*.py") if not any(map(is_package, _between(folder, path)))]
    named = [path for path in loose if path.name != "__init__.py"]
    return sorted(named, key=lambda path: (len(path.parts), *_place(rooms(folder).get(_inside(folder), []))(path)))


def rooms(folder: Path) -> dict[str, list[str]]:
    """What `ORDER` says of the package that a folder belongs to."""
    return ORDER.get(_package(folder).name, {})


def _package(folder: Path) -> Path:
    return _package(folder.parent) if is_package(folder.parent) else folder


def _inside(folder: Path) -> str:
    return ".".join(folder.relative_to(_package(folder)).parts)


def _between(folder: Path, path: Path) -> list[Path]:
    return [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]


def _place(names: list[str]):
    return lambda path: (names.index(path.stem) if path.stem in names else len(names), path.as_posix())


def sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, or the title of a page or a notebook, on one line."""
    if path.suffix == ".ipynb":
        return "".join(json.loads(path.read_text())["cells"][0]["source"]).partition("\n")[0].lstrip("# ")
    if path.suffix == ".md":
        return path.read_text().partition("\n")[0].lstrip("# ")
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.sub(r"\s+", " ", said.partition("\n\n")[0]).replace("|", r"\|")


def make() -> str:
    """The page: a section for each folder, its sentence, a table of its files."""
    page = [HEAD]
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix()
        page.append(f"{'#' * (2 + name.count('/'))} {name}/\n")
        if is_package(folder):
            page.append(textwrap.fill(sentence(folder / "__init__.py"), 100, break_on_hyphens=False) + "\n")
        pages = sorted([*folder.glob("*.md"), *folder.rglob("*.ipynb")])
        listed = [*files(folder), *(path for path in pages if path != PAGE)]
        rows = [f"| `{path.relative_to(folder).as_posix()}` | {sentence(path)} |" for path in listed]
        if rows:
            page.append("\n".join(["| file | is |", "|---|---|", *rows]) + "\n")
    return "\n".join(page)


if __name__ == "__main__":
    PAGE.write_text(make())
