"""Flags and config files, made from the dataclasses that a verb takes.

A verb is a function whose parameters are dataclasses; their fields are its flags and its keys in a config
file. Defaults give way to the file, the file to the flags. Values of both go through one conversion, so that
`--targets q_proj,v_proj`, `targets: q_proj,v_proj` and `targets = ["q_proj", "v_proj"]` mean the same.

jsonargparse was tried for this. It takes no `--max-length` for `max_length`, no `a,b` for a tuple, no `a=8`
for a mapping, no TOML and no help from field metadata; its errors take several lines and name no nearest flag.
"""

import argparse
import dataclasses
import inspect
import keyword
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorafit.errors import UsageError, nearest

Verb = Callable[..., None]
BARE = "_bare"
SWITCH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


def read(
    name: str,
    verb: Verb,
    arguments: Sequence[str],
    known: Iterable[str],
    default_file: Callable[[Mapping[str, str]], str | None] = lambda given: None,
) -> dict[str, Any]:
    """The keyword arguments of `verb`, called `name`, that the command line `arguments` asks for.

    `known` are the keys a config file may hold: all verbs share one file, and each takes what is its own. Without
    `--config`, `default_file` may name one for the flags that are given.
    """
    given = vars(_parser(name, verb).parse_args([_hyphens(argument) for argument in arguments]))
    file = given.pop("config", None) or default_file(given)
    written = read_file(Path(file), known) if file else {}
    keywords = {}
    for parameter, cls in configs(verb).items():
        hints = typing.get_type_hints(cls)
        values = {key: convert(written[key], hints[key], f"{file}: {key}") for key in hints if key in written}
        values |= {key: convert(given[key], hints[key], _flag(key)) for key in hints if key in given}
        keywords[parameter] = cls(**values)
    return keywords


def bare(*options: str) -> Callable[[Verb], Verb]:
    """Words without a flag before them are these options of the verb, in this order; `name*` takes all that follow."""

    def mark(verb: Verb) -> Verb:
        setattr(verb, BARE, options)
        return verb

    return mark


def configs(verb: Verb) -> dict[str, Any]:
    """The dataclasses that `verb` takes, by parameter."""
    return {name: p.annotation for name, p in inspect.signature(verb, eval_str=True).parameters.items()}


def names(verb: Verb) -> list[str]:
    """The names of all options of `verb`."""
    return [field.name for cls in configs(verb).values() for field in dataclasses.fields(cls)]


def read_file(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """A flat TOML, YAML or JSON file; a key that no verb knows is refused."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"{path}: config file cannot be read: {reason}") from error
    if path.suffix == ".toml":
        import tomllib

        try:
            values: Any = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path}: not TOML: {error}") from None
    elif path.suffix in (".yaml", ".yml", ".json"):
        import yaml

        try:
            values = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            # Not the error itself: it repeats the line, and with it whatever secret somebody put there.
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise UsageError(f"{path}{where}: not YAML: {problem or type(error).__name__}") from None
    else:
        raise UsageError(f"{path}: a config file ends in .toml, .yaml, .yml or .json")
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a config file holds 'name: value' lines, not a {type(values).__name__}")
    names = {str(name).replace("-", "_"): value for name, value in values.items()}
    names = {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in names.items()}
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"{path}: unknown key '{name}'{nearest(name, known)}")
    return names


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value`, text from a flag or anything from a file, as the type `hint`; an error says `where` it stood."""
    try:
        return _convert(value, hint)
    except (ValueError, TypeError):
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        meant = nearest(str(value), choices)
        raise UsageError(f"{where} must be {_expected(hint)}, not {value!r}{meant}") from None


def _convert(value: Any, hint: Any) -> Any:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return _convert_union(value, inner)
    if kind is typing.Literal and value in inner:
        return value
    if kind is bool:
        return SWITCH[str(value).lower()] if str(value).lower() in SWITCH else _refuse()
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, str | int) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(float(value)) else _refuse()
    if kind is tuple:
        parts = _parts(value)
        hints = inner[:1] * len(parts) if inner[-1] is ... else inner
        return tuple(_convert(part, of) for part, of in zip(parts, hints, strict=True))
    if kind is Mapping:
        pairs = value.items() if isinstance(value, dict) else (part.rsplit("=", 1) for part in _parts(value))
        return {key: _convert(item, inner[1]) for key, item in pairs}
    return _refuse()


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    if types.NoneType in members and str(value).lower() in ("none", "null"):
        return None
    if str in members and isinstance(value, str):
        return value
    return _convert(value, next(m for m in reversed(members) if m is not types.NoneType))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")] if value else []
    return list(value) if isinstance(value, list | tuple) else _refuse()


def _refuse() -> NoReturn:
    raise ValueError


def _expected(hint: Any, of: str = "") -> str:
    """`hint` in words: "a whole number or none"."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return " or ".join(_expected(member) for member in inner)
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is tuple:
        count = "" if inner[-1] is ... else f"{len(inner)} "
        return f"{count}{WORDS[inner[0]][1]} with commas between them"
    if kind is Mapping:
        return f"name={WORDS[inner[1]][0].split()[-1]} pairs with commas between them"
    return WORDS[hint][0]


WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "names"),
    bool: ("true or false", ""),
    types.NoneType: ("none", ""),
}


def _parser(name: str, verb: Verb) -> "_Parser":
    bare_words: tuple[str, ...] = getattr(verb, BARE, ())
    parser = _Parser(
        prog=name,
        usage=" ".join([f"lorafit {name}", *(f"[{word}]".upper() for word in bare_words), "--name value …"]),
        description=verb.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.bare = bare_words
    parser.add_argument("--config", metavar="FILE", help="TOML or YAML file with any of these; flags overrule it")
    for cls in configs(verb).values():
        group = parser.add_argument_group((cls.__doc__ or "").rstrip("."))
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_flag(group, field, hints[field.name])
    return parser


def _add_flag(group: Any, field: Any, hint: Any) -> None:
    text, default = field.metadata["help"], field.default
    if default not in (None, "", (), dataclasses.MISSING):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text += f" (default: {shown.lower() if hint is bool else shown})"
    text = text.replace("%", "%%")
    flag: dict[str, Any] = {"dest": field.name, "metavar": _metavar(hint), "help": text}
    if hint is bool:
        flag |= {"nargs": "?", "const": "true"}
        off = {"dest": field.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
        group.add_argument(_flag(f"no_{field.name}"), **off)
    group.add_argument(_flag(field.name), **flag)


def _metavar(hint: Any) -> str:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return _metavar(next(m for m in reversed(inner) if m is not types.NoneType))
    if kind is typing.Literal:
        return "|".join(map(str, inner))
    if kind is tuple:
        return f"{_metavar(inner[0])},…"
    if kind is Mapping:
        return f"NAME={_metavar(inner[1])},…"
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "NAME")


def _flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")  # `for_`: Python keeps the word for itself


def _hyphens(argument: str) -> str:
    """`--max_length=8` as `--max-length=8`; what is no flag stays."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


class _Parser(argparse.ArgumentParser):
    """argparse, but every complaint is raised, in one line and with the nearest name."""

    bare: tuple[str, ...] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        free = [name for name in self.bare if not hasattr(found, name.rstrip("*"))]
        for word in rest:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                known = [name for name in self._option_string_actions if name.startswith("--")]
                self.error(f"unknown flag '{flag}'{nearest(flag, known)}")
            if not free:
                self.error(f"'{word}' belongs to no flag: everything is given as --name value")
            name, many = free[0].rstrip("*"), free[0].endswith("*")
            setattr(found, name, f"{getattr(found, name)},{word}" if hasattr(found, name) else word)
            free = free if many else free[1:]
        return found

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message.removeprefix('argument ')}")
