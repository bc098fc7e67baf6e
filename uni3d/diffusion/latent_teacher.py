"""What every text-to-image teacher offers to score distillation: the one contract behind which they differ.

`LatentDiffusionTeacher.from_pretrained` takes a hub id or a local directory in the diffusers layout, reads
from its `model_index.json` which class it is, and gives text contexts, image encoding, and
D(x, sigma, context) -> x0 for x = x0 + sigma * eps. Whatever a network was trained to predict, on whatever
process, is converted here, so the losses never see it.

A context is *one* tensor [B, L, E], whatever the network reads: what it wants beside the tokens (a pooled
embedding) rides in the last rows, which only its own teacher packs and unpacks. So whoever batches, repeats
or mixes contexts needs to know nothing else about them.

Legend: B batch, L context rows, E context channels, C latent channels, H W latent pixels, F feature channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from uni3d.diffusion.camera_token import CameraToken
from uni3d.errors import UsageError
from uni3d.losses.noise_schedule import SigmaTable, x0_from_prediction
from uni3d.random_streams import Streams, normal

NetworkPass = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(network input [B, C, H, W], timestep [B], context, addition to the time embedding [B, T] or None)
-> (output [B, C, H, W], middle features [B, F, h, w]), in the network's precision."""


class Denoised(NamedTuple):
    """One pass: the x0-prediction, float32 [B, C, H, W], and the middle of the network, float32 [B, F, h, w],
    which a discriminator reads free."""

    x0: Tensor
    middle: Tensor


class Repelled(NamedTuple):
    """A context [B, L, E] that guidance keeps away from, and how strongly each sample does, [B]."""

    context: Tensor
    weight: Tensor


class GuidedPrediction(NamedTuple):
    """x0-predictions, each float32 [B, C, H, W], and the conditional pass' middle [B, F, h, w]; `negative`
    is None where it was not needed."""

    x0: Tensor
    conditional: Tensor
    negative: Tensor | None
    middle: Tensor


class _MiddleReached(Exception):
    """Leaves a pass whose second half nobody asked for."""


@dataclass(kw_only=True)
class LatentDiffusionTeacher(ABC):
    """A frozen latent diffusion model. All networks are in eval mode and hold no trainable parameter.

    Attributes:
        network: the denoiser, a module of diffusers.
        tokenizers, text_encoders: in the order of the pipeline; an encoder that a model does without is None.
        image_size: side in pixels at which the teacher sees images; a multiple of `size_step`.
        views_per_group: how many neighbouring samples of a batch the network denoises together, because it
            was trained on several views of one object (MVDream); they share a noise level. 1: each alone.
        network_pass: how the network is run; replaced by a compiled or captured form of `eager_pass`.
        middle_pass: the same for `eager_middle`.
        encode_pass: the same for `eager_encode`.
        network_changed: to be called by who puts parameters into the network or takes them out, since a
            captured pass knows only those of its capture.
        accelerated: how another pass through the network is run, given the pass and what it is of.
        uncaptured: a block within which the network's passes are not captured.
    """

    network: Any
    vae: Any
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    schedule: SigmaTable
    prediction_type: str
    name: str
    image_size: int
    camera_token: CameraToken | None = None
    views_per_group: int = 1
    network_pass: NetworkPass = field(init=False)
    middle_pass: Callable[[Tensor, Tensor, Tensor], Tensor] = field(init=False)
    encode_pass: Callable[[Tensor], Tensor] = field(init=False)
    network_changed: Callable[[], object] = field(init=False)
    accelerated: Callable[[Callable[..., Any], str], Callable[..., Any]] = field(init=False)
    uncaptured: Callable[[], AbstractContextManager[object]] = field(init=False)

    attention_projections: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """The linear layers of every attention of the network, where a fake score puts its adapters."""

    def __post_init__(self) -> None:
        if self.image_size % self.size_step:
            raise UsageError(
                f"teacher '{self.name}' cannot see images of {self.image_size} pixels: its autoencoder and "
                f"network need a multiple of {self.size_step}, such as "
                f"{max(round(self.image_size / self.size_step), 1) * self.size_step}"
            )
        self._middle: Tensor | None = None
        self._addition: Tensor | None = None
        self._stops_at_middle = False
        self.middle_block.register_forward_hook(self._record_middle)
        self.time_embedding.register_forward_hook(self._add_to_time_embedding)
        self.run_plainly()

    def run_plainly(self) -> None:
        """Run the networks as torch does, operation by operation, until `acceleration` says otherwise."""
        self.network_pass = self.eager_pass
        self.middle_pass = self.eager_middle
        self.encode_pass = self.eager_encode
        self.network_changed = lambda: None
        self.accelerated = lambda run, _what: run
        self.uncaptured = nullcontext

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        image_size: int | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
    ) -> LatentDiffusionTeacher:
        """Load a teacher of any known class from a hub id or a directory; safetensors only.

        Args:
            image_size: side in pixels at which it sees images; None: the size it was trained on.
            lora: a `.safetensors` file with a LoRA of this model, which is merged into the weights.
            lora_scale: its strength.

        Raises:
            MissingWeightsError: the id, directory or LoRA cannot be found (exit code 3).
            UsageError: files are damaged, pickled, or of a class this program cannot use; the size cannot be
                divided by the autoencoder; or the LoRA belongs to another model (exit code 2).
        """
        from uni3d.diffusion.teacher_files import load_teacher
        from uni3d.diffusion.teacher_lora import merge_lora

        teacher = load_teacher(
            str(name_or_path), dtype=dtype, revision=revision, variant=variant, image_size=image_size
        )
        if lora is not None:
            merge_lora(teacher, Path(lora), scale=lora_scale)
        return teacher.to(device, dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LatentDiffusionTeacher:
        """Move all networks, freeze them and return self."""
        for network in (self.network, self.vae, *self.text_encoders, self.camera_token):
            if network is not None:
                wanted = torch.float32 if network is self.vae and self._vae_overflows(dtype) else dtype
                # Module.to itself: diffusers' own warns of modules that want float32, even of none.
                nn.Module.to(network, device=device, dtype=wanted).eval().requires_grad_(False)
        nn.Module.to(self.network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if torch.device(device).type == "cuda":
            nn.Module.to(self.vae, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return self

    def _vae_overflows(self, dtype: torch.dtype) -> bool:
        """SDXL's autoencoder leaves the range of float16 and says so in its configuration."""
        return dtype == torch.float16 and bool(getattr(self.vae.config, "force_upcast", False))

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return _first_weight(self.network).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks; predictions are returned in float32."""
        return _first_weight(self.network).dtype

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size_step(self) -> int:
        """The side of an image must be a multiple of this many pixels."""
        return self.downscale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        size = self.image_size // self.downscale
        return int(self.network.config.in_channels), size, size

    @property
    @abstractmethod
    def context_width(self) -> int:
        """Channels E of a context."""

    @property
    def pooled_width(self) -> int:
        """Width P of the pooled text embedding that rides in the last rows of a context; 0: none."""
        return 0

    @property
    @abstractmethod
    def feature_channels(self) -> int:
        """Channels F of the middle of the network, what a discriminator head reads."""

    @property
    @abstractmethod
    def middle_block(self) -> nn.Module:
        """The module whose output `middle_map` turns into features."""

    @property
    @abstractmethod
    def time_embedding(self) -> nn.Module:
        """The module whose output [B, T] is the time embedding; a fake score adds the camera to it."""

    @property
    @abstractmethod
    def time_embedding_width(self) -> int:
        """Width T of the time embedding."""

    # ------------------------------------------------------------------ text and cameras

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Contexts [N, L, E] in the network's precision. Longer prompts are cut to what the tokenizers read,
        with a warning."""

    def with_camera(self, context: Tensor, conditioning: Tensor) -> Tensor:
        """Put the camera token into the last token of `context` [B, L, E]; a teacher without one returns it
        unchanged.

        Args:
            conditioning: `Cameras.conditioning()`, float32 [B, 5].
        """
        if self.camera_token is None:
            return context
        token = self.camera_token(conditioning.to(device=self.device, dtype=self.dtype))
        num_tokens = context.shape[1] - num_pooled_rows(self.pooled_width, context.shape[2])
        return torch.cat([context[:, : num_tokens - 1], token, context[:, num_tokens:]], dim=1)

    # ------------------------------------------------------------------ images

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents float32 [B, C, H, W] (the posterior's mean) of images in [0, 1], [B, 3, h, w];
        differentiable.

        Images of another size than the teacher's are resized bilinearly first.
        """
        size = self.image_size
        if images.shape[-2:] != (size, size):
            images = nn.functional.interpolate(
                images, size=(size, size), mode="bilinear", align_corners=False
            )
        scaled = (images * 2 - 1).to(_first_weight(self.vae).dtype)
        if scaled.device.type == "cuda":
            scaled = scaled.contiguous(memory_format=torch.channels_last)
        mean = self.encode_pass(scaled)
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (mean.float() - shift) * self.vae.config.scaling_factor

    def eager_encode(self, images: Tensor) -> Tensor:
        """The autoencoder's mean [B, C, H, W] of images in [-1, 1], both in its precision."""
        return self.vae.encode(images).latent_dist.mean

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images float32 [B, 3, h, w] in [0, 1] of latents [B, C, H, W]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        unscaled = latents / self.vae.config.scaling_factor + shift
        decoded = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------ denoising

    def predict_x0(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """D(x, sigma, context): the x0-prediction, float32 [B, C, H, W]; arguments as in `denoise`."""
        return self.denoise(x, sigma, context).x0

    def denoise(
        self, x: Tensor, sigma: Tensor, context: Tensor, time_addition: Tensor | None = None
    ) -> Denoised:
        """One pass of the network, differentiable in x.

        Args:
            x: noisy latents x0 + sigma * eps, [B, C, H, W].
            sigma: noise level of each sample, [B]; equal within a group of `views_per_group`.
            context: [B, L, E].
            time_addition: [B, T], added to the time embedding.
        """
        output, middle = self.network_pass(
            self.network_input(x, sigma).to(self.dtype).contiguous(memory_format=torch.channels_last),
            self.network_timestep(sigma),
            context.to(self.dtype),
            None if time_addition is None else time_addition.to(self.dtype),
        )
        x0 = x0_from_prediction(output.float(), x.float(), sigma.float(), self.prediction_type)
        return Denoised(x0, middle.float())

    @abstractmethod
    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x scaled to the process that the network was trained on, float32 [B, C, H, W]."""

    @abstractmethod
    def network_timestep(self, sigma: Tensor) -> Tensor:
        """The timestep that the network is told, float32 [B]."""

    @abstractmethod
    def call_network(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The network's own forward: its output [B, C, H, W] for scaled x, in its precision."""

    @abstractmethod
    def middle_map(self, output: Any) -> Tensor:
        """Features [B, F, h, w] of what `middle_block` returned."""

    def eager_pass(
        self, x: Tensor, timestep: Tensor, context: Tensor, time_addition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The network as torch runs it operation by operation: a `NetworkPass`."""
        self._addition = time_addition
        try:
            output = self.call_network(x, timestep, context)
            assert self._middle is not None
            return output, self._middle
        finally:
            self._addition = self._middle = None

    def eager_middle(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The network up to its middle as torch runs it: (scaled x, timestep, context) -> [B, F, h, w]."""
        self._stops_at_middle = True
        try:
            self.call_network(x, timestep, context)
            raise AssertionError("the middle block was not reached")
        except _MiddleReached:
            assert self._middle is not None
            return self._middle
        finally:
            self._stops_at_middle, self._middle = False, None

    def middle_features(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """The middle of the network alone, float32 [B, F, h, w]: half a pass, differentiable in x."""
        x_scaled = self.network_input(x, sigma).to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.middle_pass(x_scaled, self.network_timestep(sigma), context.to(self.dtype)).float()

    def _record_middle(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._middle = self.middle_map(output)
        if self._stops_at_middle:
            raise _MiddleReached

    def _add_to_time_embedding(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output if self._addition is None else output + self._addition

    # ------------------------------------------------------------------ sampling

    def predict_guided_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        negative_context: Tensor,
        guidance_scale: float,
        *,
        repelled: Sequence[Repelled] = (),
        needs_negative: bool = False,
    ) -> GuidedPrediction:
        """Classifier-free guidance, and with `repelled` contexts Perp-Neg, in one batch.

        guided = negative + guidance_scale * (conditional - negative); a scale of 1 without repelled contexts
        runs one pass only, unless `needs_negative` asks for the other too.
        """
        if guidance_scale == 1.0 and not repelled and not needs_negative:
            x0, middle = self.denoise(x, sigma, context)
            return GuidedPrediction(x0, x0, None, middle)
        contexts = [context, negative_context, *(other.context for other in repelled)]
        num = len(contexts)
        x0, middle = self.denoise(torch.cat([x] * num), torch.cat([sigma] * num), torch.cat(contexts))
        conditional, negative, *others = x0.chunk(num)
        direction = conditional - negative
        pushes = [other - negative for other in others]
        guided = negative + guidance_scale * perp_neg_direction(
            direction, pushes, [other.weight for other in repelled]
        )
        return GuidedPrediction(guided, conditional, negative, middle[: x.shape[0]])

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        negative_context: Tensor,
        *,
        guidance_scale: float,
        num_steps: int,
        start: Tensor | None = None,
        noise_level: float = 1.0,
        generator: Streams | None = None,
        before_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Draw latents [B, C, H, W] for `context` [B, L, E] by deterministic DDIM steps in sigma (Song et
        al. 2021), which for a rectified flow are Euler steps along its path. `before_step` is called before
        each of them and may raise, to leave in between.

        From the latents `start` where they are given, drowned in noise up to the fraction `noise_level` of
        the timesteps and denoised again (SDEdit, Meng et al. 2022).
        """
        shape = (context.shape[0], *self.latent_shape)
        last = noise_level * (self.schedule.num_timesteps - 1)
        timesteps = torch.linspace(last, 0, num_steps + 1)[:-1].to(self.device)
        sigmas = torch.cat([self.schedule.sigma(timesteps), torch.zeros(1, device=self.device)])
        noise = normal(shape, generator).to(self.device)
        x = noise * torch.sqrt(1 + sigmas[0] ** 2) if start is None else start + sigmas[0] * noise
        for current, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            if before_step is not None:
                before_step()
            sigma = current.expand(shape[0])
            x0 = self.predict_guided_x0(x, sigma, context, negative_context, guidance_scale).x0
            x = x0 + (following / current) * (x - x0)
        return x


def perp_neg_direction(direction: Tensor, pushes: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The direction of guidance [B, ...] less `weights` [B] of the parts of `pushes` perpendicular to it, so
    that what is repelled never takes back what is asked for (Armandpour et al. 2023, Perp-Neg)."""
    square = direction.square().flatten(1).sum(1).clamp(min=torch.finfo(direction.dtype).tiny)
    guided = direction
    for push, weight in zip(pushes, weights, strict=True):
        share = (push * direction).flatten(1).sum(1) / square
        perpendicular = push - share[:, None, None, None] * direction
        guided = guided - weight.to(direction)[:, None, None, None] * perpendicular
    return guided


def _first_weight(network: nn.Module) -> Tensor:
    """Tells where a network is and its precision. Diffusers' own properties go through all modules, at every
    step for milliseconds."""
    return next(network.parameters())


def num_pooled_rows(pooled_width: int, context_width: int) -> int:
    """Rows of a context that a pooled embedding of that width takes."""
    return -(-pooled_width // context_width)


def pack_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Put a pooled embedding [B, P] into rows below `tokens` [B, L, E], filled up with zeros."""
    width = tokens.shape[-1]
    num_rows = num_pooled_rows(pooled.shape[-1], width)
    padded = nn.functional.pad(pooled.to(tokens.dtype), (0, num_rows * width - pooled.shape[-1]))
    return torch.cat([tokens, padded.unflatten(-1, (num_rows, width))], dim=1)


def unpack_pooled(context: Tensor, pooled_width: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_pooled`: (tokens [B, L, E], pooled [B, P])."""
    num_rows = num_pooled_rows(pooled_width, context.shape[-1])
    return context[:, :-num_rows], context[:, -num_rows:].flatten(1)[:, :pooled_width]
