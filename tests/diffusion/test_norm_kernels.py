"""Group norms as Triton kernels against torch's own in double precision, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


def _drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _exact(
    images: Tensor, num_groups: int, weight: Tensor, bias: Tensor, cotangent: Tensor, *, silu: bool
) -> list[Tensor]:
    images = images.clone().requires_grad_()
    result = nn.functional.group_norm(images, num_groups, weight, bias, 1e-5)
    result = nn.functional.silu(result) if silu else result
    return [result.detach(), *torch.autograd.grad(result, images, cotangent)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((2, 64, 9, 7), 32),  # pixels that fill no chunk
        ((1, 320, 16, 16), 32),  # several blocks of channels, groups across their borders
        ((3, 20, 50), 4),  # rows of pixels, as attention hands them over
        ((1, 4, 1, 1), 2),
        ((2, 8, 64, 40), 1),  # many chunks
    ],
)
def test_values_and_gradients(
    shape: tuple[int, ...], num_groups: int, silu: bool, kernel_device: torch.device
) -> None:
    from uni3d.diffusion import norm_kernels

    # Far from zero: sums of squares would lose the variance.
    images, cotangent = _drawn(*shape) * 2 + 30, _drawn(*shape)
    weight, bias = _drawn(shape[1]), _drawn(shape[1] + 1)[1:]
    expected = _exact(images, num_groups, weight, bias, cotangent, silu=silu)

    def last(values: Tensor) -> Tensor:
        return values.float().to(kernel_device).movedim(1, -1).contiguous().movedim(-1, 1)

    given = last(images).requires_grad_()
    found = norm_kernels.group_norm(
        given, num_groups, weight.float().to(kernel_device), bias.float().to(kernel_device), silu=silu
    )
    assert found.stride() == given.stride()
    # A gradient may come in another layout.
    grads = torch.autograd.grad(found, given, cotangent.float().contiguous().to(kernel_device))
    for ours, exact in zip([found, *grads], expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), exact, atol=3e-5, rtol=1e-5)


def test_half_precision_is_kept(kernel_device: torch.device) -> None:
    from uni3d.diffusion import norm_kernels

    images, cotangent = _drawn(2, 32, 8, 8).bfloat16(), _drawn(2, 32, 8, 8).bfloat16()
    weight, bias = _drawn(32).bfloat16(), _drawn(32).bfloat16()
    expected = _exact(*(images.double(), 8, weight.double(), bias.double(), cotangent.double()), silu=True)
    given = images.to(kernel_device, memory_format=torch.channels_last).requires_grad_()
    found = norm_kernels.group_norm(given, 8, weight.to(kernel_device), bias.to(kernel_device), silu=True)
    (grad,) = torch.autograd.grad(found, given, cotangent.to(kernel_device))
    for ours, exact in zip([found, grad], expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double().cpu(), exact, atol=2e-2, rtol=1e-2)


def test_layouts_are_told_apart() -> None:
    pytest.importorskip("triton")
    from uni3d.diffusion.norm_kernels import has_channels_last

    images = torch.zeros(2, 3, 4, 5)
    assert not has_channels_last(images) and has_channels_last(images.to(memory_format=torch.channels_last))
    assert has_channels_last(torch.zeros(2, 7, 3).transpose(1, 2))
    assert not has_channels_last(images.to(memory_format=torch.channels_last)[:, :, ::2])
    assert not has_channels_last(torch.zeros(2, 3))
