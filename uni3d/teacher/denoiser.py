"""The latent denoiser: UNet, text encoder and camera token, their training batch and their loss.

Legend: B batch, C latent channels, h w latent pixels, L tokens of a prompt, E context width, T timesteps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
    DDIMScheduler,  # pyright: ignore[reportPrivateImportUsage]
    UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor, nn

from uni3d.diffusion.camera_token import CameraToken, insert_camera_token
from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig
from uni3d.teacher.tokenizer import special_ids
from uni3d.teacher.view_batches import ViewBatch, ViewSampler
from uni3d.training.processes import Processes
from uni3d.training.seeds import mix_seeds

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

NUM_TIMESTEPS = 1000
_MIN_SNR_GAMMA = 5.0


def build_unet(config: DenoiserConfig, autoencoder: AutoencoderConfig) -> UNet2DConditionModel:
    """An untrained UNet: attention at every resolution but the coarsest, whose text enters in the middle."""
    num_levels = len(config.block_out_channels)
    num_crossed = num_levels - 1
    return UNet2DConditionModel(
        sample_size=autoencoder.image_size // 2 ** (len(autoencoder.block_out_channels) - 1),
        in_channels=autoencoder.latent_channels,
        out_channels=autoencoder.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * num_crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * num_crossed,
        cross_attention_dim=config.context_dim,
        # diffusers' historical misnomer: this argument is the number of heads.
        attention_head_dim=config.attention_heads,  # pyright: ignore[reportArgumentType]
        norm_num_groups=config.norm_num_groups,
    )


def build_text_encoder(config: DenoiserConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIPTextModel for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    start, end, pad = special_ids(tokenizer)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.context_dim,
            intermediate_size=4 * config.context_dim,
            projection_dim=config.context_dim,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.context_length,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of the embedded teacher: Stable Diffusion's, for a v-predicting network."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents float32 [B, C, h, w] with their prompts int64 [B, L] and cameras float32 [B, 5]."""

    latents: Tensor
    token_ids: Tensor
    conditioning: Tensor


class LatentPool:
    """A ring of freshly encoded views from which training batches are drawn.

    Before each step `num_fresh` views are encoded into the ring; the batch is drawn from the whole ring. Both
    depend on the step number alone, so a resumed run refills the same ring and draws the same batches.

    Args:
        encoder: frozen autoencoder with whitened latents, in the format it is to run in.
        sampler: of the views.
        batch_size: B.
        reuse: how often a latent is drawn on average.
        size: of the ring; at least the batch is kept.
        seed: of the draws from the ring.
        processes: each encodes its share of the fresh views; all keep the same ring.
    """

    def __init__(
        self,
        encoder: AutoencoderKL,
        sampler: ViewSampler,
        *,
        batch_size: int,
        reuse: int,
        size: int,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.encoder = encoder
        self.sampler = sampler
        self.batch_size = batch_size
        self.seed = seed
        self.num_fresh = max(1, batch_size // max(1, reuse))
        self.num_slots = max(-(-size // self.num_fresh), -(-batch_size // self.num_fresh))
        self._entries: LatentBatch | None = None
        self._generator = torch.Generator(device=sampler.pool.images.device)

    def fill(self, step: int) -> None:
        """Bring the ring to its state just before `step`."""
        for earlier in range(step - self.num_slots + 1, step):
            self._encode(earlier)

    @torch.no_grad()
    def batch(self, step: int) -> LatentBatch:
        """The batch of `step`; steps must be asked for in order after `fill`."""
        self._encode(step)
        entries = self._entries
        assert entries is not None
        self._generator.manual_seed(mix_seeds(self.seed, step))
        num = entries.latents.shape[0]
        if num == self.batch_size:
            return entries
        device = entries.latents.device
        chosen = torch.randint(num, (self.batch_size,), device=device, generator=self._generator)
        return LatentBatch(entries.latents[chosen], entries.token_ids[chosen], entries.conditioning[chosen])

    @torch.no_grad()
    def _encode(self, step: int) -> None:
        views: ViewBatch = self.sampler.batch(step, self.num_fresh)
        parameter = next(self.encoder.parameters())
        images = views.images[self.processes.share(self.num_fresh)].to(parameter.dtype)
        encoded = self.encoder.encode(images).latent_dist.mode()  # type: ignore[union-attr]
        latents = self.processes.join_rows(encoded.float(), self.num_fresh)
        latents = latents * self.encoder.config["scaling_factor"]
        if self._entries is None:
            num = self.num_slots * self.num_fresh
            self._entries = LatentBatch(
                latents.new_zeros(num, *latents.shape[1:]),
                views.token_ids.new_zeros(num, views.token_ids.shape[1]),
                views.conditioning.new_zeros(num, views.conditioning.shape[1]),
            )
        start = step % self.num_slots * self.num_fresh
        slot = slice(start, start + self.num_fresh)
        self._entries.latents[slot] = latents
        self._entries.token_ids[slot] = views.token_ids
        self._entries.conditioning[slot] = views.conditioning


class DenoiserLoss(nn.Module):
    """The v-prediction loss with dropout of text and camera; owns the noise of every step.

    Args:
        unet: predicts v from (noisy latents, timesteps, context); may be a compiled one.
        text_encoder, camera_token: trained jointly.
        empty_ids: token ids of the empty prompt, int64 [L].
        config: dropout rates and loss weighting.
        seed: of the noise; step j always draws the same noise.
    """

    def __init__(
        self,
        unet: Any,
        text_encoder: CLIPTextModel,
        camera_token: CameraToken,
        *,
        empty_ids: Tensor,
        config: DenoiserConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.camera_token = camera_token
        self.config = config
        self.seed = seed
        self.empty_ids = empty_ids.to(device)
        self.alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
        self._generator = torch.Generator(device=device)

    def forward(self, batch: LatentBatch, *, noise_index: int) -> Tensor:
        """Scalar mean loss of `batch`; `noise_index` names the draw of timesteps, noise and dropout."""
        return self.loss(*self.draw(batch, noise_index=noise_index))

    def draw(self, batch: LatentBatch, *, noise_index: int) -> tuple[Tensor, ...]:
        """All that is random about the loss of `batch`: the arguments of `loss`."""
        generator, config = self._generator, self.config
        generator.manual_seed(mix_seeds(self.seed, noise_index))
        clean, device = batch.latents, batch.latents.device
        num = clean.shape[0]
        # One timestep per equal share of the range: less noise in the loss than independent draws.
        share = torch.rand(num, device=device, generator=generator)
        position = (torch.randperm(num, device=device, generator=generator) + share) / num
        timesteps = (position * NUM_TIMESTEPS).long().clamp_max(NUM_TIMESTEPS - 1)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        dropout = torch.rand(2, num, device=device, generator=generator)
        ids = torch.where((dropout[0] < config.text_dropout)[:, None], self.empty_ids, batch.token_ids)
        return clean, noise, timesteps, ids, batch.conditioning, dropout[1] >= config.camera_dropout

    def loss(
        self,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        conditioning: Tensor,
        knows_camera: Tensor,
    ) -> Tensor:
        """Scalar mean loss of latents float32 [B, C, h, w] under given noise; draws nothing.

        Args:
            noise: float32 [B, C, h, w], standard normal.
            timesteps: int64 [B].
            ids: tokens int64 [B, L], those of the empty prompt where the text is dropped.
            conditioning: cameras float32 [B, 5].
            knows_camera: bool [B]; False drops the camera token.
        """
        alpha_bar = self.alphas_cumprod[timesteps]
        signal = alpha_bar.sqrt()[:, None, None, None]
        sigma = (1 - alpha_bar).sqrt()[:, None, None, None]
        noisy = signal * clean + sigma * noise
        target = signal * noise - sigma * clean  # v, Salimans and Ho 2022, appendix D
        context = self.text_encoder(input_ids=ids).last_hidden_state
        context = insert_camera_token(context, self.camera_token(conditioning), is_kept=knows_camera)
        predicted = self.unet(noisy.to(context.dtype), timesteps, context, return_dict=False)[0]
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        if self.config.loss_weighting == "min_snr":
            snr = alpha_bar / (1 - alpha_bar)
            error = error * snr.clamp_max(_MIN_SNR_GAMMA) / (snr + 1)
        return error.mean()


def learning_rate(
    config: DenoiserConfig, *, progress: float, step: int, steps_since_restart: int | None
) -> float:
    """Warm-up by steps times a cosine of `progress` in [0, 1]; a second warm-up after a compact resume."""
    floor = config.min_learning_rate_fraction
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if steps_since_restart is not None:
        warmup = min(warmup, (steps_since_restart + 1) / max(1, config.resume_warmup_steps))
    return config.learning_rate * cosine * warmup


def average_decay(config: DenoiserConfig, step: int) -> float:
    """Decay of the averaged weights at `step`: short memory at first, `ema_decay` in the end."""
    return min(config.ema_decay, (1 + step) / (10 + step))
