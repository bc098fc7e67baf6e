"""A watch that fails at the first operation for which the host would have to wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What a GPU would have to be waited for: values read by the host, and shapes that depend on values.
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "bincount")


class QueuedCopies(TorchDispatchMode):
    """Fails where the host would wait for a copy of its own to a GPU, for which the meta device stands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if (
            name == "_to_copy"
            and args[0].device.type == "cpu"
            and kwargs.get("device") == torch.device("meta")
        ):
            assert kwargs.get("non_blocking"), "a copy that is waited for"
        if name == "index" and args[0].device.type == "meta":
            assert all(index is None or index.device.type == "meta" for index in args[1]), "an index to copy"
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Fails at the first operation that waits, also one of `more`."""

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.waiting = {word.strip("_") for word in (*WAITING, *more)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.strip("_") not in self.waiting, name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask as index"
        return func(*args, **(kwargs or {}))
