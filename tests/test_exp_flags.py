"""Flags agree across commands: a thing has one name, one type and one sentence; a list is written in one way."""

import ast
import importlib
import inspect
import random
import types
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

import evaluate_sae
import extract
import solve_arc
import steer
from qwen_lab import InputError, RunConfig, corpora, flags, places, settings
from running import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
OTHER_THINGS = {"batch_size", "mode"}  # prompts or rows of a step; how data are read, or a latent turned


def config_of(command: str) -> type:
    module = importlib.import_module(command)
    return next(getattr(module, name) for name in ("Config", "RunConfig", "LMConfig") if hasattr(module, name))


def bare(kind: Any) -> Any:
    """A type without what is only told to the parser; one or several, there or not, are of one type."""
    if typing.get_origin(kind) is Annotated:
        within = [each for each in kind.__metadata__ if type(each).__name__ == "Within"]
        return (bare(kind.__origin__), *within)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (only,) = [each for each in typing.get_args(kind) if each is not type(None)]
        return bare(only)
    if typing.get_origin(kind) is tuple:
        return bare(typing.get_args(kind)[0])
    return kind


def flat(kind: Any) -> Any:
    return tuple(each for part in kind for each in flat(part)) if isinstance(kind, tuple) else (kind,)


def sentences(config: type) -> dict[str, str]:
    """The first sentence of every flag: those that follow say what is particular to a command."""
    found = {}
    for kind in config.__mro__[:-1]:
        defined = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(defined, ast.ClassDef)
        for field, after in zip(defined.body, defined.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(after.value, ast.Constant)
                said = " ".join(str(after.value.value).split())
                found[ast.unparse(field.target)] = said.partition(". ")[0].removesuffix(".")
    return found


def every_flag() -> Iterator[tuple[str, str, Any, str]]:
    for command in COMMANDS:
        config = config_of(command)
        kinds, said = typing.get_type_hints(config, include_extras=True), sentences(config)
        assert kinds.keys() == said.keys()
        yield from ((command, name, kinds[name], said[name]) for name in kinds)


def test_a_name_has_one_type_and_one_sentence_and_a_thing_one_name():
    types_of, said_of, names_of = defaultdict(dict), defaultdict(dict), defaultdict(set)
    for command, name, kind, said in every_flag():
        if name not in OTHER_THINGS:
            types_of[name].setdefault(flat(bare(kind)), command)
            said_of[name].setdefault(said, command)
        names_of[said].add(name)
    assert {name: found for name, found in types_of.items() if len(found) > 1} == {}
    assert {name: found for name, found in said_of.items() if len(found) > 1} == {}
    assert {said: names for said, names in names_of.items() if len(names) > 1} == {}


def test_every_list_takes_commas_and_spaces():
    lists = {
        "layers",
        "sites",
        "sweep",
        "sae",
        "sides",
        "families",
        "held_out_families",
        "data",
        "stages",
        "exclude_tokens",
        "hold",
    }
    for command, name, kind, _ in every_flag():
        several = typing.get_origin(kind.__origin__ if typing.get_origin(kind) is Annotated else kind) is tuple
        assert not several or name in lists, f"{command}: --{name} is a list of its own kind"
        if name in lists and (several or name == "layers"):
            specs = [each for each in kind.__metadata__ if hasattr(each, "instance_from_str")]
            assert specs[0].nargs == "*", f"{command}: --{name} takes no spaces"


WORDS = st.lists(st.text("abk.:+_0123456789", min_size=1, max_size=6), min_size=1, max_size=6)


@given(WORDS, st.randoms(use_true_random=False))
def test_a_list_is_the_same_however_it_is_written(words: list[str], random):
    text = words[0] + "".join(random.choice(", ") + word for word in words[1:])
    assert flags.words(text.split(" ")) == tuple(words)
    assert flags.paths(text.split(" ")) == tuple(words)
    swept = [f"k={words[0]}", *words[1:], "lr=1", "2"]
    text = swept[0] + "".join(random.choice(", ") + word for word in swept[1:])
    assert flags.axes(text.split(" ")) == (f"k={','.join(words)}", "lr=1,2")


SPELLED = [
    (extract.Config, "layers", ["--layers 0,1", "--layers 0 1", "--layers=0,1"], "0,1"),
    (solve_arc.Config, "layers", ["--layers 1:3"], "1:3"),
    (extract.Config, "sites", ["--sites a,b", "--sites a b"], ("a", "b")),
    (RunConfig, "sweep", ["--sweep k=2,4 lr=1,2", "--sweep k=2 4 lr=1 2", "--sweep k=2,4,lr=1,2"], ("k=2,4", "lr=1,2")),
    (RunConfig, "sweep", ["--sweep k=2 k=4"], ("k=2", "k=4")),  # which is refused: an axis twice
    (RunConfig, "sweep", ["--sweep k=2,,4"], ("k=2,,4",)),  # and so is this
    (evaluate_sae.Config, "sae", ["--sae a,b", "--sae a b"], ("a", "b")),
    *[
        (config, "max_prompt", [f"--{name} 77" for name in ("max-prompt", "max-prompt-tokens", "max-tokens")], 77)
        for config in (solve_arc.Config, RunConfig, evaluate_sae.Config, steer.Config)
    ],
    *[
        (config, "limit", ["--limit None"], None)
        for config in (extract.Config, solve_arc.Config, RunConfig, evaluate_sae.Config, steer.Config)
    ],
]


@pytest.mark.parametrize(("config", "name", "lines", "expected"), SPELLED)
def test_flags_are_read(config: type, name: str, lines: list[str], expected: object):
    for line in lines:
        assert getattr(tyro.cli(config, args=line.split()), name) == expected, line


def test_no_two_flags_are_taken_for_one(monkeypatch: pytest.MonkeyPatch):
    """What the parser keeps of types and defaults it then always compares with what it would say anew."""
    monkeypatch.setattr(random, "random", lambda: 0.0)
    for command in COMMANDS:
        flags.parse(config_of(command), None, ["--out", "x"])
    assert corpora.Unsaid(3) != 3
    assert {corpora.Unsaid(3): "a"}.get(3) is None


def test_k_is_16_where_nobody_says_and_nothing_where_a_form_has_none():
    assert settings.settled(RunConfig())["k"] == settings.settled(RunConfig(k=16))["k"] == 16
    for form in ("relu", "gated"):
        settings.check(RunConfig(form=form))
        with pytest.raises(InputError, match=f"--k: found 16, expected none: {form} has no k"):
            settings.check(RunConfig(form=form, k=16))
    settings.check(RunConfig(form="jumprelu", k=3))  # its target


def test_a_path_may_have_a_comma(tmp_path: Path):
    (tmp_path / "a,b").mkdir()
    assert flags.paths([str(tmp_path / "a,b"), "c,d"]) == (str(tmp_path / "a,b"), "c", "d")
    assert places.parse_layers(tyro.cli(extract.Config, args=["--layers", "3", "0"]).layers, 4) == [3, 0]
