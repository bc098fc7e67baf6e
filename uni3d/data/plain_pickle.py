"""The plain data in an old pickle, read without running anything.

The opcodes are walked with the standard library's disassembler and interpreted here: lists, dicts, tuples,
numbers, strings and bytes are built, and a named function or class never is: it becomes an inert record of
its name and arguments, and only names that the caller lists are accepted. Enough for files of protocol 2 and
older as Python 2 wrote them, in which text is a string of bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from uni3d.errors import UsageError


@dataclass
class InertCall:
    """What the file asks to call, and did not get to."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True)
class _Name:
    name: str


_MARK = object()


def _as_bytes(value: str) -> bytes:
    return value.encode("latin-1")


@dataclass
class _Machine:
    """The stack and the memo of the pickle language."""

    allowed: Collection[str]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_to_mark(self) -> list[Any]:
        distance = next(i for i, value in enumerate(reversed(self.stack)) if value is _MARK)
        position = len(self.stack) - 1 - distance
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def name(self, argument: str) -> None:
        dotted = argument.replace(" ", ".")
        if dotted not in self.allowed:
            raise ValueError(f"it asks for {dotted[:100]}")
        self.stack.append(_Name(dotted))

    def call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that has no name")
        self.stack.append(InertCall(called.name, arguments))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, InertCall):
            raise ValueError("it sets the state of plain data")
        target.state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets keys of something that is no dict")
        if not all(type(key) in (bytes, str, int) for key in items[::2]):
            raise ValueError("it holds a key that is neither text nor a number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to something that is no list")
        self.stack[-1].extend(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def put(self, index: int) -> None:
        self.memo[int(index)] = self.stack[-1]


def _operations(machine: _Machine) -> dict[str, Callable[[Any], Any]]:
    push = machine.stack.append
    operations: dict[str, Callable[[Any], Any]] = {
        "MARK": lambda _: push(_MARK),
        "NONE": lambda _: push(None),
        "NEWTRUE": lambda _: push(True),
        "NEWFALSE": lambda _: push(False),
        "EMPTY_DICT": lambda _: push({}),
        "EMPTY_LIST": lambda _: push([]),
        "EMPTY_TUPLE": lambda _: push(()),
        "DICT": lambda _: (items := machine.pop_to_mark(), push({}), machine.set_items(items)),
        "LIST": lambda _: push(machine.pop_to_mark()),
        "TUPLE": lambda _: push(tuple(machine.pop_to_mark())),
        "SETITEM": machine.set_item,
        "SETITEMS": lambda _: machine.set_items(machine.pop_to_mark()),
        "APPEND": lambda _: machine.append_items([machine.stack.pop()]),
        "APPENDS": lambda _: machine.append_items(machine.pop_to_mark()),
        "GLOBAL": machine.name,
        "REDUCE": machine.call,
        "BUILD": machine.build,
    }
    operations |= {f"TUPLE{n}": lambda _, n=n: machine.tuple_of(n) for n in (1, 2, 3)}
    operations |= {name: push for name in ("INT", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE")}
    operations |= {
        name: lambda value: push(_as_bytes(value)) for name in ("STRING", "BINSTRING", "SHORT_BINSTRING")
    }
    operations |= {name: machine.put for name in ("PUT", "BINPUT", "LONG_BINPUT")}
    operations |= {name: lambda i: push(machine.memo[int(i)]) for name in ("GET", "BINGET", "LONG_BINGET")}
    return operations


def read_plain_pickle(data: bytes, *, allowed: Collection[str], title: str, remedy: str) -> Any:
    """The object in `data`; names outside `allowed` (such as "numpy.ndarray") and damage raise UsageError.

    Strings of bytes become bytes, calls InertCall. `title` names the file in the message, `remedy` ends it.
    """
    machine = _Machine(allowed)
    operations = _operations(machine)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            if opcode.name == "PROTO":
                continue
            if opcode.name not in operations:
                raise ValueError(f"it holds the instruction {opcode.name}")
            operations[opcode.name](argument)
        raise ValueError("its end is missing")
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        StopIteration,
        AttributeError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{title} is not what it should be ({reason}); {remedy}") from None
