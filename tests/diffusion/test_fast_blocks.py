"""Faster blocks compute what diffusers' own do, where they fit, and leave no trace when taken back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from uni3d.diffusion import wide_attention
from uni3d.diffusion.fast_blocks import fast_blocks, plain_blocks
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.wide_attention import WideAttentionProcessor, attention


def _autoencoder(device: torch.device) -> AutoencoderKL:
    """One whose middle block has a head of 264 channels."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 264),
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        norm_num_groups=8,
    )
    nn.Module.to(model, device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return model.eval().requires_grad_(False)


def _encoded(model: AutoencoderKL, images: Tensor) -> list[Tensor]:
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    mean = model.encode(images).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    return [mean, *torch.autograd.grad(mean.square().sum(), images)]


def _types(model: nn.Module) -> Counter[str]:
    processors = [part.processor for part in model.modules() if isinstance(part, Attention)]
    return Counter(type(part).__name__ for part in [*model.modules(), *processors])


def test_an_autoencoder_encodes_the_same(kernel_device: torch.device) -> None:
    model = _autoencoder(kernel_device)
    images = torch.rand(1, 3, 8, 12).to(kernel_device).contiguous(memory_format=torch.channels_last)
    before, types, weights = _encoded(model, images), _types(model), dict(model.state_dict())
    fast_blocks(model)
    changed = _types(model)
    assert not changed["GroupNorm"] and not changed["ResnetBlock2D"] and not changed["AttnProcessor2_0"]
    assert changed["FastGroupNorm"] == types["GroupNorm"] > 0
    assert changed["FastResnetBlock"] == types["ResnetBlock2D"] > 0
    for ours, theirs in zip(_encoded(model, images), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.detach().abs().max()), rtol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    plain_blocks(model)
    assert _types(model) == types
    for ours, theirs in zip(_encoded(model, images), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_teacher_predicts_the_same(tiny_teacher_folder: Path, kernel_device: torch.device) -> None:
    teacher = LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder, device=kernel_device)
    context = teacher.encode_text(["a red chair"])

    def predicted() -> list[Tensor]:
        latent = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))
        latent = latent.to(kernel_device).requires_grad_()
        x0 = teacher.predict_x0(latent, torch.ones(1, device=kernel_device), context)
        return [x0, *torch.autograd.grad(x0.square().sum(), latent)]

    before = predicted()
    fast_blocks(teacher.network)
    assert _types(teacher.network)["FastResnetBlock"] > 0
    for ours, theirs in zip(predicted(), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_norms_that_are_trained_get_their_gradients(kernel_device: torch.device) -> None:
    norm = nn.GroupNorm(2, 4).to(kernel_device)
    images = torch.randn(1, 4, 3, 3).to(kernel_device).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()  # torch 2.13 crashes on a CPU where only the weights are
    block = nn.Sequential(norm)
    fast_blocks(block)
    block(images).square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().max() > 0


def test_wide_attention_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 11, 264, generator=generator, dtype=torch.float64) for _ in range(3)]
    cotangent = torch.randn(2, 11, 264, generator=generator, dtype=torch.float64)
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = nn.functional.scaled_dot_product_attention(*(tensor[:, None] for tensor in exact))[:, 0]
    expected_grads = torch.autograd.grad(expected, exact, cotangent)
    for max_scores in (wide_attention.MAX_SCORES, 1):  # 1: larger than what it was made for
        monkeypatch.setattr(wide_attention, "MAX_SCORES", max_scores)
        ours = [tensor.float().requires_grad_() for tensor in inputs]
        result = attention(*ours)
        assert ("WideAttention" in type(result.grad_fn).__name__) == (max_scores > 1)
        grads = torch.autograd.grad(result, ours, cotangent.float())
        for found, wanted in zip([result, *grads], [expected, *expected_grads], strict=True):
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_wide_attention_in_half_precision() -> None:
    """Scores and softmax are taken in float32, as fused kernels do; in bfloat16 they would be worse."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 40, 512, generator=generator).bfloat16() for _ in range(3))
    query = query * 4
    exact = nn.functional.scaled_dot_product_attention(*(part.double() for part in (query, key, value)))
    rounded = ((query @ key.transpose(1, 2)) * 512**-0.5).softmax(dim=-1) @ value

    def error(result: Tensor) -> float:
        return float((result.double() - exact).norm() / exact.norm())

    assert 2 * error(attention(query, key, value)) < 6e-3 < error(rounded)


def test_the_processor_is_diffusers_own(kernel_device: torch.device) -> None:
    """With several heads and a residual connection that is rescaled, as other models may have them."""
    torch.manual_seed(1)
    layer = Attention(
        8,
        heads=2,
        dim_head=260,
        norm_num_groups=4,
        residual_connection=True,
        rescale_output_factor=2.0,
        bias=True,
    ).to(kernel_device)
    images = torch.randn(2, 8, 3, 5).to(kernel_device)
    with torch.no_grad():
        before = layer(images)
        fast_blocks(layer)
        assert isinstance(layer.processor, WideAttentionProcessor)
        torch.testing.assert_close(layer(images), before, atol=1e-5, rtol=1e-4)
