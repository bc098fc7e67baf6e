"""Flags of one command by tyro, with its error boxes folded into one sentence.

Flags win over the file given by `--config`, and the file over the defaults: the file is read first and
becomes the default that tyro shows and fills.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from uni3d.config.values import MAX_SEED, Schedule
from uni3d.errors import UsageError

T = TypeVar("T")

_REGISTRY = ConstructorRegistry()

_BOX = "╭╮╰╯│─━┌┐└┘┃"
_FLAG = re.compile(r"--[\w.-]+")


def parse_flags(kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """`arguments` as an instance of the dataclass `kind`; UsageError, in one sentence, if they do not fit.

    `--help` prints the flags with the values of `default` to stdout and raises SystemExit(0).
    """
    if {"-h", "--help"} & set(arguments):
        return _parse(kind, arguments, command, default)
    said = io.StringIO()
    # The box is folded again below, so it should break no lines; tyro draws it by the encoding of stdout.
    utf8 = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(utf8), _columns("500"):
            return _parse(kind, arguments, command, default)
    except SystemExit:
        sentence = fold_box(said.getvalue())
        raise UsageError(f"{sentence}; see uni3d {command} --help") from None


def _parse(kind: type[T], arguments: Sequence[str], command: str, default: T | None) -> T:
    parsed = tyro.cli(
        kind, args=list(arguments), prog=f"uni3d {command}", default=default, registry=_REGISTRY
    )
    return cast(T, parsed)


@_REGISTRY.primitive_rule
def _schedule_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    # Not `==`: tyro spells some of them typing.Tuple.
    if get_origin(info.type) is not tuple or get_args(info.type) != get_args(Schedule):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="VALUE | POSITION VALUE [POSITION VALUE ...]",
        instance_from_str=read_schedule,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=_schedule_words,
    )


def read_schedule(words: Sequence[str]) -> Schedule:
    """One number, which stays the same for the whole run, or pairs of fraction of the run and value.

    Raises ValueError for anything else.
    """
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return ((0.0, numbers[0]),)
    if not numbers or len(numbers) % 2:
        got = " ".join(words)[:80] or "nothing"
        raise ValueError(
            f"got {got}; expected one number, or pairs of fraction of the run and value such as 0 12 1 6"
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _schedule_words(schedule: Schedule) -> list[str]:
    if len(schedule) == 1:
        return [f"{schedule[0][1]:g}"]
    return [f"{number:g}" for pair in schedule for number in pair]


def read_numbers(flag: str, text: str, *, max_count: int = 10_000_000) -> Sequence[int]:
    """Whole numbers such as "7", "0-63" or "0-9,20-29", in that order; UsageError for anything else."""
    parts: list[range] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, flags=re.ASCII)
        first = int(found[1]) if found else 0
        last = int(found[2]) if found and found[2] else first
        if found is None or last < first or last > MAX_SEED:
            raise UsageError(f"{flag} is {text[:80]!r}; expected numbers such as 7, 0-63 or 0-9,20-29")
        parts.append(range(first, last + 1))
    count = sum(part.stop - part.start for part in parts)
    if count > max_count:
        raise UsageError(f"{flag} names {count} numbers; expected at most {max_count}")
    return parts[0] if len(parts) == 1 else [number for part in parts for number in part]


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to the flag `--name` before a lone `--`, read ahead of the real parsing."""
    value = None
    for position, word in enumerate(arguments):
        if word == "--":
            break
        if word == f"--{name}" and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def fold_box(text: str) -> str:
    """One sentence from a boxed message of tyro: its first paragraph, and the flag it suggests."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        is_rule = "─" in line and not re.search(r"[A-Za-z]", line)
        words = line.strip(_BOX + " ")
        if is_rule or not words or line.startswith("╭"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(words)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    asked, _, _ = text.partition("For full helptext")
    missing = re.findall(r"^│ {5}(\S.*?) *│$", asked, flags=re.MULTILINE)
    if missing and "Missing from" in text:
        return f"missing: {', '.join(missing)}"
    filled = [" ".join(paragraph) for paragraph in paragraphs if paragraph]
    if not filled:
        return " ".join(text.split())[:500] or "the options cannot be read"
    sentence = re.sub(r"^Error parsing (?!--)\w+: ", "", filled[0])
    sentence = re.sub(r"^Error parsing ", "", sentence)
    sentence = re.sub(
        r"invalid literal for int\(\) with base 10: (.*)$", r"\1 is not a whole number", sentence
    )
    sentence = re.sub(r"Exceeds the limit \(.*$", "the number is far too long", sentence)
    sentence = re.sub(r"could not convert string to float: (.*)$", r"\1 is not a number", sentence)
    sentence = sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() else sentence
    near = next((_FLAG.search(part) for part in filled if part.startswith("Perhaps you meant")), None)
    return f"{sentence}; did you mean {near[0]}?" if near else sentence.rstrip(".")


@contextlib.contextmanager
def _columns(width: str) -> Iterator[None]:
    """Pretend that the terminal is `width` columns wide."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = width
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
