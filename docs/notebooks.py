"""Hooks of mkdocs: every notebook is a page with its outputs and pictures, which nbconvert makes from the saved file."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert.exporters import MarkdownExporter


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Beside each notebook its page and the pictures of its outputs, which lie nowhere on disk."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page, pictures = converted(Path(file.abs_src_path or ""))
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=page))
        folder = Path(file.src_uri).parent
        for name, content in pictures.items():
            files.append(File.generated(config, (folder / name).as_posix(), content=content))


def converted(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, a line below its title that leads to the file itself, and its pictures by name."""
    name = notebook.stem
    text, resources = MarkdownExporter().from_filename(
        str(notebook), {"unique_key": name, "output_files_dir": f"{name}_files"}
    )
    title, _, rest = text.lstrip().partition("\n")
    link = '<a href="{notebook}" download>This page is a notebook</a>: its outputs are as they were printed.'
    return f"{title}\n\n{link}\n{rest}", resources["outputs"]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a notebook, which is right on GitHub, leads to its page here."""
    own = files.get_file_from_path(page.file.src_uri.removesuffix(".md") + ".ipynb")
    if own is not None:
        markdown = markdown.replace("{notebook}", own.url_relative_to(page.file))
    return re.sub(r"(\]\([\w./-]+)\.ipynb\b", r"\1.md", markdown)
