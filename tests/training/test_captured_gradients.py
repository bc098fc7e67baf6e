"""Gradients replayed as a CUDA graph are those of plain steps; what can be recorded waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from uni3d.diffusion.camera_token import CameraToken
from uni3d.teacher.autoencoder import autoencoder_loss, build_autoencoder
from uni3d.teacher.denoiser import DenoiserLoss, LatentBatch, build_text_encoder, build_unet
from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig
from uni3d.teacher.tokenizer import token_ids, train_tokenizer
from uni3d.training.captured_gradients import CapturedGradients


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1), nn.Linear(1, 1))


def mean_square(network: nn.Module) -> Any:
    return lambda x, y: (network[:3](x) - y).square().mean()  # type: ignore[index]  # the last layer is unused


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_are_those_of_a_plain_backward_pass(device: str, caplog: pytest.LogCaptureFixture) -> None:
    network = a_network().to(device)
    loss_of = mean_square(network)
    step = CapturedGradients(loss_of, list(network.parameters()), is_enabled=True)
    for size in (5, 5, 7, 5):
        x, y = torch.randn(size, 4, device=device), torch.randn(size, 1, device=device)
        loss = step(x, y)
        found = [parameter.grad for parameter in network.parameters()]
        expected = torch.autograd.grad(loss_of(x, y), list(network.parameters()), allow_unused=True)
        torch.testing.assert_close(loss, loss_of(x, y).detach())
        for gradient, wanted in zip(found, expected, strict=True):
            assert (gradient is None) == (wanted is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted)
        network.zero_grad(set_to_none=True)
    # Without a device to record on, one warning says so and steps run plainly.
    assert len(caplog.records) == (1 if device == "cpu" else 0)
    assert step.is_enabled == (device == "cuda")


def test_parts_of_a_batch_add_up() -> None:
    network = a_network()
    step = CapturedGradients(mean_square(network), list(network.parameters()), is_enabled=False)
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    whole = torch.autograd.grad(mean_square(network)(x, y), list(network[:3].parameters()))  # type: ignore[index]
    step(x[:3], y[:3])
    step(x[3:], y[3:])
    for parameter, wanted in zip(network.parameters(), whole, strict=False):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad / 2, wanted)


class RecordableOnly(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: asking the device for a value, and the default generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for refused in ("_local_scalar_dense", "nonzero", "aten.rand", "bernoulli", "dropout", "unique"):
            assert refused not in name, f"{name} cannot be recorded"
        if name.startswith("aten.index"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, f"{name} by a mask cannot be recorded"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.nonzero(), torch.rand_like]
)
def test_the_check_of_what_can_be_recorded_can_fail(wait: Any) -> None:
    with pytest.raises(AssertionError, match="cannot be recorded"), RecordableOnly():
        wait(torch.ones(2))


def test_the_losses_of_a_teacher_can_be_recorded() -> None:
    autoencoder = AutoencoderConfig(block_out_channels=(16, 16), norm_num_groups=8, image_size=16)
    config = DenoiserConfig(
        block_out_channels=(16, 16), attention_heads=(1, 1), norm_num_groups=8, context_dim=16,
        context_length=8, text_layers=1, text_heads=1, layers_per_block=1,
    )  # fmt: skip
    vae = build_autoencoder(autoencoder)
    images, alpha = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    tokenizer = train_tokenizer(["a red chair"], context_length=8)
    unet, text = build_unet(config, autoencoder), build_text_encoder(config, tokenizer)
    empty = torch.from_numpy(token_ids(tokenizer, [""]))[0].long()
    loss_of = DenoiserLoss(
        unet, text, CameraToken(16), empty_ids=empty, config=config, seed=0, device=torch.device("cpu")
    )
    ids = torch.from_numpy(token_ids(tokenizer, ["a red chair", "a chair"])).long()
    batch = LatentBatch(torch.randn(2, autoencoder.latent_channels, 8, 8), ids, torch.zeros(2, 5))
    drawn = loss_of.draw(batch, noise_index=0)

    def denoise(*tensors: Tensor) -> Tensor:
        return loss_of.loss(*tensors)

    with RecordableOnly():
        posterior = vae.encode(images).latent_dist  # type: ignore[union-attr]
        decoded = vae.decode(posterior.mean).sample  # type: ignore[union-attr]
        autoencoder_loss(decoded, images, alpha, torch.zeros(2), autoencoder).backward()
        denoise(*drawn).backward()
