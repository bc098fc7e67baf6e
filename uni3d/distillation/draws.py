"""The random numbers of a run, counted and not streamed: a function of the seed, their use and the step.

They are drawn for the whole batch and shared out after that, so that the number of processes and the parts a
batch is split into change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.distillation.objective import Draw
from uni3d.distillation.sigma_laws import SigmaLaw
from uni3d.training.processes import Processes
from uni3d.training.seeds import mix_seeds

# Each use of random numbers has its own number, so that none repeats another.
STREAM_WEIGHTS, STREAM_IMAGES, STREAM_TEACHER, STREAM_COMPANIONS, STREAM_STUDENT = range(1, 6)
STREAM_DROPOUT, STREAM_GRID, STREAM_PAIRS, STREAM_HEAD = range(6, 10)


class Drawer:
    """Draws for batches of `batch` samples of `shape` (C, H, W); each process gets its share."""

    def __init__(
        self,
        *,
        seed: int,
        batch: int,
        shape: tuple[int, int, int],
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.seed = seed
        self.batch = batch
        self.shape = shape
        self.share = processes.share(batch)
        self._rank = processes.rank
        self._generator = torch.Generator(device)

    def at(
        self,
        stream: int,
        index: int,
        law: SigmaLaw,
        *,
        num_classes: int = 0,
        has_real: bool = False,
        num_references: int = 0,
    ) -> Draw:
        """The draw of number `index` in `stream`: classes uniform over `num_classes`, noise for real images
        and rows among `num_references` pairs where asked for."""
        generator = self._generator
        generator.manual_seed(self._seed(stream, index))
        latent, eps = self._normal(), self._normal()
        sigma = law.sample(self.batch, generator)
        labels = self._integers(num_classes) if num_classes else None
        real_eps = self._normal() if has_real else None
        reference = self._integers(num_references) if num_references else None
        return Draw(latent, sigma, eps, labels, real_eps, reference).rows(self.share)

    def noise(self, stream: int, index: int, law: SigmaLaw) -> tuple[Tensor, Tensor]:
        """(noise, levels) for images: standard normal [B, C, H, W] and [B]."""
        self._generator.manual_seed(self._seed(stream, index))
        eps = self._normal()
        return eps[self.share], law.sample(self.batch, self._generator)[self.share]

    def seed_dropout(self, index: int) -> None:
        """Make what networks in training draw by themselves a function of the step and the process."""
        torch.manual_seed(mix_seeds(self._seed(STREAM_DROPOUT, index), self._rank))

    def _seed(self, stream: int, index: int) -> int:
        return mix_seeds(mix_seeds(self.seed, stream), index)

    def _normal(self) -> Tensor:
        size = (self.batch, *self.shape)
        return torch.randn(size, generator=self._generator, device=self._generator.device)

    def _integers(self, high: int) -> Tensor:
        size = (self.batch,)
        return torch.randint(high, size, generator=self._generator, device=self._generator.device)
