"""The program behind `uni3d train-teacher`: images -> an EDM denoiser, the teacher of one-step students.

The loss is that of Karras et al. (arXiv 2206.00364): ln sigma ~ N(P_mean, P_std^2), squared error weighted by
(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Table 1). What is published is the running average.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.config.loader import config_to_yaml
from uni3d.data.image_dataset import ImageDataset
from uni3d.diffusion.edm import EDMDenoiser
from uni3d.diffusion.edm_config import EDMConfig
from uni3d.distillation.draws import STREAM_IMAGES, STREAM_TEACHER, STREAM_WEIGHTS, Drawer
from uni3d.distillation.frozen import Compiled, frozen_view
from uni3d.distillation.image_batches import ImageBatches, facts_of, open_source
from uni3d.distillation.loop import RunFolder, TrainingResult, run_training
from uni3d.distillation.sample_grid import draw_grid
from uni3d.distillation.session import (
    average_facts,
    body_dtype,
    check_batch,
    fingerprint,
    parts_of,
    placed,
    prepare_device,
    publish_average,
)
from uni3d.distillation.settings import TeacherTrainingConfig
from uni3d.distillation.sigma_laws import Lognormal
from uni3d.distillation.statistics import RunningMeans
from uni3d.distillation.teacher_images import integrate_all
from uni3d.distillation.weights import AdamSettings, TrainedWeights, average_decay, rate_factor
from uni3d.losses.fake_score import denoising_loss
from uni3d.losses.per_sample import over_elements
from uni3d.training.devices import choose_device
from uni3d.training.processes import Processes, joined_processes
from uni3d.training.seeds import mix_seeds

logger = logging.getLogger(__name__)

GRID_STEPS = 18


class TeacherTraining:
    """The state of a teacher's training and its step; see `loop.Program`."""

    command = "train-teacher"

    def __init__(
        self,
        config: TeacherTrainingConfig,
        network: EDMConfig,
        dataset: ImageDataset,
        *,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.config, self.processes = config, processes
        run = config.run
        seed = mix_seeds(run.seed, STREAM_WEIGHTS)
        self.network = EDMDenoiser(
            network,
            body_dtype=body_dtype(run, device),
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        placed(self.network, device)
        self.network.train()
        optimiser = config.optimiser
        self.weights = TrainedWeights(
            {"network": self.network},
            {"network": optimiser.learning_rate},
            AdamSettings((optimiser.beta1, optimiser.beta2), optimiser.epsilon, optimiser.gradient_clip),
            averaged="network",
        )
        self.averaged = frozen_view(self.network, self.weights.average)
        self._call = Compiled(self.network, enabled=run.compile and device.type == "cuda")
        self.batches = ImageBatches(
            dataset,
            config.data,
            batch=run.batch,
            seed=mix_seeds(run.seed, STREAM_IMAGES),
            device=device,
            processes=processes,
            has_labels=network.label_dim > 0,
        )
        shape = (network.image_channels, network.resolution, network.resolution)
        self.drawer = Drawer(seed=run.seed, batch=run.batch, shape=shape, device=device, processes=processes)
        self.law = Lognormal(config.noise.mean, config.noise.std)
        self.parts = parts_of(run, processes)
        self.device = device
        self.statistics = RunningMeans()
        self._draws_by_itself = network.dropout > 0 or network.label_dropout > 0
        logger.info("teacher: %.2f M parameters on %s", self.weights.num_parameters / 1e6, device)

    def step(self, index: int) -> None:
        run, optimiser = self.config.run, self.config.optimiser
        images, labels = self.batches.at(index)
        eps, sigma = self.drawer.noise(STREAM_TEACHER, index, self.law)
        if self._draws_by_itself:
            self.drawer.seed_dropout(index)
        for part in self.parts:
            loss = self._loss(images[part], sigma[part], eps[part], None if labels is None else labels[part])
            (loss.sum() / run.batch).backward()
            self.statistics.add({"loss": loss.detach() / images[0].numel()})
        factor = rate_factor(
            index * run.batch,
            total_images=run.total_images,
            ramp_images=optimiser.ramp_images,
            final_fraction=optimiser.final_fraction,
        )
        self.statistics.count_update(self.weights.step(rate_factor=factor, processes=self.processes))
        average = self.config.average
        decay = average_decay(
            run.batch,
            (index + 1) * run.batch,
            half_life_images=average.half_life_images,
            ramp_up=average.ramp_up,
        )
        self.weights.update_average(decay)

    def _loss(self, images: Tensor, sigma: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        """Eq. 8 of Karras et al., [B]: sums over the elements of each image."""
        prediction = self._call(images + over_elements(sigma, images) * eps, sigma, labels)
        sigma_data = self.network.config.sigma_data
        return denoising_loss(
            prediction, images, sigma, weighting="edm", sigma_data=sigma_data, reduction="sum"
        )

    def take_statistics(self) -> dict[str, float]:
        return self.statistics.take()

    def state(self) -> dict[str, Any]:
        return self.weights.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.weights.load_state(state)

    def draw_grid(self) -> Tensor:
        def sample(latent: Tensor, labels: Tensor | None) -> Tensor:
            return integrate_all(self.averaged, latent, labels, num_steps=GRID_STEPS)

        return draw_grid(sample, self.network.config, seed=self.config.run.seed, device=self.device)

    def publish(self, folder: Path, *, images: int) -> Path:
        source = {"program": "uni3d train-teacher", "data": self.config.data.source}
        source |= average_facts(self.config.average, images)
        return publish_average(self.weights, self.network, folder, source)

    def close(self) -> None:
        self.batches.close()


def train_teacher(
    config: TeacherTrainingConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    accept_changes: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Train a teacher on the images of `config.data`; the network is `output`/teacher.

    Under `torchrun` with several processes the batch is shared among them, one GPU each.

    Args:
        resume: go on with the run in `output`; otherwise it must hold none.
        accept_changes: go on although settings or data differ from the run's.

    Raises:
        UsageError: images, network or folder that do not work; nothing was written.
        ConfigError: a resumed run of other settings, with the differences.
        Interrupted: a signal arrived; everything was saved before.
        TrainingDiverged: no gradient was finite any more.
    """
    started_s = time.monotonic()
    device = choose_device(config.run.device)
    prepare_device(device)
    with joined_processes(uses_cuda=device.type == "cuda") as processes:
        device = processes.device(device)
        folder = RunFolder(Path(output), resume, accept_changes)
        if processes.is_main:
            folder.check()
        check_batch(config.run, processes)
        dataset = open_source(config.data)
        network = config.network.edm_config(
            resolution=dataset.resolution,
            image_channels=dataset.num_channels,
            label_dim=dataset.num_classes if dataset.labels is not None else 0,
        )
        facts = {"images": facts_of(dataset), "teacher_network": network.as_dict()}
        store, checkpoint = folder.load(fingerprint(config, facts), config.run.keep_checkpoints)
        program = TeacherTraining(config, network, dataset, device=device, processes=processes)
        return run_training(
            program,
            config.run,
            folder,
            store=store,
            checkpoint=checkpoint,
            config_text=config_to_yaml(config),
            network_name="teacher",
            processes=processes,
            started_s=started_s,
            quiet=quiet,
        )
