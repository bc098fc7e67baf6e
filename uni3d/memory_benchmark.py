"""Peak memory of every `--vram` preset on networks of Stable Diffusion 2.1's shape with random weights.

    python -m uni3d.memory_benchmark            # all presets, on the GPU
    python -m uni3d.memory_benchmark 8 12       # some of them

Memory does not depend on the weights, so nothing is downloaded. Prints a table in Markdown: the peak that
torch had allocated and reserved over a few steps of the method at the preset's bounds, in GB (1e9 bytes).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.config import DiscriminatorConfig, FakeScoreConfig, FieldConfig, RendererConfig, TextTo3DConfig
from uni3d.diffusion.stable_diffusion import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.losses.noise_schedule import DiscreteVPSchedule
from uni3d.memory import RUNGS, MemoryRung
from uni3d.scene_optimiser import SceneOptimiser

METHODS = ("vsd", "uni-instruct")
NUM_STEPS = 4


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes that torch held at most."""

    allocated: int
    reserved: int


class _AnyTokens:
    """A tokenizer for random weights: every prompt is the same."""

    model_max_length = 77

    def __call__(self, prompts: str | Sequence[str], **_: Any) -> Any:
        num = 1 if isinstance(prompts, str) else len(prompts)
        ids = torch.zeros(num, self.model_max_length, dtype=torch.long)
        return SimpleNamespace(input_ids=ids[0].tolist() if isinstance(prompts, str) else ids)


def random_teacher(device: str, dtype: torch.dtype, *, width: int = 320) -> LatentDiffusionTeacher:
    """A teacher of Stable Diffusion 2.1's shape, 512 px, with random weights.

    Args:
        width: channels of the first block; 320 is the real one, a small multiple of 32 serves a test.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_width = 1024 if width == 320 else 64
    with torch.device(device):
        # Their annotations allow one block only.
        heads: Any = (width // 64 or 1, width // 32, width // 16, width // 16)
        unet = UNet2DConditionModel(
            sample_size=64 if width == 320 else 8,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            attention_head_dim=heads,
            cross_attention_dim=text_width,
            use_linear_projection=True,
        )
        vae_width = width * 2 // 5 // 32 * 32 or 32
        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        }
        vae = AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408 if width == 320 else 64,
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=23 if width == 320 else 1,
                num_attention_heads=16,
            )
        )
    for network in (unet, vae, text):
        nn.Module.to(network, dtype=dtype).eval().requires_grad_(False)
    alphas: Tensor = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    return LatentDiffusionTeacher(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=_AnyTokens(),
        schedule=DiscreteVPSchedule(alphas.to(device)),
        prediction_type="epsilon",
        camera_token=None,
        name="random weights",
    )


def settings(rung: MemoryRung, method: str) -> TextTo3DConfig:
    """As large as the rung allows."""
    largest = TextTo3DConfig(
        prompt="a chair",
        method=method,
        field=FieldConfig(encoding="hash"),
        renderer=RendererConfig(resolution=((0.0, 512.0),), samples_per_ray=512),
        fake_score=FakeScoreConfig(warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=8, sampling_steps=2),
    )
    guidance = dataclasses.replace(largest.guidance, views_per_step=rung.max_views)
    regularisers = dataclasses.replace(
        largest.regularisers, smoothness=((0.0, 0.0),), colour_smoothness=((0.0, 0.0),)
    )
    return rung.bounded(dataclasses.replace(largest, guidance=guidance, regularisers=regularisers))


def peak(config: TextTo3DConfig, teacher: LatentDiffusionTeacher, num_steps: int = NUM_STEPS) -> MemoryPeak:
    """Take a few steps; zeros where there is no GPU to ask."""
    is_cuda = teacher.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimiser = SceneOptimiser(config, teacher)
    try:
        optimiser.prepare()
        for _ in range(num_steps):
            optimiser.step()
    finally:
        optimiser.close()
    if not is_cuda:
        return MemoryPeak(0, 0)
    return MemoryPeak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def main(presets: Sequence[str]) -> None:
    """Measure and print."""
    rungs = [rung for rung in RUNGS if rung.name.isdigit() and (not presets or rung.name in presets)]
    if unknown := set(presets) - {rung.name for rung in rungs}:
        raise UsageError(f"there is no preset {', '.join(sorted(unknown))}; expected some of 8 12 16 24 40")
    if not torch.cuda.is_available():
        raise UsageError("memory is measured on a GPU, and there is none")
    write = sys.stdout.write
    write("| --vram | method | allocated, GB | reserved, GB |\n|---|---|---|---|\n")
    for rung in rungs:
        for method in METHODS:
            teacher = random_teacher("cuda", torch.bfloat16 if rung.half else torch.float32)
            rung.apply_to(teacher)
            found = peak(settings(rung, method), teacher)
            del teacher
            write(f"| {rung.name} | {method} | {found.allocated / 1e9:.1f} | {found.reserved / 1e9:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
