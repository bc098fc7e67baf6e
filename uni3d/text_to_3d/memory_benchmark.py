"""Peak memory of every `--vram` preset on networks of Stable Diffusion 2.1's shape with random weights.

    python -m uni3d.text_to_3d.memory_benchmark            # all presets, on the GPU
    python -m uni3d.text_to_3d.memory_benchmark 8 12       # some of them

Memory does not depend on the weights, so nothing is downloaded. Prints a table in Markdown: the peak that
torch had allocated and reserved over a few steps of the method at the preset's bounds, in GB (1e9 bytes).
"""

from __future__ import annotations

import dataclasses
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
from uni3d.diffusion.acceleration import accelerate
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.text_to_3d.memory import RUNGS, MemoryRung, free_memory
from uni3d.text_to_3d.random_teacher import random_teacher
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.timing_program import argument_parser, keep_figures, say

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


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.text_to_3d.memory_benchmark`."""
    presets = [rung.name for rung in RUNGS if rung.name.isdigit()]
    parser = argument_parser("uni3d.text_to_3d.memory_benchmark", __doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"of {' '.join(presets)}; all if none")
    parser.add_argument("--compile", default="auto", choices=["auto", "off", "compile", "graphs"])
    given = parser.parse_args(arguments)
    try:
        _check(given.presets, presets, given.device)
    except UsageError as error:
        parser.error(str(error))
    figures: dict[str, dict[str, int]] = {}
    say("| --vram | method | allocated, GB | reserved, GB |\n|---|---|---|---|")
    for rung in RUNGS:
        if rung.name not in (given.presets or presets):
            continue
        for method in METHODS:
            found = _peak_of(rung, method, given.compile)
            figures[f"{rung.name} {method}"] = dataclasses.asdict(found)
            say(f"| {rung.name} | {method} | {found.allocated / 1e9:.1f} | {found.reserved / 1e9:.1f} |")
            keep_figures(figures, given.output)
    return 0


def _check(asked: Sequence[str], presets: Sequence[str], device: str) -> None:
    if unknown := set(asked) - set(presets):
        raise UsageError(
            f"there is no preset {', '.join(sorted(unknown))}; expected some of {' '.join(presets)}"
        )
    if not device.startswith("cuda"):
        raise UsageError(f"memory is measured on a GPU, and the device is '{device}'; expected cuda")


def _peak_of(rung: MemoryRung, method: str, compile_mode: str) -> MemoryPeak:
    """Of one row, with networks run as `uni3d generate` runs them."""
    free_memory()  # of the row before, whose networks refer to themselves
    dtype = torch.bfloat16 if rung.half else torch.float32
    teacher = random_teacher("sd21", device=torch.device("cuda"), dtype=dtype)
    rung.apply_to(teacher)
    accelerate(teacher, compile_mode)
    return peak(settings(rung, method), teacher)


if __name__ == "__main__":
    raise SystemExit(main())
