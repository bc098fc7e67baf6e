"""Peak memory of every `--vram` preset on networks of Stable Diffusion 2.1's shape with random weights.

    python -m uni3d.text_to_3d.memory_benchmark            # all presets, on the GPU
    python -m uni3d.text_to_3d.memory_benchmark 8 12       # some of them

Memory does not depend on the weights, so nothing is downloaded. Prints a table in Markdown: the peak that
torch had allocated and reserved over a few steps of the method at the preset's bounds, in GB (1e9 bytes).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uni3d.config.text_to_3d import (
    DiscriminatorConfig,
    FakeScoreConfig,
    FieldConfig,
    RendererConfig,
    TextTo3DConfig,
)
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.text_to_3d.memory import RUNGS, MemoryRung
from uni3d.text_to_3d.random_teacher import random_teacher
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser

METHODS = ("vsd", "uni-instruct")
NUM_STEPS = 4


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes that torch held at most."""

    allocated: int
    reserved: int


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
            dtype = torch.bfloat16 if rung.half else torch.float32
            teacher = random_teacher("sd21", device=torch.device("cuda"), dtype=dtype)
            rung.apply_to(teacher)
            found = peak(settings(rung, method), teacher)
            del teacher
            write(f"| {rung.name} | {method} | {found.allocated / 1e9:.1f} | {found.reserved / 1e9:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
