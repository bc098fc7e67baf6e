"""Writes pickles as EDM's code does, from our networks: persistent objects, source text, nested storages.

The modules `torch_utils.persistence` and `dnnlib.util` exist only while a pickle is written.
"""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from uni3d.diffusion.edm import EDMConfig, EDMDenoiser

SOURCE = "raise SystemExit('the source text of a pickle was executed')\n" * 50

CLASS_NAMES = {
    "SongBody": "SongUNet",
    "ADMBody": "DhariwalUNet",
    "Block": "UNetBlock",
    "FourierFeatures": "FourierEmbedding",
}


class EasyDict(dict[str, Any]):
    """As in dnnlib."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    raise AssertionError("a pickle was loaded by calling what it names")


EasyDict.__module__ = "dnnlib.util"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An instance of a class that `persistence` decorated."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": self.class_name,
            "state": self.state,
        }
        return _reconstruct_persistent_obj, (meta,), None, None, None


@contextmanager
def edm_modules() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util`, importable."""
    contents = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]


def dumps(value: Any, protocol: int = 4) -> bytes:
    """pickle.dumps with EDM's modules around."""
    with edm_modules(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: TypedStorage is deprecated
        return pickle.dumps(value, protocol=protocol)


def constructor_arguments(config: EDMConfig) -> dict[str, Any]:
    """What EDM's train.py passes to EDMPrecond for a network of `config`."""
    arguments: dict[str, Any] = {
        "img_resolution": config.resolution,
        "img_channels": config.image_channels,
        "label_dim": config.label_dim,
        "use_fp16": False,
        "augment_dim": config.augment_dim,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_blocks": config.num_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    }
    if config.body == "adm":
        return arguments | {"model_type": "DhariwalUNet"}
    is_residual = config.body == "ncsn++"
    return arguments | {
        "model_type": "SongUNet",
        "embedding_type": "fourier" if is_residual else "positional",
        "encoder_type": "residual" if is_residual else "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 2 if is_residual else 1,
        "resample_filter": [1, 3, 3, 1] if is_residual else [1, 1],
    }


def persistent(net: EDMDenoiser, wrapper: str = "EDMPrecond") -> Persistent:
    """The object that EDM would pickle for `net`."""
    root = _object(net)
    root.class_name = wrapper
    root.state |= {
        "img_resolution": net.config.resolution,
        "sigma_max": float("inf"),
        "_init_args": (),
        "_init_kwargs": constructor_arguments(net.config),
    }
    return root


def snapshot(
    net: EDMDenoiser,
    *,
    protocol: int = 4,
    wrapper: str = "EDMPrecond",
    change: Callable[[dict[str, Any]], object] | None = None,
) -> bytes:
    """A network snapshot of EDM's training loop; `change` may alter its content before it is pickled."""
    content = {
        "ema": persistent(net, wrapper),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}}),
        "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8}),
        "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=False),
    }
    if change is not None:
        change(content)
    return dumps(content, protocol)


def _object(module: nn.Module) -> Any:
    """`module` as EDM's class of the same place; containers of torch stay what they are."""
    children = OrderedDict((name, _object(child)) for name, child in module._modules.items())
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        vars(container).update(_modules=children, training=False)
        return container
    if type(module).__name__ in ("SongBody", "ADMBody") and "map_noise" not in children:
        children["map_noise"] = Persistent("PositionalEmbedding", _attributes({}, {}, OrderedDict()))
    # Weights are frozen and on the CPU when the training loop writes them.
    parameters = OrderedDict(
        (name, value if value is None else nn.Parameter(value.detach(), requires_grad=False))
        for name, value in module._parameters.items()
    )
    state = _attributes(parameters, dict(module._buffers), children)
    return Persistent(CLASS_NAMES.get(type(module).__name__, type(module).__name__), state)


def _attributes(
    parameters: dict[str, Any], buffers: dict[str, Any], children: OrderedDict[str, Any]
) -> dict[str, Any]:
    return {
        "training": False,
        "_parameters": parameters,
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        "_is_full_backward_hook": None,
        "_modules": children,
        "skip_scale": np.sqrt(0.5),
        "eps": 1e-6,
        "num_heads": 0,
        "_init_args": (),
        "_init_kwargs": {"init_weight": np.sqrt(0.2), "init": {"init_mode": "xavier_uniform"}},
    }


def storage_bytes(storage: Any) -> bytes:
    """The nested pickle of a storage, as in torch's `__reduce__` of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return storage.__reduce__()[1][0]


class Call:
    """Pickles as a call of `function` with `arguments`, whatever they are."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def tensor_call(*arguments: Any) -> Call:
    """A call of torch's tensor rebuilder with any arguments."""
    return Call(torch._utils._rebuild_tensor_v2, *arguments)
