"""Reads values as users write them (`1e6`, `64,64`, `{a: 8}`), and describes in words what is allowed."""

import re
import types
from collections.abc import Hashable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from hvd_dqn.errors import InputError


def read_value(written: Any, annotation: Any) -> Any:
    """`written` as a value of the type `annotation`, if its meaning is clear; pydantic checks the result.

    Text is read by the expected type, so `1e6` can be a whole number and `yes` cannot. Raises ValueError.
    """
    kind, is_optional = _without_none(annotation)
    if is_optional and isinstance(written, str) and written.strip().lower() in ("none", "null", "~"):
        return None
    if get_origin(kind) is tuple:
        return tuple(read_value(item, get_args(kind)[0]) for item in _items(written, get_args(kind)[0]))
    if get_origin(kind) is dict and isinstance(written, str | list):
        return _mapping(written)
    if kind in (int, float):
        if isinstance(written, bool):
            raise ValueError("no number")
        if isinstance(written, str):
            return _number(written)
        if isinstance(written, Real):  # NumPy's, too
            return int(written) if isinstance(written, Integral) else float(written)
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


def _mapping(written: str | list[str]) -> Any:
    """`{name: value}` as YAML or JSON, or `name=value` in one word or several."""
    words = written.split() if isinstance(written, str) else [str(word) for word in written]
    if words and all(re.match(r"[A-Za-z_]\w*=", word) for word in words):
        return {name: read_yaml(value) for name, _, value in (word.partition("=") for word in words)}
    try:
        return read_yaml(" ".join(words) if isinstance(written, list) else written)
    except yaml.YAMLError as error:
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
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        within = item.__metadata__ if get_origin(item) is Annotated else ()
        if _without_none(item)[0] is Path:
            return "paths"
        return ", ".join(["whole numbers", *(f"each {limit}" for limit in _limits(within)), "like 64,64"])
    if get_origin(kind) is dict:
        return "names with numbers, text or true and false, like {map_name: 8x8}"
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
        return "PATH ..." if _without_none(get_args(kind)[0])[0] is Path else "N,N"
    if get_origin(kind) is dict:
        return "'{NAME: VALUE}'"
    return {int: "N", float: "X", bool: "true|false", str: "TEXT", Path: "PATH"}[kind]
