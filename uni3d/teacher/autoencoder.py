"""The autoencoder of the embedded teacher: what it is, what it is trained on, how its latents are whitened.

Legend: B batch, C latent channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from uni3d.teacher.settings import AutoencoderConfig


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained AutoencoderKL without attention, float32."""
    num_levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * num_levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * num_levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.block_out_channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        sample_size=config.image_size,
        scaling_factor=1.0,
    )


def autoencoder_loss(
    reconstruction: Tensor, images: Tensor, alpha: Tensor, kl_per_sample: Tensor, config: AutoencoderConfig
) -> Tensor:
    """Scalar loss of `reconstruction` [B, 3, H, W] against `images`, both in [-1, 1], in float32.

    Mean absolute error of pixels, of chroma (colour less its grey part), of neighbour differences and of
    three coarser sizes, all weighted up where `alpha` [B, 1, H, W] covers the object, plus a small KL term.
    Weights average to 1 in every image: a small object counts as much as a large one.
    """
    weight = 1 + config.foreground_weight * alpha
    weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True)
    error = reconstruction.float() - images
    loss = (weight * error.abs()).mean()
    chroma = error - error.mean(dim=1, keepdim=True)
    loss = loss + config.chroma_weight * (weight * chroma.abs()).mean()
    down, right = error.diff(dim=2), error.diff(dim=3)
    edges = (weight[:, :, 1:] * down.abs()).mean() + (weight[:, :, :, 1:] * right.abs()).mean()
    loss = loss + config.gradient_weight * edges
    coarse = error
    for _ in range(3):
        coarse = F.avg_pool2d(coarse, 2)
        loss = loss + config.coarse_weight / 3 * coarse.abs().mean()
    return loss + config.kl_weight * kl_per_sample.float().mean()


def reconstruction_metrics(reconstruction: Tensor, images: Tensor, alpha: Tensor) -> dict[str, float]:
    """PSNR (dB) of images [B, 3, H, W] in [-1, 1], the same on the object alone, and mean chroma error.

    `alpha` [B, 1, H, W] in [0, 1] covers the object: backgrounds are easy and fill most of an image, so that
    the PSNR of whole images says little of how sharp objects are. The chroma error is in 8-bit levels.
    """
    error = (reconstruction.float().clamp(-1, 1) - images) / 2
    square = error.square().mean(dim=1, keepdim=True)
    on_object = (square * alpha).sum(dim=(1, 2, 3)) / alpha.sum(dim=(1, 2, 3)).clamp_min(1)
    chroma = error - error.mean(dim=1, keepdim=True)
    return {
        "psnr_db": _mean_psnr(square.mean(dim=(1, 2, 3))),
        "object_psnr_db": _mean_psnr(on_object),
        "chroma_error_levels": float(chroma.abs().mean()) * 255,
    }


def _mean_psnr(square_error: Tensor) -> float:
    """Mean PSNR in dB of images with mean square errors [B], values in [0, 1]."""
    return float((-10 * torch.log10(square_error.clamp_min(1e-10))).mean())


@torch.no_grad()
def whiten_latents(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold latent statistics (each [C]) into the 1x1 convolutions around the latents, in place.

    Afterwards encoded latents have zero mean and unit standard deviation per channel and decode to the same
    images. scaling_factor stays 1: it is the only correction that a plain pipeline knows, and one number
    could neither shift the latents nor scale the channels apart.
    """
    num = mean.shape[0]
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert before is not None and before.bias is not None and after is not None and after.bias is not None
    mean, std = mean.to(before.weight), std.to(before.weight)
    # The encoder gives C means, then C log-variances; dividing by std moves the latter by -2 log std.
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    before.weight[:num] /= std[:, None, None, None]
    before.bias[:num] = (before.bias[:num] - mean) / std
    before.bias[num:] -= 2 * std.log()
