"""How much memory a run takes, and what to give up when there is none left.

A `MemoryRung` bounds what dominates: the rendered resolution, samples a ray, views a step, and how networks
hold their activations. `--vram` chooses one; running out of memory steps down to the next, as often as there
is one. Results change with the bounds, never silently.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint

from uni3d.config.stages import GeometryConfig, TextureConfig
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.config.values import Schedule
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import OutOfMemory

logger = logging.getLogger(__name__)

Stage = TypeVar("Stage", GeometryConfig, TextureConfig)


@dataclass(frozen=True)
class MemoryRung:
    """Bounds on a run.

    Attributes:
        name: what `--vram` calls it, or what the last rungs are.
        max_resolution: largest rendered side, pixels.
        max_samples_per_ray, max_views: of a training step.
        half: networks in bfloat16; chosen when they are loaded, on a GPU.
        offload_text: keep the text encoders on the CPU.
        checkpointing: compute the VAE's activations again in the backward pass. Not the UNet's: its adapters
            are off by then, and the network computed again would be another.
        slicing: the VAE takes one image at a time.
    """

    name: str
    max_resolution: int
    max_samples_per_ray: int
    max_views: int
    half: bool = True
    offload_text: bool = True
    checkpointing: bool = False
    slicing: bool = False

    def bounded(self, config: TextTo3DConfig) -> TextTo3DConfig:
        """The settings, no larger than this rung allows."""
        renderer = dataclasses.replace(
            config.renderer,
            resolution=_at_most(config.renderer.resolution, self.max_resolution),
            samples_per_ray=min(config.renderer.samples_per_ray, self.max_samples_per_ray),
        )
        guidance = dataclasses.replace(
            config.guidance, views_per_step=min(config.guidance.views_per_step, self.max_views)
        )
        stages = dataclasses.replace(
            config.stages,
            geometry=self._bounded_stage(config.stages.geometry),
            texture=self._bounded_stage(config.stages.texture),
        )
        return dataclasses.replace(config, renderer=renderer, guidance=guidance, stages=stages)

    def _bounded_stage(self, stage: Stage) -> Stage:
        guidance = dataclasses.replace(
            stage.guidance,
            resolution=_at_most(stage.guidance.resolution, self.max_resolution),
            views_per_step=min(stage.guidance.views_per_step, self.max_views),
        )
        return dataclasses.replace(stage, guidance=guidance)

    def apply_to(self, teacher: LatentDiffusionTeacher) -> None:
        """Hold the teacher's networks as this rung asks, except for their precision."""
        if self.offload_text:
            for encoder in teacher.text_encoders:
                if encoder is not None:
                    encoder.to("cpu")
        if self.checkpointing:
            teacher.vae.enable_gradient_checkpointing(_computed_again)
        if self.slicing:
            teacher.vae.enable_slicing()


RUNGS = (
    MemoryRung("40", 512, 512, 4, offload_text=False),
    MemoryRung("24", 512, 512, 2),
    MemoryRung("16", 512, 256, 1),
    MemoryRung("12", 384, 256, 1, checkpointing=True, slicing=True),
    MemoryRung("8", 256, 128, 1, checkpointing=True, slicing=True),
    MemoryRung("small renders", 128, 96, 1, checkpointing=True, slicing=True),
    MemoryRung("smallest renders", 64, 48, 1, checkpointing=True, slicing=True),
)


def rung_for(vram_gb: int) -> MemoryRung:
    """The rung that a card of so many gigabytes should carry."""
    return next(rung for rung in RUNGS if rung.name == str(vram_gb))


def fitted(config: TextTo3DConfig) -> TextTo3DConfig:
    """The settings, no larger than the card of `config.vram` allows; as they are where that is none."""
    return config if config.vram is None else rung_for(config.vram).bounded(config)


# An autoencoder draws no numbers, and a pass that is being captured may not ask for a generator's state.
_computed_again = functools.partial(
    torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False
)


class MemoryLadder:
    """Bounds the settings of a run, and bounds them more each time memory runs out."""

    def __init__(self, config: TextTo3DConfig) -> None:
        self._next = 0 if config.vram is None else RUNGS.index(rung_for(config.vram)) + 1

    def step(self, optimiser: Any) -> Any:
        """`optimiser.step()`; None where memory ran out and the settings are bounded now, but the state has
        to be set back. Raises OutOfMemory as `step_down`."""
        try:
            return optimiser.step()
        except torch.OutOfMemoryError as error:
            self.step_down(optimiser, error)
        # Outside the handler, since the error's traceback holds on to the tensors of the step.
        free_memory()
        return None

    def step_down(self, optimiser: Any, error: BaseException) -> None:
        """Bound `optimiser.config` by the next rung that changes anything.

        Raises OutOfMemory, with the flags to try, when there is none.
        """
        while self._next < len(RUNGS):
            rung = RUNGS[self._next]
            self._next += 1
            bounded = rung.bounded(optimiser.config)
            if bounded == optimiser.config and not (rung.checkpointing and not _is_checkpointing(optimiser)):
                continue
            logger.warning("out of memory; going on with %s", _describe(bounded, rung))
            optimiser.config = bounded
            rung.apply_to(optimiser.teacher)
            return
        raise OutOfMemory(
            "out of memory with the smallest settings there are; use a card with more memory, a smaller "
            "--teacher, or fewer numbers in the field: --field.encoding dense --field.resolutions 24 48"
        ) from error


def free_memory() -> None:
    """Give back what a step that failed has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _is_checkpointing(optimiser: Any) -> bool:
    return bool(optimiser.teacher.vae.is_gradient_checkpointing)


def _describe(config: TextTo3DConfig, rung: MemoryRung) -> str:
    size = round(max(value for _, value in config.renderer.resolution))
    said = (
        f"renders of at most {size} pixels, {config.renderer.samples_per_ray} samples a ray and "
        f"{config.guidance.views_per_step} views a step"
    )
    return f"{said}, activations computed twice" if rung.checkpointing else said


def _at_most(schedule: Schedule, limit: float) -> Schedule:
    return tuple((position, min(value, float(limit))) for position, value in schedule)
