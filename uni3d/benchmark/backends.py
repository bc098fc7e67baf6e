"""Who makes the results: a mesh by a field, or a picture per view.

`Backend` is all that the benchmark knows of them. One that makes many scenes in a batch only has to say how
many (`max_jobs`): the work loop then claims as many jobs of one method at a time.
Legend: V views, S pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uni3d.benchmark.budgets import Optimiser, PassCounter
from uni3d.benchmark.machine import PeakMemory
from uni3d.benchmark.pictures import PictureOptimiser
from uni3d.benchmark.stage_costs import StageCosts
from uni3d.config.text_to_3d import TextTo3DConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import UsageError
from uni3d.evaluation.mesh_quality import RenderedMesh, render_mesh
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.mesh.report import mesh_report
from uni3d.mesh.turntable import write_turntable
from uni3d.scene.camera import Cameras
from uni3d.text_to_3d.pipeline import TextTo3DPipeline
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.training.checkpoint import atomic_write
from uni3d.training.run_log import NonFiniteGuard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """One result: the file that is judged, what it cost, and what its maker found out about it."""

    path: Path
    costs: dict[str, Any]
    figures: dict[str, Any]


class Backend(Protocol):
    """Makes results and shows them."""

    teacher: LatentDiffusionTeacher
    max_jobs: int

    def optimiser(self, config: TextTo3DConfig) -> Optimiser:
        """What makes one result step by step, for the pilot of a budget."""
        ...

    def make(self, runs: Sequence[tuple[TextTo3DConfig, Path]]) -> list[Product | Exception]:
        """Up to `max_jobs` results, each in its folder; an exception in the place of one that failed."""
        ...

    def views(self, path: Path, cameras: Cameras, size: int, settings: MeshQualitySettings) -> RenderedMesh:
        """The result in `path` seen from `cameras`; UsageError if it cannot be read."""
        ...


def _each(make: Any, runs: Sequence[tuple[TextTo3DConfig, Path]]) -> list[Product | Exception]:
    """One after the other. A run that fails is an outcome of the benchmark, so its error is handed on."""
    results: list[Product | Exception] = []
    for config, folder in runs:
        try:
            results.append(make(config, folder))
        except Exception as error:
            logger.warning(
                "'%s' by %s, seed %d, failed: %s", config.prompt, config.method, config.seed, error
            )
            results.append(error)
    return results


class FieldBackend:
    """Meshes, made as `uni3d generate` makes them, and seen as the exported GLB."""

    max_jobs = 1

    def __init__(self, teacher: LatentDiffusionTeacher, *, turntables: bool = True) -> None:
        self.teacher = teacher
        self._pipeline = TextTo3DPipeline(teacher)
        self._turntables = turntables

    def optimiser(self, config: TextTo3DConfig) -> Optimiser:
        """As `Backend`."""
        return SceneOptimiser(config, self.teacher)

    def make(self, runs: Sequence[tuple[TextTo3DConfig, Path]]) -> list[Product | Exception]:
        """As `Backend`."""
        return _each(self._make, runs)

    def _make(self, config: TextTo3DConfig, folder: Path) -> Product:
        with StageCosts(config, self.teacher.device) as memory, PassCounter(self.teacher) as counter:
            result = self._pipeline(
                config.prompt,
                negative_prompt=config.negative_prompt,
                seed=config.seed,
                config=config,
                callback_on_step_end=memory,
            )
            path = result.save(folder / "mesh.glb")
        if self._turntables:
            write_turntable(path, folder / "turntable.mp4", frames=config.mesh.turntable_frames or 60)
        costs = _costs(config, counter, memory, result.seconds) | {"stages": memory.stages}
        mesh = {name: value for name, value in mesh_report(path).items() if name not in ("path", "extras")}
        return Product(path, costs, {"mesh": mesh, **result.report})

    def views(self, path: Path, cameras: Cameras, size: int, settings: MeshQualitySettings) -> RenderedMesh:
        """As `Backend`."""
        return render_mesh(path, cameras, size, settings)


class PictureBackend:
    """The 2-D mode: a picture for each camera, kept as `pictures.npz`."""

    max_jobs = 1

    def __init__(self, teacher: LatentDiffusionTeacher, cameras: Cameras) -> None:
        self.teacher = teacher
        self._cameras = cameras

    def optimiser(self, config: TextTo3DConfig) -> PictureOptimiser:
        """As `Backend`."""
        return PictureOptimiser(config, self.teacher, self._cameras)

    def make(self, runs: Sequence[tuple[TextTo3DConfig, Path]]) -> list[Product | Exception]:
        """As `Backend`."""
        return _each(self._make, runs)

    def _make(self, config: TextTo3DConfig, folder: Path) -> Product:
        guard = NonFiniteGuard(max_rollbacks=0)  # there is nothing to go back to: the third in a row raises
        seconds: dict[str, float] = {}
        with PeakMemory(self.teacher.device) as memory, PassCounter(self.teacher) as counter:
            started = time.monotonic()
            optimiser = self.optimiser(config)
            try:
                optimiser.prepare()
                seconds["prepare"] = time.monotonic() - started
                started = time.monotonic()
                for step in range(config.steps):
                    report = optimiser.step()
                    guard.check(step, {"a gradient": None if report.finite else float("nan")})
                seconds["optimise"] = time.monotonic() - started
                pictures = optimiser.pictures()
            finally:
                optimiser.close()
        path = write_views(folder / "pictures.npz", pictures)
        return Product(path, _costs(config, counter, memory, seconds), {})

    def views(self, path: Path, cameras: Cameras, size: int, settings: MeshQualitySettings) -> RenderedMesh:
        """As `Backend`; pictures have no silhouette, so they cover all of their frame."""
        images = read_views(path)
        if len(images) != len(cameras):
            raise UsageError(f"'{path}' holds {len(images)} pictures; expected {len(cameras)}, one a camera")
        return RenderedMesh(images, torch.ones(len(images), *images.shape[-2:]))


def _costs(
    config: TextTo3DConfig,
    counter: PassCounter,
    memory: PeakMemory | StageCosts,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "steps": config.steps,
        "passes": counter.passes.as_dict(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "guidance_seconds": round(seconds.get("prepare", 0.0) + seconds.get("optimise", 0.0), 3),
        "peak_memory_bytes": memory.peak_bytes,
    }


def write_views(path: Path, images: Tensor) -> Path:
    """Keep images [V, 3, S, S] in [0, 1] as 8-bit pictures in an `.npz`; returns its path."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return atomic_write(path, lambda temporary: np.savez_compressed(temporary, images=pixels))


def read_views(path: Path) -> Tensor:
    """What `write_views` kept, float32 [V, 3, S, S]; UsageError if the file cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pixels = torch.from_numpy(file["images"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"'{path}' cannot be read as views ({error}); make the run again") from error
    return pixels.permute(0, 3, 1, 2).float() / 255
