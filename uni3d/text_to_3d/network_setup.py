"""The models that a text-to-3D run asks, as its configuration wants them run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.diffusion.acceleration import accelerate
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.resources import weights_folder
from uni3d.text_to_3d.memory import rung_for
from uni3d.text_to_3d.scene_optimiser import resolve_recipe

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_teacher(config: TextTo3DConfig, device: str) -> LatentDiffusionTeacher:
    """The teacher with its LoRA. Raises what `LatentDiffusionTeacher.from_pretrained` raises."""
    return _load(config, config.teacher, device, lora=config.teacher_lora)


def load_fake_base(config: TextTo3DConfig, device: str) -> LatentDiffusionTeacher | None:
    """The model that carries the fake score; None where that is the teacher, or none is trained."""
    base = config.fake_score.base
    if base is None or not resolve_recipe(config).needs_fake_score:
        return None
    return _load(config, base, device)


def _load(
    config: TextTo3DConfig, name: str, device: str, *, lora: Path | None = None
) -> LatentDiffusionTeacher:
    networks = config.networks
    rung = None if config.vram is None else rung_for(config.vram)
    is_large = name != EMBEDDED or (rung is not None and rung.half)
    precision = networks.dtype
    if precision == "auto":
        precision = "bfloat16" if is_large and torch.device(device).type == "cuda" else "float32"
    model = LatentDiffusionTeacher.from_pretrained(
        weights_folder("teacher") if name == EMBEDDED else name,
        device=device,
        dtype=PRECISIONS[precision],
        image_size=networks.image_size,
        lora=lora,
        lora_scale=config.teacher_lora_scale,
    )
    if networks.vae_slicing:
        model.vae.enable_slicing()
    if networks.vae_tiling:
        model.vae.enable_tiling()
    if rung is not None:
        rung.apply_to(model)
    logger.info("'%s': %s, %s", name, precision, accelerate(model, networks.compile))
    return model
