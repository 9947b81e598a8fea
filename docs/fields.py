"""An extension of griffe: a comment behind a field is the field's sentence."""

import ast
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, Extension


class FieldComments(Extension):
    """Gives an undocumented attribute what stands behind it on its last line."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **unused: Any) -> None:
        if attr.docstring is None and isinstance(node, ast.AnnAssign) and isinstance(attr.filepath, Path):
            line = attr.lines_collection[attr.filepath][(node.end_lineno or node.lineno) - 1]
            behind = line.encode()[node.end_col_offset or 0 :].decode()  # ast counts bytes
            said = behind.partition("# ")[2].strip()
            if said and not said.startswith(("noqa", "pyright:", "type:")):
                attr.docstring = Docstring(said, lineno=node.lineno, parent=attr)
