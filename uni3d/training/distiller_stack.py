"""Teacher passes shared by several scenes, each with a fake score and a discriminator of its own.

The teacher, the fake scores and the discriminators each run once for the views of all scenes. Parameters are
the scenes' own and not shared by way of the prompt: a scene then ends where it would have ended alone, one
that fails spoils no other, and its state can leave the batch.
Legend: S scenes, B views scene by scene, N numbers of one scene.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.diffusion.discriminator import DiscriminatorHead
from uni3d.diffusion.lora_stack import LoRAFakeScoreStack
from uni3d.diffusion.prompt import PromptContexts
from uni3d.diffusion.prompt_stack import PromptStack
from uni3d.losses.discriminator import RatioNormaliser
from uni3d.losses.recipes import Recipe
from uni3d.parameter_stack import ParameterStack
from uni3d.random_streams import SharedStream, Streams
from uni3d.training.distiller import MAX_CRITIC_GRADIENT_NORM, CriticSettings, critic_updates
from uni3d.training.guidance import GuidanceLosses, RealLatents, ScoreDistillation
from uni3d.training.stack_optimiser import StackOptimiser

SAMPLES_PER_PASS = 8  # of one scene, as in `RealLatents.draw`
MAX_LATENT_PIXELS = 2**15  # of all scenes together in one pass that draws teacher samples


class DiscriminatorStack(nn.Module):
    """S discriminator heads with weights of their own, as one batched network."""

    def __init__(self, heads: Sequence[DiscriminatorHead]) -> None:
        super().__init__()
        self._like = [copy.deepcopy(heads[0]).requires_grad_(False)]  # in a list: not a part of this module
        self.names = [name for name, _ in heads[0].named_parameters()]
        rows = [torch.cat([value.detach().flatten() for value in head.parameters()]) for head in heads]
        self.stack = ParameterStack(rows, [value.shape for value in heads[0].parameters()])

    def parameters(self, recurse: bool = True) -> Any:
        """The stacked tensor, which is all that is trained."""
        return iter([self.stack.tensor])

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        """As `DiscriminatorHead.forward`, for rows that come scene by scene."""
        own = dict(zip(self.names, self.stack.parts(), strict=True))
        num_scenes = self.stack.num_scenes

        def judge(parameters: dict[str, Tensor], part: Tensor, levels: Tensor) -> Tensor:
            return torch.func.functional_call(self._like[0], parameters, (part, levels))

        features = features.contiguous()  # vmap knows no channels-last
        by_scene = features.unflatten(0, (num_scenes, -1)), sigma.unflatten(0, (num_scenes, -1))
        return torch.func.vmap(judge)(own, *by_scene).flatten(0, 1)

    def scene_state(self, scene: int) -> dict[str, Tensor]:
        """The state dict of one scene's `DiscriminatorHead`."""
        return dict(zip(self.names, self.stack.split(self.stack.tensor.detach()[scene]), strict=True))

    def load_scene_state(self, scene: int, state: Mapping[str, Tensor]) -> None:
        """Restore one scene."""
        device = self.stack.tensor.device
        self.stack.set_row(scene, [state[name].to(device) for name in self.names])


class RatioNormaliserStack(RatioNormaliser):
    """A running mean of the density ratio for each scene and noise bin."""

    def __init__(self, num_scenes: int) -> None:
        super().__init__()
        self.num_scenes = num_scenes
        self.mean_ratio = self.mean_ratio.repeat(num_scenes)
        self.count = self.count.repeat(num_scenes)

    def bin_index(self, sigma: Tensor) -> Tensor:
        """[B] -> [B], int64: each scene has its own bins, one scene's after the other's."""
        scene = torch.arange(self.num_scenes, device=sigma.device)
        scene = scene.repeat_interleave(sigma.shape[0] // self.num_scenes)
        return super().bin_index(sigma) + scene * self.num_bins

    def scene_state(self, scene: int) -> dict[str, Tensor]:
        """The state dict of one scene's `RatioNormaliser`."""
        bins = slice(scene * self.num_bins, (scene + 1) * self.num_bins)
        return {"mean_ratio": self.mean_ratio[bins], "count": self.count[bins]}

    def load_scene_state(self, scene: int, state: Mapping[str, Tensor]) -> None:
        """Restore one scene."""
        for name, own in self.scene_state(scene).items():
            own.copy_(state[name])


class RealLatentsStack(RealLatents):
    """Teacher samples of S prompts, equally many of each."""

    def __init__(self, scenes: Sequence[RealLatents]) -> None:
        self.scenes = list(scenes)
        super().__init__(*(torch.cat([one.state_dict()[name] for one in scenes]) for name in _REAL_PARTS))

    def pick(
        self, view_words: Sequence[str], generator: Streams, *, views_per_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """As `RealLatents.pick`, for view words that come scene by scene and a generator for each scene."""
        assert not isinstance(generator, torch.Generator | SharedStream)
        num_views, num_samples = len(view_words) // len(self.scenes), len(self.scenes[0].latents)
        index = torch.cat(
            [
                one.choose(
                    view_words[scene * num_views : (scene + 1) * num_views],
                    generator[scene],
                    views_per_group=views_per_group,
                )
                + scene * num_samples
                for scene, one in enumerate(self.scenes)
            ]
        )
        return self.rows(index)


_REAL_PARTS = ("latents", "view_index", "conditioning")


class DistillerStack:
    """What `Distiller` is to one prompt, for several; the methods are the same, losses are [S].

    Args:
        contexts: the prompts as one teacher reads them.
        generators: CPU generators, one for each scene; each is used as a single run uses its own.
        The others: see `Distiller`.
    """

    def __init__(
        self,
        contexts: Sequence[PromptContexts],
        recipe: Recipe,
        settings: CriticSettings,
        *,
        generators: Sequence[torch.Generator],
    ) -> None:
        self.contexts = PromptStack(contexts)
        self.teacher = self.contexts.teacher
        self.recipe = self.student_recipe = recipe
        self.generators = list(generators)
        self.num_scenes = len(self.generators)
        self.settings = settings
        self.fake_score: LoRAFakeScoreStack | None = None
        self.fake_optimiser: StackOptimiser | None = None
        if recipe.needs_fake_score:
            self.fake_score = LoRAFakeScoreStack(
                self.teacher, rank=settings.lora_rank, generators=self.generators
            )
            self.fake_optimiser = StackOptimiser(
                {"fake_score": [self.fake_score.stack]},
                torch.optim.AdamW,
                lr=settings.fake_score_learning_rate,
                weight_decay=settings.fake_score_weight_decay,
            )
        self.discriminator: DiscriminatorStack | None = None
        self.discriminator_optimiser: StackOptimiser | None = None
        self.normaliser: RatioNormaliserStack | None = None
        self.real_latents: RealLatentsStack | None = None
        self._guidance: ScoreDistillation | None = None

    def prepare(
        self,
        conditioning: Sequence[Tensor],
        view_words: Sequence[Sequence[str]],
        *,
        guidance_scale: float,
        num_steps: int,
        before_step: Callable[[], object] | None = None,
    ) -> None:
        """Draw the teacher samples of all scenes together, one for each of a scene's cameras, and connect the
        parts; arguments as `Distiller.prepare`, for each scene."""
        if self.recipe.needs_discriminator:

            def draw(scenes: slice, samples: slice) -> list[RealLatents]:
                part = RealLatents.draw(
                    PromptStack(self.contexts.contexts[scenes]),  # type: ignore[arg-type]
                    torch.cat([rows[samples] for rows in conditioning[scenes]]),
                    [word for words in view_words[scenes] for word in words[samples]],
                    guidance_scale=guidance_scale,
                    num_steps=num_steps,
                    generator=self.generators[scenes],
                    batch_size=self.num_scenes * SAMPLES_PER_PASS,
                    before_step=before_step,
                )
                return _by_scene(part, len(self.generators[scenes]))

            self._build_discriminators(self._in_passes(len(view_words[0]), draw))
        self._connect()

    def _in_passes(
        self, num_samples: int, draw: Callable[[slice, slice], list[RealLatents]]
    ) -> list[RealLatents]:
        """Every scene's samples from passes of bounded size."""
        _, height, width = self.teacher.latent_shape
        at_once = max(1, MAX_LATENT_PIXELS // (height * width * SAMPLES_PER_PASS))
        whole: list[RealLatents] = []
        for start in range(0, self.num_scenes, at_once):
            scenes = slice(start, start + at_once)
            parts = [
                draw(scenes, slice(first, first + SAMPLES_PER_PASS))
                for first in range(0, num_samples, SAMPLES_PER_PASS)
            ]
            whole += [_joined(own) for own in zip(*parts, strict=True)]
        return whole

    def _build_discriminators(self, real_latents: Sequence[RealLatents]) -> None:
        device = self.teacher.device
        self.real_latents = RealLatentsStack(real_latents)
        heads = [
            DiscriminatorHead(self.teacher.feature_channels, generator=generator).to(device)
            for generator in self.generators
        ]
        self.discriminator = DiscriminatorStack(heads)
        self.normaliser = RatioNormaliserStack(self.num_scenes).to(device)
        self.discriminator_optimiser = StackOptimiser(
            {"discriminator": [self.discriminator.stack]},
            torch.optim.AdamW,
            lr=self.settings.discriminator_learning_rate,
            betas=(0.0, 0.99),
        )

    def _connect(self) -> None:
        self._guidance = ScoreDistillation(
            self.teacher,
            self.contexts,  # type: ignore[arg-type]
            self.recipe,
            fake_score=self.fake_score,  # type: ignore[arg-type]
            discriminator=self.discriminator,  # type: ignore[arg-type]
            normaliser=self.normaliser,
            real_latents=self.real_latents,
            max_log_ratio=self.settings.max_log_ratio,
            fake_law=self.settings.fake_law,
            perp_neg=self.settings.perp_neg,
            num_scenes=self.num_scenes,
        )
        self._guidance.recipe = self.student_recipe

    def losses(
        self,
        images: Tensor,
        conditioning: Tensor,
        view_words: Sequence[str],
        *,
        noise_range: tuple[float, float],
        guidance_scale: float,
        train_student: bool = True,
    ) -> GuidanceLosses:
        """All losses of one step, each [S]; arguments as `ScoreDistillation.losses`, scene by scene."""
        assert self._guidance is not None, "prepare() or load_state_dict() comes first"
        return self._guidance.losses(
            images,
            conditioning,
            view_words,
            noise_range=noise_range,
            guidance_scale=guidance_scale,
            generator=self.generators,
            train_student=train_student,
        )

    def follow(self, recipe: Recipe) -> None:
        """Move the students by `recipe` from now on; it may need no part that this was built without."""
        self.student_recipe = recipe
        if self._guidance is not None:
            self._guidance.recipe = recipe

    def set_fake_score_learning_rate(self, rate: float) -> None:
        """As in `Distiller`."""
        if self.fake_optimiser is not None:
            self.fake_optimiser.set_learning_rates({"fake_score": rate})

    def train(self, losses: GuidanceLosses) -> list[bool]:
        """As `Distiller.train`; says for each scene whether all its updates were finite."""
        num_fake = self.settings.fake_score_updates if self.fake_score is not None else 0
        num_discriminator = self.settings.discriminator_updates if self.discriminator is not None else 0
        is_finite = [True] * self.num_scenes
        for fake_loss, discriminator_loss in critic_updates(losses, num_fake, num_discriminator):
            for loss, optimiser in (
                (fake_loss, self.fake_optimiser),
                (discriminator_loss, self.discriminator_optimiser),
            ):
                if loss is not None and optimiser is not None:
                    verdicts = optimiser.descend(loss, MAX_CRITIC_GRADIENT_NORM)
                    is_finite = [a and b for a, b in zip(is_finite, verdicts, strict=True)]
        return is_finite

    # ------------------------------------------------------------------ state

    def state_dict(self, scene: int) -> dict[str, Any]:
        """What `Distiller.state_dict` gives for one scene."""
        state: dict[str, Any] = {}
        if self.fake_score is not None and self.fake_optimiser is not None:
            state["fake_score"] = self.fake_score.state_dict(scene)
            state["fake_optimiser"] = self.fake_optimiser.state_dict(scene)
        if self.discriminator is not None and self.discriminator_optimiser is not None:
            assert self.normaliser is not None and self.real_latents is not None
            state["discriminator"] = self.discriminator.scene_state(scene)
            state["discriminator_optimiser"] = self.discriminator_optimiser.state_dict(scene)
            state["normaliser"] = self.normaliser.scene_state(scene)
            state["real_latents"] = self.real_latents.scenes[scene].state_dict()
        return state

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue where the scenes' `state_dict`s were taken. May draw from the generators."""
        if self.recipe.needs_discriminator and self.discriminator is None:
            device = self.teacher.device
            self._build_discriminators(
                [
                    RealLatents(**{name: value.to(device) for name, value in state["real_latents"].items()})
                    for state in states
                ]
            )
        for scene, state in enumerate(states):
            self.load_state_dict(scene, state)
        self._connect()

    def load_state_dict(self, scene: int, state: Mapping[str, Any]) -> None:
        """Set one scene back; its teacher samples stay, since they never change."""
        if self.fake_score is not None and self.fake_optimiser is not None:
            self.fake_score.load_state_dict(scene, state["fake_score"])
            self.fake_optimiser.load_state_dict(scene, state["fake_optimiser"])
        if self.discriminator is not None and self.discriminator_optimiser is not None:
            assert self.normaliser is not None
            self.discriminator.load_scene_state(scene, state["discriminator"])
            self.discriminator_optimiser.load_state_dict(scene, state["discriminator_optimiser"])
            self.normaliser.load_scene_state(scene, state["normaliser"])


def _by_scene(latents: RealLatents, num_scenes: int) -> list[RealLatents]:
    parts = {name: value.chunk(num_scenes) for name, value in latents.state_dict().items()}
    return [RealLatents(*(parts[name][scene] for name in _REAL_PARTS)) for scene in range(num_scenes)]


def _joined(parts: Sequence[RealLatents]) -> RealLatents:
    return RealLatents(*(torch.cat([part.state_dict()[name] for part in parts]) for name in _REAL_PARTS))
