"""Templates of strangers: the text is transformers' own, nothing is within reach, and every flood stops early."""

import json
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafit.data.chat import DATE, ChatTemplate
from lorafit.data.prices import CHARACTERS, PER_PAIR, PER_STEP
from lorafit.data.sandbox import LONGEST, Program
from lorafit.errors import DataError, UsageError

TALK = [
    {"role": "user", "content": "  Hello <b>there</b>\n"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"b": 1.5, "a": None, "é": [1]}}]},
    {"role": "user", "content": ""},
]


def rendered(template: str, messages: Any = TALK) -> str:
    return Program(template, DATE).render(messages, tools=None)


# --- the same text as transformers ------------------------------------------------------------------------

SAME = {
    "loop variables": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}"
    "{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.previtem.role if not loop.first }}"
    "{{ loop.nextitem.role if not loop.last }}"
    "{{ loop.cycle('x', 'y') }}{{ loop.changed(m.role) }}{{ loop }} {% endfor %}",
    "loop over what has no length": "{% for m in messages|map(attribute='role') %}{{ loop.length }}{{ loop.last }}"
    "{{ m }}{% endfor %}{% for k, v in messages[0]|items %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}",
    "recursive loop": "{% for x in [[1, [2, 3]], [4]] recursive %}{{ loop.depth }}{{ loop.length }}{{ loop.last }}"
    "{% if x is iterable %}<{{ loop(x) }}>{% else %}{{ x }}{% endif %}{% endfor %}",
    "filtered loop": "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{% else %}none{% endfor %}{% for m in messages if m.role == 'tool' %}{% else %}none{% endfor %}",
    "break and continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}"
    "{% endif %}{{ i }}{% else %}never{% endfor %}",
    "nested loops": "{% for a in 'ab' %}{% set outer = loop %}{% for b in [1, 2] %}{{ outer.index }}{{ a }}{{ b }}"
    "{% endfor %}{% endfor %}",
    "branches": "{% for i in range(4) %}{% if i == 0 %}a{% elif i == 1 %}{% elif i == 2 %}c{% else %}d{% endif %}"
    "{{ 'odd' if i is odd else 'even' }}{{ 'x' if i > 2 }}{% endfor %}",
    "macros": "{% macro m(a, b=[1, 2], c='') %}{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}{% if caller %}"
    "({{ caller(3) }}){% endif %}{% endmacro %}{{ m(1) }}{{ m(1, 2, 3, 4, d=5) }}{% call(x) m(0) %}<{{ x }}>"
    "{% endcall %}{{ m.name }}{{ m.arguments }}",
    "fibonacci": "{% macro f(n) %}{{ n if n < 2 else f(n - 1)|int + f(n - 2)|int }}{% endmacro %}{{ f(9) }}",
    "scopes": "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% with x = 3 %}{{ x }}{% endwith %}"
    "{% set ns = namespace(x=1, self=2) %}{% for i in [1] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}"
    "{{ ns.self }}{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set t %}<{{ x }}>{% endset %}{{ t }}"
    "{% block b %}{{ self }}{% endblock %}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ m.content }}{{ loop.index }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "white space": "  {% if true %}\n    a\n  {%- else -%}\n  b\n  {% endif %}\n{# c #}\n {{ 'd' }}\n"
    "{% raw %}{{ {% endraw %}\n",
    "helpers": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('; ') %}"
    "{{ j() }}{{ j() }}{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 1) }}{{ range(3)|list }}"
    "{{ range(2, 9, 3)|list }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{{ '<' ~ '>' }}{{ '<'|safe }}{% endautoescape %}{{ '<' ~ '>' }}",
}
EXPRESSIONS = {
    "json": (
        "messages|tojson", "messages|tojson(indent=2)", "messages|tojson(ensure_ascii=true)", "'é\n'|tojson",
        "messages[1]|tojson(sort_keys=true, separators=(',', ':'))", "messages[1]|tojson(indent='-')",
        "[1.0, none, true, 10**20, {}, [], {1: 2, none: 3}]|tojson",
    ),
    "dates": (
        "strftime_now('%d %b %Y')", "strftime_now is defined",
    ),
    "operators": (
        "1 + 2 * 3 - 4 / 2", "7 // 2", "7 % 3", "2 ** 10", "-1", "2 ** -1", "'a' * 3", "2 * [1]", "[1] + [2]",
        "'a' + 'b'", "'a' ~ 1 ~ none ~ [1]", "'%s and %05.1f%%' % ('x', 1.5)", "'%(a)s' % {'a': 1}",
    ),
    "comparisons": (
        "1 < 2 < 3", "1 < 2 > 3", "'a' in 'abc'", "'a' not in ['b']", "[1, 2] == [1, 2]", "not 1 == 2 and 3 or 4",
        "messages[0] in messages", "(1, 'a') < (1, 'b')",
    ),
    "subscripts": (
        "messages[0]['role']", "messages[-1].role", "messages[1:][0].role", "'abcdef'[::-2]",
        "messages[0].nothing is defined", "messages[9] is undefined", "{('a', 1): 2}[('a', 1)]", "nothing",
    ),
    "methods": (
        "' a '.strip()", "'a,b'.split(',')", "' a  b '.split()", "'a-b-c'.rsplit('-', 1)", "'ab'.upper()",
        "'aXbX'.replace('X', '--', 1)", "'-'.join(['a', 'b'])", "'7'.zfill(3)", "'a'.center(5, '*')", "'a'.ljust(3)",
        "'a\tb'.expandtabs(4)", "'abc'.partition('b')", "'abcb'.rfind('b')", "'abc'.startswith(('x', 'a'))",
        "'{} {x[0]!r:>5} {{}}'.format(1, x=['a'])", "'{a.b}'.format_map({'a': namespace(b=1)})",
        "'a\nb'.splitlines()", "messages[0].items()|list", "messages[0].get('x', 'y')", "[3, 1].index(1)",
        "(5).bit_count is defined",
    ),
    "filters": (
        "messages[0].content|trim", "messages|length", "[3, 1, 2]|sort|join('-')", "'ab cd'|title",
        "messages|map(attribute='role')|unique|list", "messages|selectattr('role', 'equalto', 'user')|list|length",
        "messages|groupby('role')|map('first')|join", "[1, 2, 3, 4]|batch(3, 0)|list", "[1, 2, 3]|slice(2)|list",
        "['a', '', 'b']|select|map('upper')|list", "[1, 2]|reject('odd')|first", "[1, 2]|sum(start=3)",
        "2.567|round(1)", "'a'|center(5)", "'a\nb'|indent(2, true)", "'aXb'|replace('X', 'y')",
        "'%d-%s'|format(1, 'a')", "'5'|int + 1", "{'b': 1, 'a': 2}|dictsort", "nothing|default('d')", "'<b>'|e",
        "'<b>'|safe ~ '<c>'", "'abc'|first", "'a b c'|wordcount", "'long text here'|truncate(8)",
        "[1, 2]|string|length", "'a b'|urlencode", "'abc'|list", "[[1, 2], [3]]|sum(start=[])",
        "messages|map(attribute='content')|join(', ')", "[1, [2]]|last", "5|abs", "'abc'|reverse", "{'a': 1}|xmlattr",
        "1536|filesizeformat", "[2, 1]|min",
    ),
    "tests": (
        "1 is odd", "4 is divisibleby 2", "'a' is string", "'a' is in 'abc'", "1 is eq(1)", "messages is sequence",
        "messages[0] is mapping", "none is none", "'A' is upper", "1.0 is float", "true is boolean", "1 is sameas 1",
        "'upper' is filter", "raise_exception is callable",
    ),
}  # fmt: skip
SAME |= {name: " ".join("{{ " + expression + " }}" for expression in those) for name, those in EXPRESSIONS.items()}


@pytest.mark.parametrize("name", SAME)
def test_the_text_is_transformers_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return DATE

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)
    (theirs,), _ = render_jinja_template([TALK], chat_template=SAME[name])
    assert rendered(SAME[name]) == theirs
    assert theirs


def test_a_template_can_refuse_in_its_own_words() -> None:
    with pytest.raises(Exception, match=r"^only users$"):
        rendered("{{ raise_exception('only users') }}")


# --- nothing is within reach ------------------------------------------------------------------------------

ESCAPES = (
    "''.__class__.__mro__",
    "messages.__init__.__globals__",
    "''|attr('__class__')",
    "'{0.__class__}'.format(1)",
    "'{0[__class__]}'.format('')",
    "'{a.__class__}'.format_map({'a': 1})",
    "(('{0.__class__}'|attr('format'))(1))",
    "[1]|map(attribute='__class__')|list",
    "raise_exception.__globals__",
    "strftime_now.__self__",
    "strftime_now.__func__.__globals__",
    "cycler.__init__.__globals__",
    "cycler.mro()",
    "namespace.__mro__",
    "dict.__class__",
    "self._TemplateReference__context",
    "range.__globals__",
    "(''.maketrans).__self__",
    "messages.append(1)",
    "messages.clear()",
    "messages[0].update(role='system')",
    "messages[0].pop('role')",
    "messages[0].__setitem__('role', 'system')",
    "messages.sort()",
    "namespace(_x=1)",
    "namespace({'__class__': 1})",
    "'a'.encode()",
    "'a'.translate({})",
    "(1).to_bytes(1, 'big')",
    "(1).from_bytes([1], 'big')",
    "('<b>'|safe).striptags()",
)


@pytest.mark.parametrize("expression", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(expression: str) -> None:
    """What is out of reach is not defined; to use it is an error."""
    messages = json.loads(json.dumps(TALK))
    with suppress(SecurityError):
        assert rendered("{{ " + expression + " }}", messages) in ("", "[Undefined]")
    assert messages == TALK


def test_a_namespace_takes_no_hidden_name_later_either() -> None:
    with pytest.raises(SecurityError, match="hidden name"):
        rendered("{% set ns = namespace() %}{% set ns._x = 1 %}")


@pytest.mark.parametrize("tag", ["{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as x %}"])
def test_a_template_loads_no_other(tag: str) -> None:
    with pytest.raises(TypeError, match="no loader"):
        rendered(tag)


# --- every flood stops ------------------------------------------------------------------------------------


def grow(body: str, start: str = "'a'") -> str:
    return "{% set ns = namespace(s=" + start + ") %}{% for i in range(64) %}{% set ns.s = " + body + " %}{% endfor %}"


def again(body: str) -> str:
    return "{% for i in range(100000) %}{% for j in range(100000) %}" + body + "{% endfor %}{% endfor %}"


LONG = "{% set long = 'ab' * 250000 %}"
SHARED = grow("[ns.s, ns.s]", "[1]") + "{% set a = ns.s %}" + grow("[ns.s, ns.s]", "[1]") + "{% set b = ns.s %}"
TUPLE = grow("(ns.s, ns.s)", "(1, 2)")
FLOODS = {
    # loops, calls and what stands in them
    "nested ranges": again(""),
    "nested ranges that write": again("x"),
    "a loop that keeps nothing": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}"
    "{% endfor %}",
    "a loop over characters": "{% for a in 'x' * 1000000 %}{% for b in 'x' * 1000000 %}{% endfor %}{% endfor %}",
    "a loop with much in it": again("{% set x = i %}" * 1000),
    "a loop with long text in it": again("x" * 100000),
    "a macro with long defaults": "{% macro m(a=[" + "1," * 5000 + "]) %}{% endmacro %}" + again("{% set x = m() %}"),
    "fibonacci": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 2) if n > 1 }}{% endmacro %}{{ f(90) }}",
    "a macro for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block for ever": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 90 }}{% endfor %}",
    "a recursive loop for ever": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "nested call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 30 + "x"
    + "{% endcall %}" * 30,
    "cycler": "{% set c = cycler(*range(100000)) %}" + again("{{ c.next() }}"),
    "joiner": LONG + "{% set j = joiner(long) %}" + again("{{ j() }}"),
    "lazy filters": again("{% set x = range(100000)|reject|first %}"),
    "lazy filters of lazy filters": again("{% set x = range(100000)" + "|select" * 100 + "|first %}"),
    "a chain of lazy filters": "{% set ns = namespace(g=[1]) %}{% for i in range(100000) %}"
    "{% set ns.g = ns.g|map('int') %}{% endfor %}{{ ns.g|list }}",
    "looking up": "{% set ns = namespace() %}{% set ns.a = ns %}"
    "{{ ([ns] * 1000)|map(attribute='a' ~ '.a' * 10000)|list }}",
    # text that grows
    "times": "{{ 'A' * 10**9 }}",
    "times, the other way": "{{ 10**9 * 'A' }}",
    "~ doubling": grow("ns.s ~ ns.s"),
    "+ doubling": grow("ns.s + ns.s"),
    "* doubling": grow("ns.s * 2"),
    "macro doubling": "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + grow("m(ns.s)"),
    "block doubling": "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set x %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = x %}{% endfor %}",
    "% width": "{{ '%1000000000d' % 1 }}",
    "% width of a name": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "% width that is given": "{{ '%*d' % (10**9, 1) }}",
    "% precision": "{{ '%.1000000000f' % 1.5 }}",
    "% again and again": LONG + "{{ ('%(a)s' * 1000) % {'a': long} }}",
    "|format": "{{ '%1000000000d'|format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a computed width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format behind brackets": "{{ '{0[:}]:{1}}'.format({':}': 5}, 10**9) }}",
    "format again and again": LONG + "{{ ('{0}' * 1000).format(long) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "odd as a format": "{{ '%1000000000d' is odd }}",
    "divisibleby as a format": "{{ ['%1000000000d']|select('divisibleby', 3)|list }}",
    "round as a repetition": "{{ 'a'|round(9, 'floor') }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "|center": "{{ 'a'|center(width=10**9) }}",
    "|indent": "{{ 'a\nb'|indent(10**9) }}",
    "|indent by a text": LONG + "{{ ('a\n' * 9999)|indent(long) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace of nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "|replace": "{{ ('a' * 100000)|replace(new='b' * 100000, old='a') }}",
    "|replace in a block": "{% filter replace('a', 'b' * 100000) %}" + "a" * 100000 + "{% endfilter %}",
    "join": "{{ ('b' * 100000).join('a' * 100000) }}",
    "|join": "{{ range(100000)|map('string')|join('b' * 100000) }}",
    "slices that are kept": LONG + "{% set ns = namespace(l=[]) %}" + again("{% set ns.l = ns.l + [long[1:]] %}"),
    "strftime": "{{ strftime_now('%B' * 1000000) }}",
    "tojson with a wide indent": "{{ [1]|tojson(indent=10**9) }}",
    "tojson with a long separator": "{{ range(100000)|list|tojson(separators=('a' * 100000, ':')) }}",
    "tojson of something deep": grow("[ns.s]", "[1]") + again("{{ ns.s|tojson(indent=99) }}"),
    # lists that grow
    "list doubling": grow("ns.s + ns.s", "[1]"),
    "a list many times": "{{ ([1] * 10**9)|length }}",
    "a text in characters": "{{ ('ab' * 10**6)|list|length }}",
    "a text in words": "{{ ('a ' * 10**6).split()|length }}",
    "a text in pieces": "{{ ('a,' * 10**6).split(',')|length }}",
    "a text in lines": "{{ ('a\n' * 10**6).splitlines()|length }}",
    "|batch": "{{ [1]|batch(10**9, 0)|list|length }}",
    "|slice": "{{ [1]|slice(10**9)|first }}",
    "|sum of lists": "{{ ([[1] * 1000] * 1000)|sum(start=[])|length }}",
    "lists of lists": "{% set ns = namespace(l=[]) %}" + again("{% set ns.l = [ns.l, {}, [], {}] %}"),
    "namespaces in namespaces": "{% set ns = namespace(l=0) %}" + again("{% set ns.l = namespace(l=ns.l) %}"),
    # a little list that is very long to go through
    "writing": SHARED + "{{ a }}",
    "|string": SHARED + "{{ a|string|length }}",
    "|tojson": SHARED + "{{ a|tojson|length }}",
    "~": SHARED + "{{ (a ~ '')|length }}",
    "%": SHARED + "{{ '%s' % [a] }}",
    "format of a list": SHARED + "{{ '{}'.format(a) }}",
    "==": SHARED + "{{ a == b }}",
    "in": SHARED + "{{ a in [b] }}",
    "is eq": SHARED + "{{ a is eq(b) }}",
    "index": SHARED + "{{ [a].index(b) }}",
    "|sort": SHARED + "{{ [a, b]|sort }}",
    "loop.changed": SHARED + "{% for i in [a, b] %}{{ loop.changed(i) }}{% endfor %}",
    "raise_exception": SHARED + "{{ raise_exception(a) }}",
    "a key": TUPLE + "{{ {ns.s: 1}|length }}",
    "a subscript": TUPLE + "{{ {}[ns.s] }}",
    "get": TUPLE + "{{ {}.get(ns.s) }}",
    "|unique": TUPLE + "{{ [ns.s]|unique|list|length }}",
    # work without a result
    "searching": LONG + again("{% set x = 'zz' in long %}"),
    "searching from the end": "{{ ('a' * 10**6).rfind('b' + 'a' * 10**5) }}",
    "strip": "{{ ('a' * 10**6).strip('b' * 10**6 ~ 'a') }}",
    "a number in a range": again("{% set x = 1.5 in range(100000) %}"),
    "upper": LONG + again("{% set x = long|upper %}"),
    # numbers
    "10 ** 10 ** 10": "{{ 10 ** (10 ** 10) }}",
    "* squaring": grow("ns.s * ns.s", "3"),
    "a long hexadecimal": "{% set x = 0x" + "f" * 250000 + " %}{{ x // 3 > 1 }}",
    "|int": "{{ ('1' * 10**6)|int(base=2) // 3 > 1 }}",
    "|round": "{{ 1|round(10**8, 'floor') }}",
    # what is left out, and what Jinja would work out while it compiles
    "lipsum": "{{ lipsum(100000) }}",
    "|wordwrap": "{{ ('a' * 10**6)|wordwrap(1) }}",
    "|urlize": "{{ ('(a)' * 10**5)|urlize }}",
    "|striptags": "{{ ('<!---->' * 10**5)|striptags }}",
    "a constant": "{{ ('a'|center(9**9))|length }}{{ '%1000000000d'|format(1)|length }}",
    "a way to the purse": "{{ [-10**9]|map('pay steps')|list }}" + again(""),
    # programs that are too long
    "parentheses": "{{ " + "(" * 10000 + "1" + ")" * 10000 + " }}",
    "sums": "{{ 1" + "+1" * 10000 + " }}",
    "attributes": "{{ a" + ".a" * 10000 + " }}",
    "branches": "{% if a %}" * 5000 + "{% endif %}" * 5000,
    "words": "{{ a }}" * 100000,
    "characters": "x" * (LONGEST + 1),
}  # fmt: skip
MEGABYTES = 160
PROGRAM = f"""
import json, resource, sys
from datetime import datetime
from lorafit.data.sandbox import Program

floods = json.load(sys.stdin)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + {MEGABYTES} * 2**20,) * 2)
outcomes = {{}}
for name, template in floods.items():
    try:
        outcomes[name] = "RENDERED " + Program(template, datetime(2026, 1, 1)).render([])[:100]
    except Exception as error:
        outcomes[name] = type(error).__name__ + ": " + str(error)
json.dump(outcomes, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What becomes of every flood where little memory can be had."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("how much memory is taken can be told on Linux only")
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(FLOODS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_stops_within_its_steps_and_little_memory(outcomes: dict[str, str], name: str) -> None:
    assert not outcomes[name].startswith(("RENDERED", "MemoryError")), outcomes[name]


def test_a_flood_is_one_line_that_names_the_template(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(FLOODS["nested ranges"])
    tokenizer.name_or_path = "some/model-7b"
    line = r"^the chat template of model-7b does more than the 50\d,\d{3} steps that this conversation may take: .*$"
    with pytest.raises(DataError, match=line):
        ChatTemplate(tokenizer)


def test_a_flood_that_waits_for_a_word_is_refused_when_it_comes(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{% if 'flood' in messages[0].content %}" + FLOODS["nested ranges"] + "{% endif %}"
    chat = ChatTemplate(tokenizer)
    assert chat.prompt_ids([{"role": "user", "content": "Hello"}])
    with pytest.raises(DataError, match=r"the chat template of .* does more than the .* use another chat_template$"):
        chat.prompt_ids([{"role": "user", "content": "flood"}])
    assert chat.prompt_ids([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(("text", "complaint"), [("x" * (LONGEST + 1), "262,145 char"), ("{{a}}" * 10001, "30,000 w")])
def test_a_huge_template_is_refused(byte_tokenizer: Any, tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(text * 3)
    for template, tokenizer in ((None, byte_tokenizer(text)), (str(file), byte_tokenizer())):
        with pytest.raises(UsageError, match=f"is not a Jinja template: it has {complaint}") as caught:
            ChatTemplate(tokenizer, template)
        assert "\n" not in str(caught.value)


# --- and nobody else notices ------------------------------------------------------------------------------


def test_the_same_rendering_takes_the_same_steps() -> None:
    program = Program("{% for m in messages %}{{ m.content|upper }}{% endfor %}", DATE)
    left = []
    for _ in range(3):
        program.render(TALK)
        left.append(program.budget.left)
    assert len({*left}) == 1
    assert 20 < program.budget.allowed - left[0] < 200


def test_the_budget_grows_with_the_conversation() -> None:
    program = Program("", DATE)
    program.render([])
    nothing = program.budget.allowed
    program.render([{"role": "user", "content": "x" * CHARACTERS * 1000}])
    assert program.budget.allowed - nothing == PER_STEP * 1006 + PER_PAIR  # six for what is not the content
    program.render([{}] * 100)
    assert program.budget.allowed - nothing == PER_STEP * 199 + PER_PAIR * 100**2


PAID = (
    "'ab' * 5000", "[1] * 5000", "'a'|center(9999)", "'a'.ljust(9999)", "('a\n' * 99)|indent('b' * 99)",
    "('a' * 99).replace('a', 'b' * 99)", "('a' * 99)|replace('a', 'b' * 99)", "('b' * 99).join('a' * 99)",
    "range(99)|join('b' * 99)", "'%999d' % 1", "'%(a)s' * 99 % {'a': 'b' * 99}", "('{0}' * 99).format('b' * 99)",
    "'{:9999}'.format(1)", "('a,' * 999).split(',')", "('a ' * 999).split()", "('a\n' * 999).splitlines()",
    "('ab' * 999)|list", "[1]|batch(999, 0)|list", "('\t' * 99).expandtabs(99)", "[[[[1]]]]|tojson(indent=99)",
    "('a' * 9999)[1:]", "('a' * 9999)|upper", "('a' * 9999).upper()", "[['a' * 99] * 99]|string", "'a' * 9999 ~ 'b'",
    "'a'.zfill(9999)", "range(9999)|list", "('é' * 999)|tojson(ensure_ascii=true)",
)  # fmt: skip


@pytest.mark.parametrize("expression", PAID)
def test_what_is_made_has_been_paid_for(expression: str) -> None:
    program = Program("{% set x = " + expression + " %}", DATE)
    program.render([])
    made = rendered("{{ " + expression + " }}")
    steps = program.budget.allowed - program.budget.left
    assert len(made) / CHARACTERS / 4 < steps < 6 * len(made), (steps, len(made))
