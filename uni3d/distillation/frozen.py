"""Views of networks that share their tensors: one to train, others to look through.

A view has its own mode and its own `requires_grad`, so that no step has to switch either on a network in
training, and a compiled network keeps one graph for each use.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uni3d.errors import Uni3DError

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


def frozen_view(network: Network, values: Mapping[str, Tensor] | None = None) -> Network:
    """A second module of the same kind over the tensors of `network`, frozen and in eval mode.

    Gradients still flow through it to its inputs. Updates of `network` in place show in it. `values` by
    parameter name (a running average, say) take the place of the network's own.
    """
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    tensors.update({name: tensor.detach() for name, tensor in (values or {}).items()})
    with torch.device("meta"):
        view = copy.deepcopy(network).to("meta")
    view.load_state_dict(tensors, assign=True)
    return view.requires_grad_(False).eval()


class Compiled:
    """`network` called through torch.compile, or plainly from the first failure on."""

    def __init__(self, network: nn.Module, *, enabled: bool) -> None:
        self._plain = network
        if enabled:
            # All networks share the code of one class, and each has a graph for every use of it.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._call: Any = torch.compile(network, dynamic=False) if enabled else network

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self._call is self._plain:
            return self._plain(*arguments, **options)
        try:
            return self._call(*arguments, **options)
        except (torch.OutOfMemoryError, Uni3DError):
            raise
        except Exception as error:
            logger.warning("torch.compile failed (%s); going on without it", str(error).splitlines()[:1])
            self._call = self._plain
            return self._plain(*arguments, **options)
