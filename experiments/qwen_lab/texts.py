"""What text a dictionary was trained on, as its metadata say it, beside the text that it is measured on."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = {  # field: the key of a saved dictionary's metadata, and what a line calls it
    "model": ("model_name", "model"),
    "tasks": ("tasks", "tasks"),
    "encoder": ("encoder", "encoder"),
    "prompt": ("prompt", "prompt format"),
    "tokenizer": ("tokenizer_digest", "tokenizer and chat template"),
}
_CORPUS = "dataset_path"  # where SAELens' metadata name a text


@dataclasses.dataclass(frozen=True)
class Text:
    """What a model read; None where nobody says."""

    model: str | None = None
    tasks: str | None = None
    encoder: str | None = None
    prompt: str | None = None
    tokenizer: str | None = None  # digest of its files, the chat template among them

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> "Text":
        """Of a saved dictionary's training."""
        said = {field: metadata.get(key) for field, (key, _) in _NAMES.items()}
        said["tasks"] = metadata.get(_CORPUS) if said["tasks"] is None else said["tasks"]
        return cls(**{field: value if isinstance(value, str) else None for field, value in said.items()})

    @property
    def metadata(self) -> dict[str, str | None]:
        """As a saved dictionary says it."""
        return {key: getattr(self, field) for field, (key, _) in _NAMES.items()}

    def differs(self, trained: "Text") -> list[str]:
        """The fields in which this is other text than a dictionary was trained on; text that has no name is other text."""
        pairs = {field: (getattr(self, field), getattr(trained, field)) for field in _NAMES}
        return [
            field
            for field, (here, there) in pairs.items()
            if here != there and (field == "tasks" or None not in (here, there))
        ]


def compared(found: Text, trained: Text) -> dict[str, Any]:
    """For a results file."""
    return {
        "found": dataclasses.asdict(found),
        "trained_on": dataclasses.asdict(trained),
        "differs": found.differs(trained),
    }


def warnings(found: Text, trained: Mapping[str, Text]) -> list[str]:
    """A line for every kind of other text that dictionaries, by name, were trained on."""
    lines: dict[str, list[str]] = {}
    for name, text in trained.items():
        if differs := found.differs(text):
            line = f"found {_spelled(found, differs)}; trained on {_spelled(text, differs)}"
            lines.setdefault(line, []).append(name)
    return [f"other text than {', '.join(names)} learned: {line}" for line, names in lines.items()]


def _spelled(text: Text, fields: Iterable[str]) -> str:
    return ", ".join(_field(field, getattr(text, field)) for field in fields)


def _field(field: str, value: str | None) -> str:
    if value is None:
        return "text that its metadata do not name"
    short = value[:15] if field == "tokenizer" else value[:80]
    return f"{_NAMES[field][1]} {short.encode('unicode_escape').decode()}"
