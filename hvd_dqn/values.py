"""Reads values as users write them (`1e6`, `64,64`, `{a: 8}`), and describes in words what is allowed."""

import datetime
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from hvd_dqn.errors import InputError

# Something that is called by its name: `Class`, `module:Class`, or `{module:Class: {keyword: value}}`.
Call = str | dict[str, dict[str, Any]]
DEEPEST = 30  # levels of lists and mappings: more would be an error, such as a list that holds itself


def read_value(written: Any, annotation: Any) -> Any:
    """`written` as a value of the type `annotation`, if its meaning is clear; pydantic checks the result.

    Text is read by the expected type, so `1e6` can be a whole number and `yes` cannot. Raises ValueError.
    """
    kind, is_optional = _without_none(annotation)
    if is_optional and isinstance(written, str) and written.strip().lower() in ("none", "null", "~"):
        return None
    if kind == tuple[Call, ...]:
        return tuple(_call(item) for item in _calls(written))
    if get_origin(kind) is tuple:
        return tuple(read_value(item, get_args(kind)[0]) for item in _items(written, get_args(kind)[0]))
    if get_origin(kind) is dict:
        is_text = isinstance(written, str) or (isinstance(written, list) and all(isinstance(w, str) for w in written))
        return plain(_mapping(written) if is_text else written)
    if kind in (int, float):
        if isinstance(written, bool):
            raise ValueError("no number")
        if isinstance(written, str):
            return _number(written)
        if isinstance(written, Real):  # NumPy's, too
            return int(written) if isinstance(written, Integral) else float(written)
    if written is False and get_origin(kind) is Literal and "off" in get_args(kind):
        return "off"  # which YAML takes for false unless it is quoted
    return written


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """The type, and whether `| None` follows it."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return kinds[0], len(kinds) < len(get_args(annotation))
    return annotation, False


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _items(written: Any, kind: Any) -> Sequence[Any]:
    """The items of a list: `64,64`, `[64, 64]` or `64 64`, in one word or several, or a single item."""
    if _without_none(kind)[0] is Path:
        return [written] if isinstance(written, str) else written
    if isinstance(written, list | tuple) and all(isinstance(item, str) for item in written):
        written = " ".join(written)
    if isinstance(written, str):
        return re.split(r"[,\s]+", text) if (text := written.strip().strip("[]()").strip().rstrip(",")) else []
    if isinstance(written, Real) and not isinstance(written, bool):
        return [written]
    if not isinstance(written, Sequence):
        raise ValueError("no list")
    return written


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as YAML and JSON can write it: mappings by names, lists, text, numbers, true, false and null.

    Tuples and arrays become lists, dates text. Raises ValueError for anything else.
    """
    if depth > DEEPEST:
        raise InputError(f"it is nested deeper than {DEEPEST} levels.")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise InputError(f"names must be text, also inside. Received: {name!r}. Quote it.")
        return {name: plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, datetime.date):
        return value.isoformat()
    if hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist(), depth + 1)
    raise InputError(
        "expected what YAML can write: numbers, text, true, false, null, lists and mappings. "
        f"Received: a {type(value).__name__}."
    )


def _calls(written: Any) -> Sequence[Any]:
    """The items of a list of calls, as YAML or JSON in one word or several, or a single one."""
    if isinstance(written, list | tuple) and all(isinstance(item, str) for item in written):
        words = " ".join(written)
        # A list of names from a file is in order already. On the command line a list is cut into words.
        written = words if any(character in words for character in "[]{}") else list(written)
    if isinstance(written, str):
        # `module:Class` is a name, because no space follows the colon.
        text = written.strip()
        try:
            written = read_yaml(text if text.startswith(("[", "{")) else f"[{text}]")
        except yaml.YAMLError as error:
            raise ValueError("no YAML") from error
    if isinstance(written, Mapping):
        written = [written]
    if not isinstance(written, list | tuple):
        raise ValueError("no list")
    return written


def _call(written: Any) -> Call:
    """A name alone if there are no arguments, so that what is equal is written equally."""
    name, arguments = written, None
    if isinstance(written, Mapping):
        if len(written) != 1:
            raise ValueError("not one name")
        ((name, arguments),) = written.items()
    if not isinstance(name, str) or not re.fullmatch(r"([A-Za-z_][\w.]*:)?[A-Za-z_]\w*", name):
        raise InputError(f"expected the name of a class, `Class` or `module:Class`. Received: {name!r}.")
    name = name.removeprefix("gymnasium.wrappers:")
    if arguments is None or arguments == {}:
        return name
    if not isinstance(arguments, Mapping):
        raise InputError(f"expected the arguments of `{name}` by name, {{keyword: value}}. Received: {arguments!r}.")
    return {name: plain(arguments)}


def _mapping(written: str | list[str]) -> Any:
    """`{name: value}` as YAML or JSON, or `name=value` in one word or several."""
    text = written if isinstance(written, str) else " ".join(written)
    try:
        if re.match(r"\s*[A-Za-z_]\w*=", text):
            _, *parts = re.split(r"(?:^|\s+)([A-Za-z_]\w*)=", text)
            return {name: read_yaml(value) for name, value in zip(parts[::2], parts[1::2], strict=True)}
        return read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("no YAML") from error


class _Loader(yaml.SafeLoader):
    """YAML with two corrections: `1e4` is a number, as in JSON, and a repeated name is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.value, key.start_mark.line + 1) if isinstance(key, yaml.ScalarNode) else (None, 0)
            if name is not None and name in lines:
                raise InputError(f"`{name}` is given twice, in lines {lines[name]} and {line}. Keep one of them.")
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, ValueError (of which InputError is one) or RecursionError."""
    return yaml.load(text, _Loader)


def expected(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """The allowed values of this type within pydantic's `limits`, in words: "a whole number, at least 1"."""
    kind, is_optional = _without_none(annotation)
    return _in_words(kind, limits) + (", or none" if is_optional else "")


def _in_words(kind: Any, limits: Sequence[Any]) -> str:
    if get_origin(kind) is Literal:
        *others, last = (f"`{choice}`" for choice in get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if kind == tuple[Call, ...]:
        return "names of classes, each alone or with its arguments, like [A, module:B, {C: {shape: [84, 84]}}]"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        within = item.__metadata__ if get_origin(item) is Annotated else ()
        if _without_none(item)[0] is Path:
            return "paths"
        if item is float:
            return "numbers, like -10,10"
        return ", ".join(["whole numbers", *(f"each {limit}" for limit in _limits(within)), "like 64,64"])
    if get_origin(kind) is dict:
        return "names with values of YAML, like {map_name: 8x8, config: {lanes_count: 4}}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return "".join(
        [words[kind], *(f", {limit}" if limit.startswith("at ") else f" {limit}" for limit in _limits(limits))]
    )


def _limits(limits: Sequence[Any]) -> list[str]:
    """The limits of pydantic's metadata, in words."""
    found = {
        name: value
        for limit in limits
        for each in getattr(limit, "metadata", [limit])
        for name in ("ge", "gt", "le")
        if (value := getattr(each, name, None)) is not None
    }
    if {"ge", "le"} <= found.keys():
        return [f"from {found['ge']:g} to {found['le']:g}"]
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    return [f"{words[name]} {value:g}" for name, value in found.items()]


def placeholder(annotation: Any) -> str:
    """The placeholder of an option's value in --help: its choices if there are any, else one word."""
    kind, _ = _without_none(annotation)
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        if kind == tuple[Call, ...]:
            return "'[CLASS, {CLASS: {NAME: VALUE}}]'"
        return {Path: "PATH ...", float: "X,X"}.get(_without_none(get_args(kind)[0])[0], "N,N")
    if get_origin(kind) is dict:
        return "'{NAME: VALUE}'"
    return {int: "N", float: "X", bool: "true|false", str: "TEXT", Path: "PATH"}[kind]
