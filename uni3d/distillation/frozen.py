"""Views of networks that share their tensors: one to train, others to look through.

A view has its own mode and its own `requires_grad`, so that no step has to switch either on a network in
training, and a compiled block keeps one graph for each use.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from uni3d.diffusion.edm_unet import Block
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
    """`network` with each residual block through torch.compile, or plainly from the first failure on.

    Blocks of one shape share their code, across layers and networks, so a network compiles in the time of its
    few kinds of block; what lies between them is a small part of its work.
    """

    def __init__(
        self, network: nn.Module, *, enabled: bool, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._network = network
        self._blocks = [part for part in network.modules() if isinstance(part, Block)] if enabled else []
        if enabled:
            # All blocks share the code of one class, and each kind has a graph for every use of it.
            config = torch._dynamo.config
            config.recompile_limit = max(256, config.recompile_limit)
            config.accumulated_recompile_limit = max(1024, config.accumulated_recompile_limit)
        for block in self._blocks:
            block.compile(dynamic=False, backend=backend)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._blocks:
            return self._network(*arguments, **options)
        try:
            return self._network(*arguments, **options)
        except (torch.OutOfMemoryError, Uni3DError):
            raise
        except Exception as error:
            logger.warning("torch.compile failed (%s); going on without it", str(error).splitlines()[:1])
            for block in self._blocks:
                block._compiled_call_impl = None  # what `compile` sets; torch has no public way back
            self._blocks = []
            return self._network(*arguments, **options)
