"""Chat templates are programs of strangers: they are rendered with nothing within reach, and on a budget of steps.

The environment is the one in which transformers renders templates, and the text is the same. What is added is a price
for everything: a body (of a loop, a branch, a macro) costs what it holds whenever it is entered; an operation costs
what it reads and what it makes, and is paid for before it is done: one step for each item of a list and for each
`CHARACTERS` of a text. That bounds time and memory, and the same conversation is always taken or always refused.
"""

import json
import math
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Sequence, ValuesView
from datetime import datetime
from itertools import permutations
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from lorafit.errors import DataError

LONGEST = 2**20  # characters of a template
# What a rendering may take: so many steps, and so many for each that reading its input takes, and for each two messages.
STEPS, PER_STEP, PER_PAIR = 500_000, 64, 8
CALL, CHARACTERS = 6, 16
BITS = 4096  # of a whole number

FREE_FILTERS = frozenset(["count", "d", "default", "first", "last", "length"])
FREE_TESTS = frozenset(
    ["boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence", "string", "true", "undefined"]
)
LAZY = frozenset(["items", "map", "reject", "rejectattr", "select", "selectattr"])  # they hand on the items they are given
PIECES = LAZY | frozenset(["groupby", "list", "max", "min", "sort", "splitlines", "title", "unique", "wordcount"])  # a text in pieces
# They can take or make as much as the product of all that they are given.
PRODUCTS = frozenset(
    ["batch", "center", "expandtabs", "indent", "join", "ljust", "lstrip", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "slice", "strip", "trim", "zfill"]
)
NUMBERS = frozenset(["divisibleby", "even", "odd", "round"])  # with a text they would be a format, or make it long
# Left out: what is random, or takes far longer than its text is long, and is of no use to a conversation.
NO_FILTERS = frozenset(["pprint", "random", "striptags", "urlize", "wordwrap"])
METHODS = frozenset(dir(str)) - {"encode", "maketrans", "translate"} | {"fromkeys"}
WIDE = re.compile(r"[%)][-#0 +]*\d*\.?(\d{4}|\*)")  # a % format in 1,000 columns or more, or in computed ones

CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
READ, COPY, STEP = "pay to read", "pay to copy", "pay steps"  # filters of ours: no template can write a space


class Exhausted(DataError):
    """A template that does more than rendering its conversation takes."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Where a template runs. `left` is what is left of the budget of the rendering that is going on."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, today: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.left, self.today = 0, today
        self.filters["tojson"] = self._tojson
        self.filters = {name: self._priced(name, f, FREE_FILTERS) for name, f in self.filters.items()}
        self.tests = {name: self._priced(name, test, FREE_TESTS) for name, test in self.tests.items()}
        for name in NO_FILTERS:
            del self.filters[name]
        self.filters |= {READ: _behind(self.read), COPY: _behind(self.copy), STEP: _behind(self.spend)}
        del self.globals["lipsum"]
        self.globals |= {"dict": TemplateDict(), "namespace": TemplateNamespace, "raise_exception": _raise}
        self.globals["strftime_now"] = self._strftime_now

    def spend(self, steps: int) -> None:
        self.left -= max(steps, 1)  # a template that found a way to call this would gain nothing
        if self.left < 0:
            raise Exhausted("does far more work than this conversation takes")

    def copy(self, value: Any) -> None:
        """Pay for going through `value`, but not through what is in its items."""
        if isinstance(value, int):
            self.spend(1)
            if value.bit_length() > BITS:
                raise Exhausted(f"computes with whole numbers of more than {BITS:,} bits")
        else:
            self.spend(extent(value) // (CHARACTERS if isinstance(value, str) else 1))

    def read(self, *values: Any) -> None:
        """Pay for going through `values` to the last character in them: to compare, hash or write them."""
        pending = list(values)
        while pending:
            value = pending.pop()
            self.copy(value)
            if isinstance(value, CONTAINERS):
                pending += value
                pending += value.values() if isinstance(value, dict) else ()

    def price(self, name: str, subject: Any, *others: Any) -> None:
        """Pay for the filter, test or method `name` of `subject`."""
        self.spend(CALL)
        (self.copy if name in LAZY else self.read)(subject)
        before = self.left
        self.read(*others)
        if name in PIECES:
            self.spend(sum(len(value) for value in (subject, *others) if isinstance(value, str)))
        if name in PRODUCTS:
            self.spend(math.prod(map(extent, (subject, *others))) // CHARACTERS)
        if name in NUMBERS:
            if not isinstance(subject, int | float):
                raise TypeError(f"{name} is for numbers")
            self.spend(sum(map(extent, others)))
        if name == "sum":
            self.spend(extent(subject) ** 2 // CHARACTERS)
        if name in ("split", "rsplit"):
            separator = next((other for other in others if isinstance(other, str) and other), None)
            self.spend(subject.count(separator) if separator else len(subject))
        if name == "replace":
            made = (str(subject).count(old) * len(new) for old, new in permutations(map(str, others), 2))
            self.spend(max(made, default=0) // CHARACTERS)
        if name == "format":
            text = str(subject)
            if WIDE.search(text):
                raise Exhausted("writes something in 1,000 columns or more")
            self.spend(text.count("%") * (before - self.left + 1000 // CHARACTERS))

    def _priced(self, name: str, function: Callable[..., Any], free: frozenset[str]) -> Callable[..., Any]:
        """A filter or test that is paid for. As it takes the context, Jinja does not call it while it compiles."""

        @pass_context
        def priced(context: Context, *args: Any, **keywords: Any) -> Any:
            if name not in free:
                args = _at_hand(args)
                self.price(name, *args, *keywords.values())
            return context.call(function, *args, **keywords)

        return priced

    def call(self, context: Context, obj: Any, /, *args: Any, **keywords: Any) -> Any:
        """What a template calls: a method, a macro, a loop that calls itself, a global."""
        formatted = getattr(obj, "__wrapped__", None)  # the sandbox has put itself around str.format
        owner, name = getattr(formatted or obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | int | float | type) and name not in METHODS:
            raise SecurityError(f"{name} is not for templates")
        if isinstance(obj, Macro | LoopContext | BlockReference):
            self.spend(CALL + len(args) + len(keywords))
        elif formatted:
            fields = (args, keywords) if name == "format" else ((), *args)
            PricedFormat(self).vformat(owner, *fields)
        elif isinstance(owner, (str, *CONTAINERS)) and name not in ("get", "items", "keys", "values"):
            args = _at_hand(args)
            self.price(name, owner, *args, *keywords.values())
        else:
            self.read(*args, *keywords.values())
        self.spend(CALL)
        return super().call(context, obj, *args, **keywords)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.copy(left)
        self.copy(right)
        if operator == "%" and isinstance(left, str):
            self.price("format", left, right)
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            self.spend(extent(left) * extent(right) // (CHARACTERS if isinstance(left, str) or isinstance(right, str) else 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.copy(1 << min(abs(left).bit_length() * max(right, 0), BITS))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.read(argument)
        return super().getitem(obj, argument)

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """`json.dumps` with the keywords that transformers gives it, paid for piece by piece."""
        self.spend(extent(indent) * 1000 // CHARACTERS)  # JSON can be so deep
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        pieces = []
        for piece in json.JSONEncoder(**options).iterencode(x):
            self.copy(piece)
            pieces.append(piece)
        return "".join(pieces)

    def _strftime_now(self, format: str) -> str:
        self.spend(len(format) * 256 // CHARACTERS)  # what strftime makes of it at most
        return self.today.strftime(format)


class PricedFormat(SandboxedFormatter):
    """`str.format` done for trial: each field is paid for before it is written."""

    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._env.read(value, format_spec)
        self._env.spend(sum(int(width[:12]) for width in re.findall(r"\d+", format_spec)) // CHARACTERS)
        return super().format_field(value, format_spec)


class Generation(Extension):
    """The tag `{% generation %}`: what is in it is rendered in a scope of its own, as in transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Macro) -> Any:
        return caller()


class TemplateDict:
    """What templates know as `dict`: it makes one, and is no class whose attributes lead elsewhere."""

    def __call__(self, *args: Any, **keywords: Any) -> dict[Any, Any]:
        return dict(*args, **keywords)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """A namespace without hidden names, and whose text does not grow with what is in it."""

    def __init__(*args: Any, **keywords: Any) -> None:  # `self` may be among the keywords
        attributes = dict(*args[1:], **keywords)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace holds no hidden name such as {name!r}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _at_hand(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is only going to be made is made, so that it can be counted."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _behind(pay: Callable[[Any], None]) -> Callable[..., Any]:
    @pass_context
    def paid(context: Context, value: Any) -> Any:
        pay(value)
        return value

    return paid


def extent(value: Any) -> int:
    """How many characters or items there are in `value`; a whole number, which may be a width, counts as itself."""
    if isinstance(value, int):
        return max(1, abs(value))
    return max(1, len(value)) if isinstance(value, (str, range, *CONTAINERS)) else 1


def _metered(tree: nodes.Template) -> nodes.Template:
    """`tree` with what it does paid for, where the environment is not asked anyway."""
    for node in list(tree.find_all((nodes.Concat, nodes.Output))):
        node.nodes = [_paid(part, READ) for part in node.nodes]
    for node in list(tree.find_all((nodes.Compare, nodes.Operand))):
        node.expr = _paid(node.expr, READ)
    for node in list(tree.find_all(nodes.Pair)):
        node.key = _paid(node.key, READ)
    for node in list(tree.find_all(nodes.Getitem)):
        if isinstance(node.arg, nodes.Slice):
            node.node = _paid(node.node, COPY)
    _count(tree)
    return tree


def _paid(node: nodes.Expr, how: str) -> nodes.Expr:
    return node if isinstance(node, nodes.Const | nodes.TemplateData) else nodes.Filter(node, how, [], [], None, None, lineno=node.lineno)


def _count(node: nodes.Node) -> int:
    """Let every body in `node` pay whenever it is entered; return what the rest of `node` costs."""
    text = getattr(node, "data", getattr(node, "value", None))
    cost = 1 + (len(text) // CHARACTERS if isinstance(text, str) else 0)
    if isinstance(node, nodes.For) and node.test:
        node.test = nodes.And(_steps(_count(node.test)), node.test)
    for field, value in node.iter_fields():
        parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, nodes.Node)]
        inner = sum(map(_count, parts))
        if field == "body" or (field == "else_" and parts):
            each_time = inner + sum(map(_count, getattr(node, "defaults", ())))
            value.insert(0, nodes.ExprStmt(_steps(each_time)))
        else:
            cost += inner
    return cost


def _steps(count: int) -> nodes.Expr:
    return nodes.Filter(nodes.Const(count), STEP, [], [], None, None)


class Program:
    """A template, compiled."""

    def __init__(self, text: str, today: datetime) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text):,} characters, and {LONGEST:,} are the most")
        self.sandbox = Sandbox(today)
        self._template = self.sandbox.from_string(_metered(self.sandbox.parse(text)))

    def render(self, messages: Sequence[Any], **variables: Any) -> str:
        sandbox = self.sandbox
        sandbox.left = enough = 2**62
        sandbox.read(messages, variables)
        sandbox.allowed = STEPS + PER_STEP * (enough - sandbox.left) + PER_PAIR * len(messages) ** 2
        sandbox.left = sandbox.allowed
        return self._template.render(messages=messages, **variables)
