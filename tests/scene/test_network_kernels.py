"""The hash field's network as Triton kernels against its torch twin, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from uni3d.scene.radiance_field import two_layers


@pytest.mark.parametrize(
    ("num_points", "num_features", "num_units", "num_outputs"),
    [(1, 24, 32, 1), (300, 24, 32, 4), (1300, 5, 20, 1), (129, 33, 64, 17)],
)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_outputs_and_gradients(
    num_points: int,
    num_features: int,
    num_units: int,
    num_outputs: int,
    is_transposed: bool,
    kernel_device: torch.device,
) -> None:
    from uni3d.scene import network_kernels

    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        drawn(num_points, num_features),
        drawn(num_units, num_features) / num_features**0.5,
        drawn(num_units),
        drawn(num_outputs, num_units) / num_units**0.5,
        drawn(num_outputs),
    ]
    cotangent = drawn(num_points, num_outputs)
    reference = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = two_layers(*reference)
    tensors = [tensor.float().to(kernel_device) for tensor in inputs]
    if is_transposed:  # as hash look-ups hand them out
        tensors[0] = tensors[0].t().contiguous().t()
    tensors = [tensor.requires_grad_() for tensor in tensors]
    found = network_kernels.two_layers(*tensors)
    gradients = torch.autograd.grad(found, tensors, cotangent.float().to(kernel_device))
    for ours, exact in zip(
        [found, *gradients], [expected, *torch.autograd.grad(expected, reference, cotangent)], strict=True
    ):
        assert ours.shape == exact.shape
        assert (ours.cpu() - exact).abs().max() < 2e-6 * exact.abs().max()


def test_no_points(kernel_device: torch.device) -> None:
    from uni3d.scene import network_kernels

    weights = [
        torch.ones(shape, device=kernel_device, requires_grad=True) for shape in ((8, 3), (8,), (2, 8), (2,))
    ]
    outputs = network_kernels.two_layers(torch.zeros(0, 3, device=kernel_device), *weights)
    assert outputs.shape == (0, 2)
    outputs.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)
