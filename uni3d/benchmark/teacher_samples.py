"""The teacher's own pictures of the benchmark's prompts, from the cameras that results are judged from.

They are what a distilled result is compared with, and say how far quality and diversity could go. Drawn once
and kept in `teacher/<prompt>/`. Legend: K samples, V views, S pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uni3d.benchmark.backends import read_views, write_views
from uni3d.benchmark.settings import ViewsConfig
from uni3d.benchmark.work_list import claim
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.prompt import PromptContexts
from uni3d.prompts import prompt_slug
from uni3d.scene.camera import Cameras
from uni3d.training.guidance import RealLatents


@dataclass(frozen=True)
class TeacherSamples:
    """The samples of a benchmark in `folder`; processes share the work prompt by prompt."""

    folder: Path
    teacher: LatentDiffusionTeacher
    cameras: Cameras
    settings: ViewsConfig

    def path(self, prompt: str) -> Path:
        """The file of one prompt's samples."""
        return self.folder / "teacher" / prompt_slug(prompt) / "views.npz"

    def draw(self, prompt: str, *, wait: bool) -> None:
        """Draw the samples of `prompt` unless they are there; if another process is at it, `wait` or leave
        it to that."""
        if self.settings.teacher_samples_per_view == 0:
            return
        with claim(self.path(prompt).parent, wait=wait) as is_mine:
            if is_mine and not self.path(prompt).is_file():
                write_views(self.path(prompt), self._sample(prompt))

    def read(self, prompt: str) -> Tensor:
        """float32 [K, V, 3, S, S] in [0, 1]."""
        return read_views(self.path(prompt)).unflatten(0, (-1, len(self.cameras)))

    def _sample(self, prompt: str) -> Tensor:
        num = self.settings.teacher_samples_per_view
        cameras = self.cameras[torch.arange(num * len(self.cameras)) % len(self.cameras)]
        # A seed of the prompt's own, so that the samples do not depend on which prompts came before.
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
        latents = RealLatents.draw(
            PromptContexts.encode(self.teacher, prompt),
            cameras.conditioning(),
            cameras.view_words(),
            guidance_scale=self.settings.sampling_guidance,
            num_steps=self.settings.sampling_steps,
            generator=torch.Generator().manual_seed(seed),
            is_one_of_many=True,  # of the prompts
        ).latents
        return torch.cat([self.teacher.decode_latents(part) for part in latents.split(16)])
