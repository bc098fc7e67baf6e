"""Sample grids: what a run shows while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.draws import STREAM_GRID
from uni3d.training.checkpoint import atomic_write
from uni3d.training.seeds import mix_seeds

COLUMNS = 8


def draw_grid(
    sample: Callable[[Tensor, Tensor | None], Tensor], config: EDMConfig, *, seed: int, device: torch.device
) -> Tensor:
    """uint8 [C, 8 H, 8 W]: what `sample` makes of 64 fixed latents, a class for each row if there are any."""
    generator = torch.Generator("cpu").manual_seed(mix_seeds(seed, STREAM_GRID))
    shape = (COLUMNS**2, config.image_channels, config.resolution, config.resolution)
    latent = torch.randn(shape, generator=generator).to(device)
    labels = None
    if config.label_dim:
        rows = torch.arange(COLUMNS) % config.label_dim
        labels = rows.repeat_interleave(COLUMNS).to(device)
    images = ((sample(latent, labels).float() + 1) * 127.5).round().clamp(0, 255)
    images = torch.nan_to_num(images).to(torch.uint8).cpu()
    channels, side = config.image_channels, config.resolution
    images = images.reshape(COLUMNS, COLUMNS, channels, side, side)
    return images.permute(2, 0, 3, 1, 4).reshape(channels, COLUMNS * side, COLUMNS * side)


def write_grid(grid: Tensor, path: Path) -> Path:
    """`grid` uint8 [C, H, W], C of 1 or 3, as a PNG; small images are enlarged without smoothing."""
    pixels = grid.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    factor = max(1, 512 // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda temporary: picture.save(temporary))
