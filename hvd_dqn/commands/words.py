"""Splits a command line into options and values, and explains the options for --help."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, get_origin

from hvd_dqn.config import Values
from hvd_dqn.errors import InputError, nearest
from hvd_dqn.values import expected, placeholder

Fields = Mapping[str, Any]  # pydantic's FieldInfo by the name of the option, with underscores
SHORT = {"output": ("-o",)}
Advice = Callable[[str, Callable[[str], str]], str]
LAUNCHERS = ("-np", "-n", "-H", "--np", "--hosts", "--hostfile", "--host-discovery-script", "--min-np", "--max-np")


def is_option(word: str) -> bool:
    """Whether `word` begins an option: a negative number does not."""
    return re.match(r"--?[A-Za-z]", word) is not None


def asks_for_help(words: Sequence[str]) -> bool:
    return "-h" in words or "--help" in words


def spelled(name: str) -> str:
    """An option as it is shown."""
    return f"--{name.replace('_', '-')}"


def is_flag(name: str, field: Any) -> bool:
    """Whether it is yes or no and takes no value. Settings, which have dotted names, always take one."""
    return field.annotation is bool and "." not in name


def fields_of(kind: type[Values]) -> dict[str, Any]:
    """The options of a command, by name."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def split(
    words: Sequence[str], known: Fields, prog: str, advice: Advice | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The options in `words` with their values, as text or as several texts, and the words that belong to no option.

    An option takes the next word. An option for a list or a mapping takes all words to the next option; a flag none.
    """
    given: dict[str, Any] = {}
    others: list[str] = []
    short = {letter: name for name, letters in SHORT.items() for letter in letters if name in known}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not is_option(word):
            others.append(word)
            continue
        option, equals, value = word.partition("=")
        name = short.get(option) or option.removeprefix("--").replace("-", "_")
        if name not in known or not (option in short or option.startswith("--")):
            raise InputError(unknown(option, known, prog, advice))
        if name in given:
            raise InputError(f"`{spelled(name)}` is given twice. Keep one of them.")
        if is_flag(name, known[name]):
            if equals:
                raise InputError(f"`{spelled(name)}` takes no value. Received: {value!r}.")
            given[name] = True
            continue
        following = next((i for i, each in enumerate(rest) if is_option(each)), len(rest))
        takes_several = get_origin(known[name].annotation) in (tuple, dict)
        values = [value] if equals else rest[: following if takes_several else min(following, 1)]
        if not any(values):
            raise InputError(
                f"`{spelled(name)}` needs a value: {expected(known[name].annotation, known[name].metadata)}."
            )
        rest = rest if equals else rest[len(values) :]
        given[name] = values if len(values) > 1 else values[0]
    return given, others


def unknown(option: str, known: Fields, prog: str, advice: Advice | None = None) -> str:
    """The message about an option that is not `known`. `advice` tells which setting may be meant."""
    if option in LAUNCHERS:
        launcher = f"horovodrun -np 2 {' '.join(prog.split()[:2])} ..."
        return f"`{option}` is an option of the launcher: write it before hvd-dqn, as in: {launcher}"
    name = option.lstrip("-").replace("-", "_")
    meant = nearest(spelled(name), [spelled(each) for each in known if "." not in each], 0.7 if advice else 0.5)
    if advice and not meant:
        meant = advice(name, spelled)
    return f"There is no option `{option}`.{meant} See `{prog} --help`."


def show(*parts: str) -> NoReturn:
    """Prints help and ends the command. A closed pipe, as in `| head`, is no error."""
    try:
        print("\n\n".join(parts), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def explain(fields: Fields, values: Mapping[str, Any], without_dashes: str = "") -> str:
    """A group of options for --help: what each means, what it takes, its default and where that comes from."""
    width = min(max(shutil.get_terminal_size().columns, 80), 120)
    entries = []
    for name, field in fields.items():
        extra = field.json_schema_extra
        about = [f"{extra['meaning'][0].upper()}{extra['meaning'][1:]}."]
        head = placed(name) if name == without_dashes else ", ".join([*SHORT.get(name, ()), spelled(name)])
        if name != without_dashes and not is_flag(name, field):
            head += f" {placeholder(field.annotation)}"
            takes = expected(field.annotation, field.metadata)
            if takes.split(",")[0] not in ("text", "a path", "true or false") and not takes.startswith("`"):
                about.append(f"{takes[0].upper()}{takes[1:]}.")
            if extra["unit"]:
                about.append(f"Unit: {extra['unit']}.")
            about.append(f"Default: {shown(values[name])}.")
        if extra["source"]:
            about.append(f"Source: {extra['source']}.")
        indent = " " * 6
        text = textwrap.fill(
            " ".join(about), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        entries.append(f"  {head}\n{text}")
    return "\n".join(entries)


def placed(name: str) -> str:
    """An argument without dashes as it is shown."""
    return name.removesuffix("s").upper() + (" ..." if name.endswith("s") else "")


def shown(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
