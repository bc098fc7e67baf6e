"""Reads a pickle as data: an interpreter of its opcodes that can call nothing but a given table.

Python's own unpickler looks names up in modules and calls what it finds, which is how a pickle runs code.
Here a name is only text. One that is not in the table is refused, by that name, at the moment it is read, and
the entries of the table build plain data and inert records. Sizes that a file claims are checked against the
bytes it has before anything is allocated, so that memory stays proportional to the file, and the reader keeps
its own stack, so that depth costs no recursion. Protocols 2 to 5, without what only exotic classes need;
the strings of Python 2 are bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uni3d.errors import UsageError

MAX_OPERATIONS = 1_000_000  # the largest published network takes about 51,000
MAX_TEXT_BYTES = 2**24


class DamagedPickle(UsageError):
    """A pickle that ends early or is put together as no pickler would."""


class RefusedPickle(UsageError):
    """A well-formed pickle that wants something that is not data."""


@dataclass(frozen=True)
class Known:
    """What a pickle may do with a name: call it with a tuple, make an instance of it, or only mention it."""

    call: Callable[[tuple[Any, ...]], Any] | None = None
    make: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Name:
    """A name on the reader's stack: text and what the table allows, nothing that Python could call."""

    text: str
    known: Known


class Stateful:
    """An inert record that may receive a state after it was made."""

    def set_state(self, state: Any) -> None:
        """Take `state`; raises RefusedPickle for one that no such object has."""
        raise NotImplementedError


_KEYS = (str, bytes, int, float, bool, type(None))


class PickleReader:
    """One reading of `data`; `persistent` turns the tuple of a persistent id into a value.

    bytes come out as slices of `data`, not copies, but for short strings of Python 2. Raises DamagedPickle
    and RefusedPickle.
    """

    def __init__(
        self,
        data: memoryview,
        table: Mapping[str, Known],
        *,
        persistent: Callable[[Any], Any] | None = None,
        max_operations: int = MAX_OPERATIONS,
    ) -> None:
        self._data = data
        self._table = table
        self._persistent = persistent
        self._remaining = max_operations
        self._position = 0
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def read(self, start: int = 0) -> tuple[Any, int]:
        """The value of the pickle that begins at `start`, and where it ends."""
        self._position, self._stack, self._outer, self._memo = start, [], [], {}
        if self._byte() != 0x80:
            raise DamagedPickle("it does not begin as a pickle")
        protocol = self._byte()
        if not 2 <= protocol <= 5:
            raise DamagedPickle(f"it claims the pickle protocol {protocol}; 2 to 5 are known")
        while True:
            self._remaining -= 1
            if self._remaining < 0:
                raise RefusedPickle("it has more operations than any such file needs")
            opcode = self._byte()
            if opcode == ord("."):
                value = self._pop()
                if self._stack or self._outer:
                    raise DamagedPickle("it stops in the middle of a value")
                return value, self._position
            action = _ACTIONS.get(opcode)
            if action is None:
                name = _REFUSED_OPCODES.get(opcode)
                if name is None:
                    raise DamagedPickle(f"byte {self._position - 1} is no operation of a pickle")
                raise RefusedPickle(f"it uses the operation {name}, which no such file needs")
            action(self)

    # ---- bytes

    def _take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._data):
            raise DamagedPickle("it ends in the middle of a value")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _byte(self) -> int:
        return self._take(1)[0]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, size: int) -> str:
        if size > MAX_TEXT_BYTES:
            raise RefusedPickle(f"it has a text of {size} bytes; at most {MAX_TEXT_BYTES} are read")
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise DamagedPickle("it has a text that is not UTF-8") from error

    def _line(self) -> str:
        """A text that ends with a newline, at most 500 bytes."""
        window = bytes(self._data[self._position : self._position + 501])
        size = window.find(b"\n")
        if size < 0:
            raise DamagedPickle("it has a name without an end")
        text = self._text(size)
        self._position += 1
        return text

    # ---- the stack and the memo

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            raise DamagedPickle("it takes a value that it never made")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        """Everything since the last mark."""
        if not self._outer:
            raise DamagedPickle("it closes a group that it never opened")
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _remember(self, index: int) -> None:
        if not self._stack:
            raise DamagedPickle("it remembers a value that it never made")
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise DamagedPickle("it recalls a value that it never remembered")
        self._push(self._memo[index])

    # ---- containers

    def _tuple(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(items)))

    def _extend(self, items: list[Any]) -> None:
        target = self._target(list, "appends to")
        target.extend(items)

    def _add(self, items: list[Any]) -> None:
        target = self._target(set, "adds to")
        target.update(_key(item) for item in items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._target(dict, "sets items of")
        if len(items) % 2:
            raise DamagedPickle("it has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _target(self, kind: type, verb: str) -> Any:
        """The container on top of the stack, which stays there."""
        target = self._pop()
        self._push(target)
        if type(target) is not kind:
            raise RefusedPickle(f"it {verb} {describe(target)}")
        return target

    def _make_dict(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def _make_set(self) -> None:
        items = self._pop_mark()
        self._push({_key(item) for item in items})

    # ---- names and what is done with them

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedPickle("it has a name that is not text")
        text = f"{module}.{name}"
        known = self._table.get(text)
        if known is None:
            raise RefusedPickle(
                f"it names '{printable(text)}', which is not among those that such a file needs"
            )
        self._push(Name(text, known))

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Name) or function.known.call is None:
            raise RefusedPickle(f"it calls {describe(function)}")
        if type(arguments) is not tuple:
            raise RefusedPickle(f"it calls '{function.text}' with {describe(arguments)} for arguments")
        self._push(function.known.call(arguments))

    def _new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if not isinstance(kind, Name) or kind.known.make is None:
            raise RefusedPickle(f"it makes an instance of {describe(kind)}")
        if type(arguments) is not tuple or arguments:
            raise RefusedPickle(f"it makes an instance of '{kind.text}' with arguments")
        self._push(kind.known.make())

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        if not isinstance(target, Stateful):
            raise RefusedPickle(f"it sets the state of {describe(target)}")
        target.set_state(state)
        self._push(target)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise RefusedPickle("it refers to data outside of itself")
        self._push(self._persistent(self._pop()))


def _key(value: Any) -> Any:
    """`value`, if it can be a key of a dict or a member of a set at no risk."""
    if type(value) not in _KEYS:
        raise RefusedPickle(f"it uses {describe(value)} as a key")
    return value


def describe(value: Any) -> str:
    """What kind of thing `value` is, for a message: never its contents, which may be of any size."""
    if isinstance(value, Name):
        return f"'{printable(value.text)}'"
    kind = "bytes" if isinstance(value, memoryview) else type(value).__name__
    return f"a value of the kind '{kind}'"


def printable(text: str) -> str:
    """At most 120 characters of a text from a file, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:120])


def _frame(reader: PickleReader) -> None:
    # The length is a hint for buffered reading; it is checked so that a cut file is noticed early.
    size = reader._number("<Q")
    if size > len(reader._data) - reader._position:
        raise DamagedPickle("it ends in the middle of a frame")


def _protocol(reader: PickleReader) -> None:
    raise DamagedPickle("it begins a second time")


_ACTIONS: dict[int, Callable[[PickleReader], object]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): PickleReader._mark,
    ord("0"): PickleReader._pop,
    ord("1"): PickleReader._pop_mark,
    # Plain values.
    ord("N"): lambda r: r._push(None),
    0x88: lambda r: r._push(True),
    0x89: lambda r: r._push(False),
    ord("K"): lambda r: r._push(r._number("<B")),
    ord("M"): lambda r: r._push(r._number("<H")),
    ord("J"): lambda r: r._push(r._number("<i")),
    ord("G"): lambda r: r._push(r._number(">d")),
    0x8A: lambda r: r._push(int.from_bytes(r._take(r._byte()), "little", signed=True)),
    0x8C: lambda r: r._push(r._text(r._number("<B"))),
    ord("X"): lambda r: r._push(r._text(r._number("<I"))),
    0x8D: lambda r: r._push(r._text(r._number("<Q"))),
    ord("U"): lambda r: r._push(bytes(r._take(r._number("<B")))),
    ord("T"): lambda r: r._push(r._take(r._number("<I"))),
    ord("C"): lambda r: r._push(r._take(r._number("<B"))),
    ord("B"): lambda r: r._push(r._take(r._number("<I"))),
    0x8E: lambda r: r._push(r._take(r._number("<Q"))),
    # Containers.
    ord(")"): lambda r: r._push(()),
    0x85: lambda r: r._tuple(1),
    0x86: lambda r: r._tuple(2),
    0x87: lambda r: r._tuple(3),
    ord("t"): lambda r: r._push(tuple(r._pop_mark())),
    ord("]"): lambda r: r._push([]),
    ord("l"): lambda r: r._push(r._pop_mark()),
    ord("a"): lambda r: r._extend([r._pop()]),
    ord("e"): lambda r: r._extend(r._pop_mark()),
    ord("}"): lambda r: r._push({}),
    ord("d"): PickleReader._make_dict,
    ord("s"): lambda r: r._set_items([r._pop(), r._pop()][::-1]),
    ord("u"): lambda r: r._set_items(r._pop_mark()),
    0x8F: lambda r: r._push(set()),
    0x90: lambda r: r._add(r._pop_mark()),
    0x91: PickleReader._make_set,
    # The memo.
    ord("q"): lambda r: r._remember(r._byte()),
    ord("r"): lambda r: r._remember(r._number("<I")),
    0x94: lambda r: r._remember(len(r._memo)),
    ord("h"): lambda r: r._recall(r._byte()),
    ord("j"): lambda r: r._recall(r._number("<I")),
    # Names and calls.
    ord("c"): lambda r: r._name(r._line(), r._line()),
    0x93: PickleReader._stack_name,
    ord("R"): PickleReader._call,
    0x81: PickleReader._new,
    ord("b"): PickleReader._build,
    ord("Q"): PickleReader._persistent_id,
}

# Operations that exist and that none of the files read here has; most are ways around a table of names.
_REFUSED_OPCODES = {
    ord("F"): "FLOAT",
    ord("I"): "INT",
    ord("L"): "LONG",
    ord("P"): "PERSID",
    ord("S"): "STRING",
    ord("V"): "UNICODE",
    ord("g"): "GET",
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("p"): "PUT",
    ord("2"): "DUP",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x8B: "LONG4",
    0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
