"""Networks whose blocks are compiled: the same results, code shared by blocks of one shape, a way back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from uni3d.diffusion.edm import EDMDenoiser
from uni3d.diffusion.edm_unet import Block
from uni3d.distillation.benchmark_step import TOY, network_config
from uni3d.distillation.frozen import Compiled, frozen_view


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _network() -> EDMDenoiser:
    config = dataclasses.replace(network_config(TOY), num_blocks=3)
    return EDMDenoiser(config, generator=torch.Generator().manual_seed(0)).eval()


def _outcome(call: Any, network: EDMDenoiser) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    x0, features = call(x, torch.ones(2), torch.tensor([0, 1]), output="both")
    parameters = [parameter for name, parameter in network.named_parameters() if "map_augment" not in name]
    return [x0, features, *torch.autograd.grad(x0.square().sum() + features.sum(), [x, *parameters])]


def test_compiled_blocks_give_the_same_and_share_code() -> None:
    network = _network()
    expected = _outcome(network, network)
    counter = CompileCounter()
    compiled = Compiled(network, enabled=True, backend=counter)
    found = _outcome(compiled, network)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    num_blocks, num_graphs = sum(isinstance(part, Block) for part in network.modules()), counter.frame_count
    assert 0 < num_graphs < num_blocks
    another = _network()
    _outcome(Compiled(another, enabled=True, backend=counter), another)
    assert counter.frame_count == num_graphs  # nothing new for a second network of the same shape


def test_a_compiler_that_fails_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    network = _network()
    view = frozen_view(network)
    x = torch.ones(2, 3, 8, 8)
    expected = view(x, torch.ones(2))
    compiled = Compiled(view, enabled=True, backend=broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(compiled(x, torch.ones(2)), expected)
    assert caplog.text.count("going on without it") == 1
