"""The objects in pickles of EDM, SiD and Uni-Instruct, as records: names, plain values and tensors.

Such a pickle holds modules whose class was decorated by EDM's `torch_utils.persistence`: each is a class
name, a state and the source text of its module, which a normal load executes. Here the source text is dropped
unread. Tensors lie inside as nested pickles, which torch would load without limits; they are read by the same
reader with a table of their own, and stay views of the file's bytes until `materialise`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from uni3d.pickle_reader import (
    DamagedPickle,
    Known,
    Name,
    PickleReader,
    RefusedPickle,
    Stateful,
    describe,
)

MAX_DEPTH = 16
MAX_ENTRIES = 20_000
MAX_STORAGES = 20_000
_MAX_AXES = 8


@dataclass(eq=False)
class ModuleRecord(Stateful):
    """An object of a persistent class or a container of torch: its class by name, and its attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        if type(state) is not dict or self.state:
            raise RefusedPickle(f"it sets the state of a '{self.class_name}' to {describe(state)}")
        self.state = state


@dataclass(frozen=True, eq=False)
class StorageRecord:
    """The numbers of one storage, as bytes of the file."""

    dtype: torch.dtype
    numel: int
    data: memoryview


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A view of a storage that was checked to lie within it."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def materialise(self) -> Tensor:
        """A contiguous tensor with memory of its own."""
        size = self.storage.dtype.itemsize
        begin = self.offset * size
        # The copy is writable and aligned, which the bytes of a pickle need not be.
        numbers = bytearray(self.storage.data[begin : begin + self.num_bytes])
        if not numbers:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        return (
            torch.frombuffer(numbers, dtype=self.storage.dtype)
            .as_strided(self.shape, self.stride)
            .contiguous()
        )


@dataclass(eq=False)
class NumpyType(Stateful):
    """The type of a numpy scalar, such as 'f8'."""

    code: str

    def set_state(self, state: Any) -> None:
        # (version, byte order, subtype, names, fields, item size, alignment, flags)
        plain = type(state) is tuple and len(state) in (8, 9) and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", "|", "="):
            raise RefusedPickle(f"it has a numpy type that is not a plain little-endian '{self.code}'")


_NUMPY_FORMS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i", "b1": "<?"}

_STORAGE_TYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001


def read_objects(data: memoryview) -> Any:
    """The value of the pickle `data`: plain data, ModuleRecord, TensorRecord. Nothing in it is executed.

    Raises DamagedPickle and RefusedPickle.
    """
    return PickleReader(data, _table()).read()[0]


def state_tensors(module: ModuleRecord) -> dict[str, TensorRecord]:
    """The parameters and buffers of a module by dotted name, as `state_dict` would name them.

    Raises DamagedPickle or RefusedPickle for a tree that no module has.
    """
    return dict(_walk(module, "", MAX_DEPTH, [MAX_ENTRIES]))


def _walk(module: Any, prefix: str, depth: int, remaining: list[int]) -> Iterator[tuple[str, TensorRecord]]:
    if not isinstance(module, ModuleRecord):
        raise DamagedPickle(f"it has {describe(module)} in the place of a module")
    members = {kind: _members(module, kind) for kind in ("_parameters", "_buffers", "_modules")}
    remaining[0] -= 1 + sum(map(len, members.values()))
    if depth == 0 or remaining[0] < 0:
        raise RefusedPickle("its modules are more, or nested deeper, than those of any network")
    for name, tensor in (members["_parameters"] | members["_buffers"]).items():
        if not isinstance(tensor, TensorRecord):
            raise DamagedPickle(f"'{prefix}{name}' is {describe(tensor)}; expected a tensor")
        yield f"{prefix}{name}", tensor
    for name, child in members["_modules"].items():
        yield from _walk(child, f"{prefix}{name}.", depth - 1, remaining)


def _members(module: ModuleRecord, kind: str) -> dict[str, Any]:
    """The entries of a module's `_parameters`, `_buffers` or `_modules` that are not None."""
    members = module.state.get(kind, {})
    if type(members) is not dict or len(members) > 1000:
        raise DamagedPickle(f"the {kind} of a '{module.class_name}' are not a dict of at most 1000")
    for name in members:
        if type(name) is not str or not name or len(name) > 100 or "." in name or not name.isprintable():
            raise DamagedPickle(f"a '{module.class_name}' has a member without a proper name")
    return {name: value for name, value in members.items() if value is not None}


# ---- what the names in the pickle stand for. Each takes the tuple of arguments and trusts nothing in it.


def _persistent(arguments: tuple[Any, ...]) -> ModuleRecord:
    """torch_utils.persistence._reconstruct_persistent_obj(meta); meta["module_src"] is never looked at."""
    meta = arguments[0] if len(arguments) == 1 else None
    if type(meta) is not dict or meta.get("type") != "class":
        raise RefusedPickle("it has a persistent object that is not of a class")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or not name.isidentifier() or len(name) > 100 or type(state) is not dict:
        raise RefusedPickle("it has a persistent object without a class name or a state")
    return ModuleRecord(name, state)


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise RefusedPickle("it calls 'collections.OrderedDict' with arguments")
    return {}


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    items = arguments[0] if len(arguments) == 1 else None
    if type(items) is not list or any(type(item) not in (str, int) for item in items):
        raise RefusedPickle("it calls 'builtins.set' with something other than a list of texts")
    return set(items)


def _numpy_type(arguments: tuple[Any, ...]) -> NumpyType:
    code = arguments[0] if len(arguments) == 3 else None
    if type(code) is not str or code not in _NUMPY_FORMS:
        raise RefusedPickle("it has a numpy type other than a plain number")
    return NumpyType(code)


def _numpy_scalar(arguments: tuple[Any, ...]) -> float | int | bool:
    kind, data = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(kind, NumpyType) or not isinstance(data, memoryview):
        raise RefusedPickle("it has a numpy scalar that is not a plain number")
    form = _NUMPY_FORMS[kind.code]
    if len(data) != struct.calcsize(form):
        raise DamagedPickle("it has a numpy scalar of the wrong size")
    return struct.unpack(form, data)[0]


def _parameter(arguments: tuple[Any, ...]) -> TensorRecord:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)"""
    if len(arguments) != 3 or not isinstance(arguments[0], TensorRecord) or arguments[2] != {}:
        raise RefusedPickle("it has a parameter that is not a tensor without hooks")
    return arguments[0]


def _tensor(arguments: tuple[Any, ...]) -> TensorRecord:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks[, metadata])"""
    if len(arguments) not in (6, 7):
        raise RefusedPickle(f"it has a tensor of {len(arguments)} arguments")
    storage, offset, shape, stride, _, hooks = arguments[:6]
    if not isinstance(storage, StorageRecord) or hooks != {} or any(arguments[6:]):
        raise RefusedPickle("it has a tensor with hooks, with metadata, or without a storage")
    lengths = [offset, *shape, *stride] if type(shape) is tuple and type(stride) is tuple else [-1]
    if any(type(number) is not int or not 0 <= number < 2**62 for number in lengths):
        raise DamagedPickle("it has a tensor whose shape, stride or offset are not whole numbers")
    if len(shape) != len(stride) or len(shape) > _MAX_AXES:
        raise DamagedPickle("it has a tensor whose shape and stride do not belong together")
    is_empty = 0 in shape
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (not is_empty and last >= storage.numel) or offset > storage.numel:
        raise DamagedPickle("it has a tensor that reaches beyond the end of its storage")
    if not is_empty and last - offset + 1 != math.prod(shape):
        raise RefusedPickle("it has a tensor that repeats or leaves out numbers of its storage")
    return TensorRecord(storage, offset, shape, stride)


@dataclass(frozen=True)
class _Claim:
    """What the inner pickles of a storage say about the numbers that follow them."""

    dtype: torch.dtype
    key: str
    numel: int


def _storage_claim(persistent_id: Any) -> _Claim:
    """("storage", type, key, location, numel, None)"""
    if type(persistent_id) is not tuple or len(persistent_id) != 6 or persistent_id[0] != "storage":
        raise RefusedPickle("it has a storage that refers to something else")
    _, kind, key, _, numel, view = persistent_id
    dtype = _STORAGE_TYPES.get(kind.text) if isinstance(kind, Name) else None
    if dtype is None or type(key) is not str or type(numel) is not int or not 0 <= numel < 2**62:
        raise DamagedPickle("it has a storage without a type, a key or a size")
    if view is not None:
        raise RefusedPickle("it has a storage that is a view of another")
    return _Claim(dtype, key, numel)


class _Storages:
    """The storages of one file; their number is limited, as one run of bytes may be named many times."""

    def __init__(self) -> None:
        self.remaining = MAX_STORAGES

    def read(self, arguments: tuple[Any, ...]) -> StorageRecord:
        """torch.storage._load_from_bytes(bytes): five small pickles, a count, and the numbers.

        torch's own function unpickles the bytes, with whatever they call. Nothing is allocated for what the
        inner pickles claim: the claim has to equal the bytes that follow.
        """
        payload = arguments[0] if len(arguments) == 1 else None
        if not isinstance(payload, memoryview):
            raise RefusedPickle("it has a storage that is not bytes")
        if bytes(payload[:4]) == b"PK\x03\x04":
            raise RefusedPickle("it has a storage in torch's zip format, which EDM's files do not use")
        self.remaining -= 1
        if self.remaining < 0:
            raise RefusedPickle(f"it has more than {MAX_STORAGES} storages")
        reader = PickleReader(payload, _STORAGE_TABLE, persistent=_storage_claim, max_operations=200)
        position = 0
        parts: list[Any] = []
        for _ in range(5):
            value, position = reader.read(position)
            parts.append(value)
        magic, protocol, system, claim, keys = parts
        if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL:
            raise DamagedPickle("it has a storage that torch did not write")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise RefusedPickle("it was written on a big-endian machine")
        if not isinstance(claim, _Claim) or type(keys) is not list or keys != [claim.key]:
            raise DamagedPickle("it has a storage without numbers")
        rest = payload[position:]
        num_bytes = claim.numel * claim.dtype.itemsize
        if len(rest) != 8 + num_bytes or struct.unpack("<q", rest[:8])[0] != claim.numel:
            raise DamagedPickle("it has a storage whose size is not the one that it claims")
        return StorageRecord(claim.dtype, claim.numel, rest[8:])


_STORAGE_TABLE = {name: Known() for name in _STORAGE_TYPES}


def _table() -> dict[str, Known]:
    """The names that EDM's files use, and what becomes of them; no other name is read."""
    table = {
        "torch_utils.persistence._reconstruct_persistent_obj": Known(call=_persistent),
        "torch._utils._rebuild_parameter": Known(call=_parameter),
        "torch._utils._rebuild_tensor_v2": Known(call=_tensor),
        "torch.storage._load_from_bytes": Known(call=_Storages().read),
        "collections.OrderedDict": Known(call=_ordered_dict),
        "builtins.set": Known(call=_set),
        "dnnlib.util.EasyDict": Known(make=dict),
        "numpy.dtype": Known(call=_numpy_type),
    }
    for name in ("ModuleDict", "ModuleList", "Sequential"):
        table[f"torch.nn.modules.container.{name}"] = Known(make=partial(ModuleRecord, name))
    for package in ("numpy.core", "numpy._core"):
        table[f"{package}.multiarray.scalar"] = Known(call=_numpy_scalar)
    return table
