"""The program behind `uni3d distill`: an EDM teacher -> a generator that makes an image in one evaluation.

    one step = update fake score and discriminator, then the student

Student and fake score start as the teacher, the student at one noise level: x = G(sigma_init z). Which member
of the family trains it, and in what stages, is `stages`; the losses are `objective`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.config.loader import config_to_yaml
from uni3d.data.image_dataset import ImageDataset
from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.edm import EDMDenoiser
from uni3d.distillation.draws import (
    STREAM_COMPANIONS,
    STREAM_HEAD,
    STREAM_IMAGES,
    STREAM_PAIRS,
    STREAM_STUDENT,
    Drawer,
)
from uni3d.distillation.frozen import Compiled, frozen_view
from uni3d.distillation.image_batches import ImageBatches, check_images, facts_of, open_source
from uni3d.distillation.loop import RunFolder, TrainingResult, run_training
from uni3d.distillation.objective import (
    CompanionView,
    ObjectiveSettings,
    StudentView,
    companion_losses,
    generate,
    student_losses,
)
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
    read_network,
)
from uni3d.distillation.settings import DistillConfig
from uni3d.distillation.sigma_laws import companion_law, student_law
from uni3d.distillation.stages import Stage, stage_at, stages_of
from uni3d.distillation.statistics import RunningMeans
from uni3d.distillation.teacher_images import integrate_all
from uni3d.distillation.weights import AdamSettings, TrainedWeights, average_decay, rate_factor
from uni3d.errors import UsageError
from uni3d.losses.discriminator import RatioNormaliser
from uni3d.losses.per_sample import mean_per_sample
from uni3d.losses.recipe import Recipe
from uni3d.training.devices import choose_device
from uni3d.training.processes import Processes, joined_processes
from uni3d.training.seeds import mix_seeds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Noise and what the teacher's deterministic sampler makes of it, N rows."""

    latent: Tensor
    images: Tensor
    labels: Tensor | None


class StudentTraining:
    """The state of a distillation and its step; see `loop.Program`.

    Args:
        teacher: on the CPU; taken over.
        initial_student: of the teacher's shape; None starts from the teacher.
        dataset: real images for a discriminator, None where no stage trains one.
    """

    command = "distill"

    def __init__(
        self,
        config: DistillConfig,
        teacher: EDMDenoiser,
        dataset: ImageDataset | None,
        *,
        device: torch.device,
        processes: Processes,
        initial_student: EDMDenoiser | None = None,
        teacher_digest: str = "",
    ) -> None:
        self.config, self.processes, self.device = config, processes, device
        self.teacher_digest = teacher_digest
        self.stages = stages_of(config.method)
        self.has_discriminator = needs_images(self.stages)
        run, network = config.run, teacher.config
        self.num_classes = network.label_dim
        dtype = body_dtype(run, device)
        dropout = network.dropout if config.dropout is None else config.dropout
        self.network_config = dataclasses.replace(network, dropout=dropout, label_dropout=0.0)
        self.student = self._copy_of(initial_student or teacher, dtype)
        self.fake = self._copy_of(teacher, dtype)
        teacher.body_dtype = dtype
        placed(teacher, device)
        self.teacher = frozen_view(teacher)
        self.head = self._build_head() if self.has_discriminator else None
        self._build_weights()
        self.averaged = frozen_view(self.student, self.student_weights.average)
        self._build_views(enabled=run.compile and device.type == "cuda")
        law = config.noise
        self.law, self.companion_law = student_law(law), companion_law(law)
        shape = (network.image_channels, network.resolution, network.resolution)
        self.drawer = Drawer(seed=run.seed, batch=run.batch, shape=shape, device=device, processes=processes)
        self.normaliser = RatioNormaliser(horizon=max(200.0, 8.0 * run.batch)).to(device).eval()
        method = config.method
        self.objective = ObjectiveSettings(
            sigma_init=config.sigma_init,
            sigma_data=network.sigma_data,
            placement=method.discriminator,
            max_log_ratio=method.max_log_ratio,
            discriminator_weight=config.companions.discriminator_weight,
            expansion_power=method.weighting_power if method.weighting == "expansion" else None,
        )
        self.parts = parts_of(run, processes)
        self.statistics = RunningMeans()
        self.batches = None if dataset is None else self._build_batches(dataset)
        needs_pairs = any(stage.recipe and stage.recipe.regression_weight > 0 for stage in self.stages)
        self.pairs = self._draw_pairs() if needs_pairs else None
        self._stage_name = ""
        logger.info(
            "student and fake score: %.2f M parameters each on %s; %s",
            self.student_weights.num_parameters / 1e6, device, self.stages[-1].recipe.terms,  # type: ignore[union-attr]
        )  # fmt: skip

    # ------------------------------------------------------------------ what it is made of

    def _copy_of(self, network: EDMDenoiser, dtype: torch.dtype) -> EDMDenoiser:
        copied = EDMDenoiser(self.network_config, body_dtype=dtype)
        copied.load_state_dict(network.state_dict())
        if copied.model.map_augment is not None:  # images are not augmented here, so it would get no gradient
            copied.model.map_augment.requires_grad_(False)
        placed(copied, self.device)
        return copied.train()

    def _build_head(self) -> DiscriminatorHead:
        generator = torch.Generator("cpu").manual_seed(mix_seeds(self.config.run.seed, STREAM_HEAD))
        head = DiscriminatorHead(
            self.network_config.feature_channels,
            hidden_channels=self.config.companions.head_channels,
            generator=generator,
        )
        return head.to(self.device)

    def _build_weights(self) -> None:
        optimiser, companions = self.config.optimiser, self.config.companions
        self.student_weights = TrainedWeights(
            {"student": self.student},
            {"student": optimiser.learning_rate},
            AdamSettings((optimiser.beta1, optimiser.beta2), optimiser.epsilon, optimiser.gradient_clip),
            averaged="student",
        )
        networks: dict[str, torch.nn.Module] = {"fake_score": self.fake}
        if self.head is not None:
            networks["head"] = self.head
        self.companion_weights = TrainedWeights(
            networks,
            {"fake_score": companions.learning_rate, "head": companions.head_learning_rate},
            AdamSettings((companions.beta1, companions.beta2), companions.epsilon, companions.gradient_clip),
        )

    def _build_views(self, *, enabled: bool) -> None:
        """Each update sees the networks that it does not train through frozen views, which share tensors."""

        def view(network: torch.nn.Module) -> Compiled:
            return Compiled(network, enabled=enabled)

        teacher, student = view(self.teacher), view(self.student)
        self._student = student
        self.student_view = StudentView(
            student=student,
            teacher=teacher,
            fake=view(frozen_view(self.fake)),
            head=None if self.head is None else frozen_view(self.head),
        )
        self.companion_view = CompanionView(
            student=view(frozen_view(self.student)), fake=view(self.fake), head=self.head, teacher=teacher
        )

    def _build_batches(self, dataset: ImageDataset) -> ImageBatches:
        return ImageBatches(
            dataset,
            self.config.data,
            batch=self.config.run.batch,
            seed=mix_seeds(self.config.run.seed, STREAM_IMAGES),
            device=self.device,
            processes=self.processes,
            has_labels=self.num_classes > 0,
        )

    def _draw_pairs(self) -> Pairs:
        method, network = self.config.method, self.network_config
        generator = torch.Generator("cpu").manual_seed(mix_seeds(self.config.run.seed, STREAM_PAIRS))
        shape = (method.regression_pairs, network.image_channels, network.resolution, network.resolution)
        latent = torch.randn(shape, generator=generator).to(self.device)
        labels = None
        if self.num_classes:
            labels = torch.randint(self.num_classes, shape[:1], generator=generator).to(self.device)
        logger.info("the teacher draws %d noise-image pairs", method.regression_pairs)
        images = integrate_all(self.teacher, latent, labels, num_steps=method.regression_steps)
        return Pairs(latent, images, labels)

    # ------------------------------------------------------------------ one step

    def step(self, index: int) -> None:
        run = self.config.run
        stage = stage_at(self.stages, index * run.batch)
        if stage.name != self._stage_name:
            logger.info("stage '%s' from image %d on", stage.name, index * run.batch)
            self._stage_name = stage.name
        if self.network_config.dropout > 0:
            self.drawer.seed_dropout(index)
        recipe = stage.recipe or self.stages[-1].recipe
        assert recipe is not None
        for update in range(recipe.fake_steps):
            self._update_companions(index, index * recipe.fake_steps + update)
        if stage.recipe is not None:
            self._update_student(index, stage.recipe)

    def _update_companions(self, index: int, update: int) -> None:
        run = self.config.run
        real, labels = (None, None) if self.batches is None else self.batches.at(update)
        draw = self.drawer.at(
            STREAM_COMPANIONS,
            update,
            self.companion_law,
            num_classes=self.num_classes if labels is None else 0,
            has_real=real is not None,
        )
        if labels is not None:
            draw = dataclasses.replace(draw, labels=labels)
        for part in self.parts:
            losses, statistics = companion_losses(
                self.companion_view, draw.rows(part), self.objective, None if real is None else real[part]
            )
            (losses.sum() / run.batch).backward()
            self.statistics.add(statistics)
        skipped = self.companion_weights.step(
            rate_factor=self._rate_factor(index, ramp_images=0), processes=self.processes
        )
        self.statistics.count_update(skipped)

    def _update_student(self, index: int, recipe: Recipe) -> None:
        run, average = self.config.run, self.config.average
        pairs = self.pairs if recipe.regression_weight > 0 else None
        draw = self.drawer.at(
            STREAM_STUDENT,
            index,
            self.law,
            num_classes=self.num_classes,
            num_references=0 if pairs is None else pairs.latent.shape[0],
        )
        for part in self.parts:
            rows = draw.rows(part)
            losses, statistics = student_losses(
                self.student_view,
                recipe,
                rows,
                self.objective,
                law=self.law,
                normaliser=self.normaliser if self.config.method.normalise_ratio else None,
                regression=None if pairs is None else self._regression(pairs, rows.reference),
                processes=self.processes,
            )
            (losses.sum() / run.batch).backward()
            self.statistics.add(statistics)
        factor = self._rate_factor(index, ramp_images=self.config.optimiser.ramp_images)
        self.statistics.count_update(self.student_weights.step(rate_factor=factor, processes=self.processes))
        decay = average_decay(
            run.batch,
            (index + 1) * run.batch,
            half_life_images=average.half_life_images,
            ramp_up=average.ramp_up,
        )
        self.student_weights.update_average(decay)

    def _regression(self, pairs: Pairs, rows: Tensor | None) -> Callable[[], Tensor]:
        """The loss per sample that ties the student to the teacher's sampler: mean squared error."""
        assert rows is not None

        def loss() -> Tensor:
            labels = None if pairs.labels is None else pairs.labels[rows]
            made = generate(self._student, pairs.latent[rows], labels, self.config.sigma_init)
            return mean_per_sample((made - pairs.images[rows]).square())

        return loss

    def _rate_factor(self, index: int, *, ramp_images: int) -> float:
        run = self.config.run
        return rate_factor(
            index * run.batch,
            total_images=run.total_images,
            ramp_images=ramp_images,
            final_fraction=self.config.optimiser.final_fraction,
        )

    # ------------------------------------------------------------------ around the steps

    def take_statistics(self) -> dict[str, float]:
        return self.statistics.take()

    def state(self) -> dict[str, Any]:
        return {
            "student": self.student_weights.state(),
            "companions": self.companion_weights.state(),
            "normaliser": self.normaliser.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.student_weights.load_state(state["student"])
        self.companion_weights.load_state(state["companions"])
        self.normaliser.load_state_dict(state["normaliser"])

    def draw_grid(self) -> Tensor:
        @torch.no_grad()
        def sample(latent: Tensor, labels: Tensor | None) -> Tensor:
            return generate(self.averaged, latent, labels, self.config.sigma_init)

        return draw_grid(sample, self.network_config, seed=self.config.run.seed, device=self.device)

    def publish(self, folder: Path, *, images: int) -> Path:
        recipe = self.stages[-1].recipe
        assert recipe is not None
        source: dict[str, Any] = {
            "program": "uni3d distill",
            "student": {
                "sigma_init": self.config.sigma_init,
                "method": recipe.name,
                "divergence": recipe.divergence.name,
            },
            "teacher": self.config.teacher,
            "teacher_sha256": self.teacher_digest,
        }
        source |= average_facts(self.config.average, images)
        return publish_average(self.student_weights, self.student, folder, source)

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()


def needs_images(stages: tuple[Stage, ...]) -> bool:
    """Whether any stage reads a discriminator, which then learns from the first step on."""
    return any(stage.recipe is not None and stage.recipe.needs_discriminator for stage in stages)


def distill(
    config: DistillConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    accept_changes: bool = False,
    quiet: bool = False,
) -> TrainingResult:
    """Distil `config.teacher` into a one-step student; the network is `output`/student.

    Arguments, processes and errors as in `teacher_training.train_teacher`; also UsageError and
    MissingWeightsError for a teacher that cannot be read or does not go with the images.
    """
    started_s = time.monotonic()
    stages = stages_of(config.method)
    device = choose_device(config.run.device)
    prepare_device(device)
    with joined_processes(uses_cuda=device.type == "cuda") as processes:
        device = processes.device(device)
        folder = RunFolder(Path(output), resume, accept_changes)
        if processes.is_main:
            folder.check()
        check_batch(config.run, processes)
        if config.teacher is None:
            raise UsageError("no teacher was given; pass --teacher with RUN/teacher of train-teacher")
        network, teacher, digest = read_network(config.teacher, title="teacher")
        initial, initial_digest = _initial_student(config, teacher)
        dataset = None
        if needs_images(stages):
            dataset = open_source(config.data)
            check_images(dataset, network, title="teacher")
        elif config.data.source is not None:
            logger.info("no stage of this method looks at real images: '%s' is not read", config.data.source)
        facts: dict[str, Any] = {"teacher_network": network.as_dict(), "teacher_sha256": digest}
        facts["initial_student_sha256"] = initial_digest
        facts["images"] = None if dataset is None else facts_of(dataset)
        store, checkpoint = folder.load(fingerprint(config, facts), config.run.keep_checkpoints)
        program = StudentTraining(
            config,
            teacher,
            dataset,
            device=device,
            processes=processes,
            initial_student=initial,
            teacher_digest=digest,
        )
        return run_training(
            program,
            config.run,
            folder,
            store=store,
            checkpoint=checkpoint,
            config_text=config_to_yaml(config),
            network_name="student",
            processes=processes,
            started_s=started_s,
            quiet=quiet,
        )


def _initial_student(config: DistillConfig, teacher: EDMDenoiser) -> tuple[EDMDenoiser | None, str | None]:
    """The network that the student starts from and its digest. Raises UsageError for another architecture."""
    if config.initial_student is None:
        return None, None
    _, network, digest = read_network(config.initial_student, title="initial student")
    shapes = ({name: tuple(t.shape) for name, t in net.state_dict().items()} for net in (network, teacher))
    same_body = network.config.body == teacher.config.body
    if not same_body or next(shapes) != next(shapes):
        raise UsageError(
            f"the initial student '{config.initial_student}' is of another architecture than the teacher "
            f"'{config.teacher}'; pass one that was distilled from it"
        )
    return network, digest
