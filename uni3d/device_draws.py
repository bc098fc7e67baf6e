"""Random numbers and small tensors for a device, without making the host wait for it.

A run has one generator, on the CPU, so that its state is plain data and a CPU run repeats bit for bit. A GPU
gets large draws from a generator of its own, seeded by one draw from the run's; small tensors made on the CPU
go there by way of pinned memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d import random_streams
from uni3d.random_streams import SharedStream


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """`generator` itself on its own kind of device, else one of `device` that it seeds."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


def uniform(*shape: int, generator: torch.Generator | SharedStream, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32 of `shape` on `device`."""
    if isinstance(generator, SharedStream):
        return to_device(random_streams.uniform(shape, generator), device)
    return torch.rand(shape, generator=generator_on(device, generator), device=device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; from the CPU to a GPU the copy is queued and the host goes on."""
    target = torch.device(device)
    if tensor.device.type == "cpu" and target.type != "cpu":
        # Pinning keeps strides, and an expanded tensor's let nothing be copied into it.
        return tensor.contiguous().pin_memory().to(target, non_blocking=True)
    return tensor.to(target)
