"""A model's own chat template, rendered in Jinja's sandbox with caps: a template is code that came with the weights.

The environment is that of transformers' `utils/chat_template_utils.py`, so the same template gives the same text; the
caps are ours, because the sandbox alone stops neither an endless loop nor `'x' * 10**9`.
"""

import json
import operator
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from qwen_eqx.errors import InputError

MAX_TEMPLATE_CHARS = 1 << 16
MAX_PIECE = 1 << 22  # the length of one value inside a template
MAX_WORK = 1 << 26  # characters and items made or touched while rendering once
ITEM = 1 << 9  # what walking over one item costs, in characters
_SEARCHED = 16  # characters of a text that are searched in the time that one is made
TURN = 1 << 12  # the least that one turn of a loop or one call costs
MAX_WIDTH = 1 << 12  # a padding width or an exponent
MAX_BITS = 1 << 9  # of a whole number
GROWING = {"replace", "join", "translate", "indent"}  # results as long as the product of their arguments
PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap", "round"}
# filters that hand their items on; every other one may print or compare what is inside them
HANDING = {
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice", "sum",
}  # fmt: skip
PRINTING = {"format", "format_map", "join"}  # the methods that print
COMPARING = {"changed", "count", "dict", "fromkeys", "get", "index"}  # calls that compare or hash what is inside
COMPARISONS = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
    "in": lambda item, items: item in items, "notin": lambda item, items: item not in items,
}  # fmt: skip
COMPARING_TESTS = {
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne",
}  # fmt: skip


class _TooMuch(Exception):
    """A template asked for more than the caps allow."""


class _Meter:
    """Counts the characters and items that a rendering makes or touches."""

    def __init__(self) -> None:
        self.spent = 0

    def charge(self, amount: int) -> int:
        self.spent += amount
        if self.spent > MAX_WORK:
            raise _TooMuch(f"more than {MAX_WORK} characters of work")
        return amount

    def measure(self, value: Any) -> int:
        """The size of a value with everything in it, charged while walking so that the walk itself ends."""
        if isinstance(value, str):
            return self.charge(len(value))
        if isinstance(value, Mapping):
            return self.charge(ITEM) + sum(self.measure(key) + self.measure(item) for key, item in value.items())
        if isinstance(value, Collection):
            return self.charge(ITEM) + sum(self.measure(item) for item in value)
        return self.charge(ITEM)

    def compared(self, left: Any, right: Any) -> None:
        """Charge what comparing two values, or looking for one in the other, may touch: no more than the smaller has."""
        nested = [isinstance(value, Collection) and not isinstance(value, str) for value in (left, right)]
        if not any(nested):
            texts = [len(value) for value in (left, right) if isinstance(value, str)]
            self.charge(min(texts, default=1) + max(texts, default=0) // _SEARCHED)
        elif all(nested):
            self.measure(left)
            self.measure(right)
        else:  # a plain value meets the items of the other one by one, and goes into none of them
            self.charge(sum(len(value) for value in (left, right) if isinstance(value, Collection)))

    def made(self, value: Any) -> Any:
        """Pass on a value that a template made, unless it is too large."""
        if isinstance(value, Iterator):
            value = [item for item in value if self.charge(1)]
        if isinstance(value, Collection):
            if len(value) > MAX_PIECE:
                raise _TooMuch(f"a value longer than {MAX_PIECE}")
            self.charge(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _TooMuch(f"a number of more than {MAX_BITS} bits")
        return value

    def before(self, name: str, arguments: list[Any], prints: bool) -> None:
        """Refuse a call whose result could outgrow the caps before it can be measured."""
        product = 1
        for value in arguments:
            if prints or isinstance(value, str):
                product *= 1 + self.measure(value)
            elif hasattr(value, "__len__"):
                product *= 1 + self.charge(len(value))
        if name in GROWING and product > MAX_WORK:
            raise _TooMuch(f"{name}() that could make {product} characters")
        if name in PADDING:
            _refuse_width(arguments)
        if name in ("format", "format_map"):
            _refuse_format(arguments)


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks what an assistant said; rendering passes its body through."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own spelling)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with every loop, call, filter, product and output charged to one meter."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, loop_charge: int) -> None:
        self.meter = _Meter()
        self.loop_charge = loop_charge
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constant folding would run filters before any meter does
            extensions=[_GenerationTag, LoopControlExtension],
            finalize=self._printed,
        )
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": self._to_json, "_metered_loop": self._loop, "_metered_concat": self._concat}
        self.filters |= {"_metered_compare": self._compare, "_metered_key": self._printed}
        self.tests |= {name: self._comparing(self.tests[name]) for name in COMPARING_TESTS}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Metering().visit(super()._parse(source, name, filename))

    def _printed(self, value: Any) -> Any:
        self.meter.measure(value)
        return value

    def _loop(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.meter.charge(self.loop_charge)
            yield item

    def _concat(self, parts: list[Any]) -> str:
        self.meter.measure(parts)
        return self.meter.made("".join(map(str, parts)))

    def _compare(self, values: list[Any], names: list[str]) -> Any:
        """`a < b < c` is a < b and b < c."""
        found: Any = True
        for name, left, right in zip(names, values, values[1:], strict=False):
            self.meter.compared(left, right)
            if not (found := COMPARISONS[name](left, right)):
                break
        return found

    def _comparing(self, test: Callable[..., Any]) -> Callable[..., Any]:
        def metered(left: Any, right: Any) -> Any:
            self.meter.compared(left, right)
            return test(left, right)

        return metered

    def _to_json(self, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML, which a prompt is not
        self.meter.before("indent", [value, indent], prints=True)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.meter.made(text)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*arguments: Any, **named: Any) -> Any:
            self.meter.before(name, [*arguments, *named.values()], prints=name not in HANDING)
            return self.meter.made(function(*arguments, **named))

        metered.__dict__.update(getattr(function, "__dict__", {}))  # where Jinja marks what it passes
        return metered

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        self.meter.charge(self.loop_charge)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        name = getattr(obj, "__name__", "")
        self.meter.before(name, [owner, *arguments, *named.values()], prints=name in PRINTING)
        if name in COMPARING:
            for value in [owner, *arguments, *named.values()] if name in ("count", "index") else arguments:
                self.meter.measure(value)
        return self.meter.made(super().call(context, obj, *arguments, **named))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):  # which is hashed with all that is in it
            self.meter.measure(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _refuse_width([left, right])
        if operator == "%" and isinstance(left, str):
            self.meter.measure(right)
            _refuse_format([left])
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > MAX_PIECE:
                    raise _TooMuch(f"a value longer than {MAX_PIECE}")
        return self.meter.made(super().call_binop(context, operator, left, right))


class _Metering(NodeTransformer):
    """Puts the meter where the sandbox has no hook: into every loop, key and comparison, and in place of `a ~ b`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_metered_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_metered_concat", [], [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Filter:
        self.generic_visit(node)
        values = nodes.List([node.expr, *(operand.expr for operand in node.ops)], lineno=node.lineno)
        names = nodes.Const([operand.op for operand in node.ops], lineno=node.lineno)
        return nodes.Filter(values, "_metered_compare", [names], [], None, None, lineno=node.lineno)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = nodes.Filter(node.key, "_metered_key", [], [], None, None, lineno=node.lineno)
        return node


def _refuse_width(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise _TooMuch(f"the number {value} as a width or an exponent")


def _refuse_format(values: Iterable[Any]) -> None:
    for text in values:
        digits = "".join(char if char.isdigit() else " " for char in str(text)).split()
        if "%*" in str(text) or ":{" in str(text) or any(len(run) > 3 for run in digits):
            raise _TooMuch("a format with a wide field")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(value: Any, where: str) -> Any:
    """Rebuild a message out of JSON's own types, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise InputError(f"{where}: found a {type(value).__name__}, expected text, numbers, lists or objects")


class ChatTemplate:
    """A compiled chat template: `render(messages)` is the text a model was trained to read."""

    def __init__(self, source: str, where: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise InputError(
                f"{where}: chat_template: found {len(source)} characters, expected at most {MAX_TEMPLATE_CHARS}"
            )
        self.source, self.field = source, f"{where}: chat_template"
        self._lock = threading.Lock()
        # every turn of a loop is charged the constant text it could print, so constants need no count of their own
        self._sandbox = _Sandbox(loop_charge=max(len(source), TURN))
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.field}: found {error.message} at line {error.lineno}, expected Jinja") from None
        except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
            raise InputError(f"{self.field}: found {type(error).__name__}, expected Jinja that compiles") from None

    def render(self, messages: Any, arguments: Mapping[str, Any]) -> str:
        """The text for a conversation; `arguments` are what the template may also read (special tokens, switches)."""
        chat = _conversation(messages)
        with self._lock:  # the meter counts one rendering at a time
            self._sandbox.meter.spent = 0
            try:
                return self._template.render(_plain(arguments, "template arguments") | {"messages": chat})
            except _TooMuch as error:
                raise InputError(f"{self.field}: found {error}, expected a template within the caps") from None
            except Exception as error:  # whatever a template does wrong is the template's or the conversation's fault
                said = str(error).replace("\n", " ") or type(error).__name__
                raise InputError(f"{self.field}: found {said}, expected these messages to render") from None


def _conversation(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise InputError(f"messages: found a {type(messages).__name__}, expected a list of {{role, content}}")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            shown = (
                f"keys {sorted(map(str, message))}" if isinstance(message, Mapping) else f"a {type(message).__name__}"
            )
            raise InputError(f"messages[{index}]: found {shown}, expected an object with role and content")
        # templates print a null content as the word None; a missing key they handle
        chat.append({key: value for key, value in _plain(message, f"messages[{index}]").items() if value is not None})
    if not chat:
        raise InputError("messages: found none, expected at least one")
    return chat
