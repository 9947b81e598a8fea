"""Hooks of mkdocs: reference pages from docstrings, one for each package and folder, and anchors as on GitHub."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import tree
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify


def dotted(path: Path) -> str:
    """A file or folder by the name it is imported under."""
    top = next(parent for parent in path.parents if not tree.is_package(parent))
    return ".".join(path.relative_to(top).with_suffix("").parts)


def handed_out(package: Path) -> dict[str, str]:
    """Name -> where it is defined, of what a package's `__init__` imports from the package for those who import it."""
    here = dotted(package)
    places = {name: defined(f"{here}.{name}") for name in imported(package / "__init__.py")}
    return {name: place for name, place in places.items() if place.partition(".")[0] == here.partition(".")[0]}


def imported(file: Path) -> dict[str, str]:
    """Name -> dotted source of every `from … import` of a file."""
    body = ast.parse(file.read_text()).body
    body += [inner for node in body if isinstance(node, ast.If) for inner in node.body]  # qwen_lab imports when asked
    nodes = [node for node in body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def defined(name: str) -> str:
    """The dotted name under which something stands in its own file, however often it is imported on."""
    module, _, last = name.rpartition(".")
    inside = [tree.ROOT / top / module.replace(".", "/") for top in ("", "experiments")]
    files = [file for path in inside for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
    source = imported(files[0]).get(last, name) if files else name
    return name if source == name else defined(source)


def pages() -> Iterator[tuple[str, str, str]]:
    """(title, file, Markdown) of every page: what a folder says and defines, what it hands out, each of its files."""
    for folder in filter(tree.is_package, tree.folders()):
        name = dotted(folder)
        names = [link(short, place, name) for short, place in handed_out(folder).items()]
        given = [f"`import {name}` gives {', '.join(names)}."] if names else []
        parts = [
            f"# {name}",
            f"::: {name}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}",
            *given,
        ]
        parts += [f"::: {dotted(path)}" for path in tree.files(folder)]
        yield name, page(name), "\n\n".join(parts) + "\n"


def page(name: str) -> str:
    """Where the page of a package or folder lies."""
    return f"reference/{name.replace('.', '/')}.md"


def link(short: str, place: str, here: str) -> str:
    """To where something is defined; a folder is a page of its own."""
    if (tree.ROOT / place.replace(".", "/") / "__init__.py").exists():
        return f"[`{short}`]({os.path.relpath(page(place), os.path.dirname(page(here)))})"
    return f"[`{short}`][{place}]"


def on_config(config: MkDocsConfig) -> None:
    """Puts the reference at the end of the site's contents; a link to a heading is valid on GitHub and here."""
    assert config.nav is not None
    config.nav.append({"Reference": [{title: file} for title, file, _ in pages()]})
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages, which lie nowhere on disk."""
    for _, file, text in pages():
        files.append(File.generated(config, file, content=text))
