"""A nested state as flat tensors plus JSON, exactly and without pickle: what a checkpoint file stores.

`flatten_state` takes what `state_dict()` methods return (dicts with text or whole-number keys, lists, tuples,
tensors, NumPy arrays, numbers, text, None) and `restore_state` gives it back bit for bit. Also the state of
the random generators, which is part of resuming exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR = "$tensor"
_ARRAY = "$array"
_TUPLE = "$tuple"
_DICT = "$items"
_FLOAT = "$float"

RandomGenerator = torch.Generator | np.random.Generator


def flatten_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split `state` into a JSON-able skeleton and the tensors it refers to, keyed by their place.

    Tensors are copied to contiguous CPU memory (so later updates do not change them) and detached.
    Raises TypeError, naming the place, for anything that is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "state", tensors)
    return skeleton, tensors


def restore_state(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten_state`; tensors come back on the CPU. Raises KeyError if one is missing."""
    if isinstance(skeleton, list):
        return [restore_state(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1:
        ((tag, content),) = skeleton.items()
        if tag == _TENSOR:
            return tensors[content]
        if tag == _ARRAY:
            return tensors[content].numpy()
        if tag == _TUPLE:
            return tuple(restore_state(item, tensors) for item in content)
        if tag == _DICT:
            return {key: restore_state(value, tensors) for key, value in content}
        if tag == _FLOAT:
            return float(content)
    return {key: restore_state(value, tensors) for key, value in skeleton.items()}


def _flatten(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    while place in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}
        place += "'"
    if isinstance(value, Tensor):
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: place}
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(np.array(value, order="C"))
        return {_ARRAY: place}
    if isinstance(value, Mapping):
        items = [(key, _flatten(item, f"{place}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if all(isinstance(key, (str, int)) for key, _ in items):
            return {_DICT: [[key, item] for key, item in items]}
        raise TypeError(f"state at '{place}' has keys that are neither text nor whole numbers")
    if isinstance(value, (list, tuple)):
        flat = [_flatten(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: flat} if isinstance(value, tuple) else flat
    if isinstance(value, np.generic):
        return _flatten(value.item(), place, tensors)
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state at '{place}' is a {type(value).__name__}; expected tensors and plain data")


def capture_random_state(generators: Mapping[str, RandomGenerator] | None = None) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, of every CUDA device in use, and of
    `generators` by name."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - libraries may still draw from the global generator
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": {name: _generator_state(item) for name, item in (generators or {}).items()},
    }


def restore_random_state(
    state: Mapping[str, Any], generators: Mapping[str, RandomGenerator] | None = None
) -> None:
    """Set every generator to what `capture_random_state` saw; `generators` must have the same names."""
    given = generators or {}
    if set(given) != set(state["generators"]):
        raise ValueError(f"generators are {sorted(given)}; the state has {sorted(state['generators'])}")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for name, generator in given.items():
        if isinstance(generator, torch.Generator):
            generator.set_state(state["generators"][name])  # pyright: ignore[reportAttributeAccessIssue]
        else:
            generator.bit_generator.state = state["generators"][name]


def _generator_state(generator: RandomGenerator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state
