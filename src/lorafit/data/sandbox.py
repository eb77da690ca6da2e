"""Chat templates are programs of strangers: they are rendered with nothing within reach, and on a budget.

The environment is the one in which transformers renders templates, and so is the text. It is asked for every operator,
filter, test, call and subscript anyway, and pays for them; the rest of a template is made to pay (`metered`): a body
(of a loop, a branch, a macro) for what stands in it whenever it is entered.
"""

import json
from collections.abc import Callable, Iterator, Sequence, Set
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from lorafit.data.prices import CALL, CHARACTERS, FREE_FILTERS, FREE_TESTS, LOOKUP, Budget, characters, extent

LONGEST, TOKENS = 2**18, 30_000  # characters and words of a template; the longest in TRL has 19,572 and 4,112
# Left out: what is random or takes far longer than its text is long, and is of no use to a conversation.
NO_FILTERS = {"pprint", "random", "striptags", "urlize", "wordwrap"}
METHODS = {*dir(str), "fromkeys"} - {"encode", "translate"}
READ, COPY, STEPS = "pay to read", "pay to copy", "pay steps"  # filters of ours: no template can write a space


@lru_cache(maxsize=8)
def compiled(text: str, today: datetime) -> "Program":
    """The template `text` as a program, to which it is always `today`."""
    return Program(text, today)


class Program:
    """A template, compiled. Its budget is that of one rendering: two at once would spend it together."""

    def __init__(self, text: str, today: datetime) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text):,} characters, and {LONGEST:,} are the most")
        self.budget = Budget()
        sandbox = Sandbox(self.budget, today)
        if len(list(islice(sandbox.lex(text), TOKENS))) == TOKENS:
            raise ValueError(f"it has {TOKENS:,} words or more")
        tree = sandbox.parse(text)
        self.names = frozenset(names(tree))
        self._template = sandbox.from_string(metered(tree))

    def render(self, messages: Sequence[Any], **others: Any) -> str:
        self.budget.start(messages, others)
        return self._template.render(messages=messages, **others)


class Sandbox(ImmutableSandboxedEnvironment):
    """Where a template runs."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, budget: Budget, today: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.budget, self.today = budget, today
        self.filters["tojson"] = self._tojson
        self.filters = {name: self._paid(name, f, FREE_FILTERS) for name, f in self.filters.items()}
        self.tests = {name: self._paid(name, test, FREE_TESTS) for name, test in self.tests.items()}
        for name in NO_FILTERS:
            del self.filters[name]
        self.filters |= {READ: _behind(budget.read), COPY: _behind(budget.copy), STEPS: _behind(budget.spend)}
        del self.globals["lipsum"]
        self.globals |= {"dict": TemplateDict(), "namespace": TemplateNamespace, "raise_exception": _raise}
        self.globals["strftime_now"] = self._strftime_now

    def _paid(self, name: str, function: Any, free: Set[str]) -> Callable[..., Any]:
        """The filter or test `function`. As it takes the context, Jinja does not call it while it compiles."""

        @pass_context
        def paid(context: Context, *args: Any, **keywords: Any) -> Any:
            if name not in free:
                args = _at_hand(args)
                self.budget.call(name, *args, *keywords.values())
            return context.call(function, *args, **keywords)

        return paid

    def call(self, context: Context, obj: Any, /, *args: Any, **keywords: Any) -> Any:
        """What a template calls: a method, a macro, a loop that calls itself, a global."""
        formatted = getattr(obj, "__wrapped__", None)  # around str.format the sandbox has put itself
        owner, name = getattr(formatted or obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str | int | float | type) and name not in METHODS:
            raise SecurityError(f"{name} is not for templates")
        self.budget.spend(CALL + len(args) + len(keywords))
        if formatted:
            fields = (args, keywords) if name == "format" else ((), *args)
            PaidFormat(self).vformat(str(owner), *fields)
        elif isinstance(owner, str | list | tuple):
            args = _at_hand(args)
            self.budget.call(name, owner, *args, *keywords.values())
        elif not isinstance(obj, Macro | LoopContext | BlockReference):
            self.budget.read(*args, *keywords.values())
        return super().call(context, obj, *args, **keywords)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.operate(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend(LOOKUP)
        self.budget.read(argument)
        return super().getitem(obj, argument)

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """`json.dumps` with the keywords that transformers gives it, paid for piece by piece."""
        self.budget.spend(extent(indent) * 1000 // CHARACTERS)  # JSON can be so deep
        options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        pieces = []
        for piece in json.JSONEncoder(**options).iterencode(x):
            self.budget.copy(piece)
            pieces.append(piece)
        return "".join(pieces)

    def _strftime_now(self, format: str) -> str:
        self.budget.spend(len(format) * 256 // CHARACTERS)  # what strftime makes of it at most
        return self.today.strftime(format)


class PaidFormat(SandboxedFormatter):
    """`str.format` for trial: each field is paid for before it is written."""

    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._env.budget.field(value, format_spec)
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
    """A namespace without hidden names, and whose text does not grow with what it holds."""

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
        raise SecurityError(f"a namespace has no hidden name such as {name!r}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _at_hand(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is only going to be made is made, so that it can be counted."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _behind(pay: Callable[[Any], None]) -> Callable[..., Any]:
    """A filter that changes nothing, and lets `pay` for what goes through it."""

    @pass_context
    def paid(context: Context, value: Any) -> Any:
        pay(value)
        return value

    return paid


def names(tree: nodes.Template) -> Iterator[str]:
    """What a template speaks of in its program: keys, attributes, and everything it compares with."""
    for attribute in tree.find_all(nodes.Getattr):
        yield attribute.attr
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield from (constant.value, *constant.value.split("."))


def metered(tree: nodes.Template) -> nodes.Template:
    """`tree`, made to pay for that for which the environment is not asked."""
    for written in list[Any](tree.find_all((nodes.Concat, nodes.Output))):
        written.nodes = [_filter(part, READ) for part in written.nodes]
    for compared in list[Any](tree.find_all((nodes.Compare, nodes.Operand))):
        compared.expr = _filter(compared.expr, READ)
    for pair in list(tree.find_all(nodes.Pair)):
        pair.key = _filter(pair.key, READ)
    for item in list(tree.find_all(nodes.Getitem)):
        if isinstance(item.arg, nodes.Slice):
            item.node = _filter(item.node, COPY)
    _count(tree)
    return tree


def _count(node: nodes.Node) -> int:
    """Let every body in `node` pay whenever it is entered; return what the rest of `node` costs."""
    text = getattr(node, "data", getattr(node, "value", None))
    cost = characters(text) if isinstance(text, str) else LOOKUP if isinstance(node, nodes.Getattr) else 1
    if isinstance(node, nodes.For) and node.test:
        node.test = nodes.And(_steps(_count(node.test)), node.test)
    for field, value in node.iter_fields():
        parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, nodes.Node)]
        inner = sum(map(_count, parts))
        if field == "body" or (field == "else_" and parts):
            defaults = sum(map(_count, getattr(node, "defaults", ())))  # a macro works them out at every call
            value.insert(0, nodes.ExprStmt(_steps(inner + defaults)))
        else:
            cost += inner
    return cost


def _steps(count: int) -> nodes.Expr:
    return nodes.Filter(nodes.Const(count), STEPS, [], [], None, None)


def _filter(node: nodes.Expr, how: str) -> nodes.Expr:
    constant = isinstance(node, nodes.Const | nodes.TemplateData)  # it has been counted
    return node if constant else nodes.Filter(node, how, [], [], None, None, lineno=node.lineno)
