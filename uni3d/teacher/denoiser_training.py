"""Phase 2 of a teacher's training: UNet, text encoder and camera token together."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from typing import Any

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from uni3d.diffusion.camera_token import CameraToken
from uni3d.errors import Interrupted, UsageError
from uni3d.teacher.checkpoint_files import read_state, read_tensors, write_checkpoint
from uni3d.teacher.denoiser import (
    DenoiserLoss,
    LatentBatch,
    LatentPool,
    average_decay,
    build_text_encoder,
    build_unet,
    learning_rate,
)
from uni3d.teacher.progress import LossLog, PhaseClock
from uni3d.teacher.publish import tokenizer_text
from uni3d.teacher.sampling import TeacherModules, sample_grid
from uni3d.teacher.session import (
    STREAM_LATENTS,
    STREAM_NOISE,
    STREAM_POOL,
    Resume,
    Session,
    start_from,
)
from uni3d.teacher.settings import DenoiserConfig, TeacherConfig
from uni3d.teacher.tokenizer import token_ids
from uni3d.teacher.trainable import Trainable, cast_network
from uni3d.teacher.view_batches import ViewSampler
from uni3d.training.captured_gradients import CapturedGradients
from uni3d.training.devices import choose_device
from uni3d.training.processes import Processes
from uni3d.training.seeds import mix_seeds

logger = logging.getLogger(__name__)


def denoiser_phase(
    session: Session, autoencoder: AutoencoderKL, autoencoder_metrics: dict[str, Any], resume: Resume
) -> tuple[bool, int, dict[str, Any]]:
    """Train UNet, text encoder and camera token; (finished?, steps, metrics)."""
    config, device = session.config, session.device
    is_compiled = config.denoiser.compile and device.type == "cuda"
    torch.manual_seed(mix_seeds(config.seed, 7))
    networks = {
        "unet": build_unet(config.denoiser, config.autoencoder),
        "text_encoder": build_text_encoder(config.denoiser, session.tokenizer),
        "camera_token": CameraToken(config.denoiser.context_dim),
    }
    trainable = Trainable(
        networks,
        device=device,
        compute_dtype=session.compute_dtype,
        weight_decay=config.denoiser.weight_decay,
        channels_last=is_compiled,
        averaged=True,
    )
    checkpoint, compact = session.output / "checkpoints" / "denoiser", session.output / "compact"
    step, elapsed_s, restarted_at = 0, 0.0, None
    full_state = read_state(checkpoint) if resume in ("auto", "full") else None
    compact_state = read_state(compact) if resume in ("auto", "compact") else None
    if full_state is not None:
        trainable.load_full_state(read_tensors(checkpoint))
        step, elapsed_s = int(full_state["step"]), float(full_state["elapsed_s"])
        restarted_at = full_state.get("restarted_at")
    elif compact_state is not None:
        trainable.load_weights(read_tensors(compact))
        step, elapsed_s = int(compact_state["step"]), float(compact_state["elapsed_s"])
        restarted_at = step
    elif session.initial_teacher is not None:
        start_from(session, trainable)
    logger.info("denoiser: %.2f M parameters, from step %d", trainable.num_parameters / 1e6, step)
    clock = PhaseClock(
        planned_minutes=config.denoiser.planned_minutes,
        planned_steps=config.denoiser.planned_steps,
        elapsed_s=elapsed_s,
        deadline_s=session.deadline_s,
    )
    metrics: dict[str, Any] = {"autoencoder": autoencoder_metrics}
    frozen = copy.deepcopy(autoencoder)
    cast_network(frozen, device=device, dtype=session.compute_dtype)

    def save(step: int, *, last_loss: float | None) -> None:
        if not session.processes.is_main:
            return
        base = {
            "step": step,
            "elapsed_s": round(clock.elapsed_s, 3),
            "restarted_at": restarted_at,
            "config": dataclasses.asdict(config),
        }
        write_checkpoint(checkpoint, trainable.full_state(), base, max_file_mib=config.max_file_mib)
        metrics["denoiser"] = {
            "steps": step,
            "images_seen": step * config.denoiser.batch_size,
            "training_minutes": round(clock.elapsed_s / 60, 2),
            "loss": last_loss,
            "num_devices": session.processes.num,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        if session.initial_teacher is not None:
            metrics["initial_teacher"] = {
                "name": session.initial_teacher.name,
                "training": session.initial_teacher.training,
            }
        weights = {f"vae.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
        weights.update(trainable.weights(averaged=True))
        extra = {
            "autoencoder_metrics": autoencoder_metrics,
            "metrics": metrics,
            "vocabulary": session.vocabulary,
            "tokenizer": tokenizer_text(session.tokenizer),
        }
        write_checkpoint(
            compact, weights, {**base, **extra}, dtype=torch.float16, max_file_mib=config.max_file_mib
        )

    def grid(step: int) -> None:
        if not session.processes.is_main:
            return
        for network in networks.values():
            network.eval()
        modules = TeacherModules(
            autoencoder=frozen,
            unet=networks["unet"],  # type: ignore[arg-type]
            text_encoder=networks["text_encoder"],  # type: ignore[arg-type]
            camera_token=networks["camera_token"],  # type: ignore[arg-type]
            tokenizer=session.tokenizer,
        )
        with trainable.averaged_weights():
            path = sample_grid(
                modules,
                config.grid_prompts,
                session.output / "grids" / f"step_{step:07d}.png",
                guidance_scale=config.guidance_scale,
                num_steps=config.num_sampling_steps,
                seed=config.seed,
            )
        for network in networks.values():
            network.train()
        logger.info("sample grid %s", path)

    is_finished, step = _train_denoiser(
        session, trainable, frozen, clock, first_step=step, restarted_at=restarted_at, save=save, grid=grid
    )
    return is_finished, step, metrics


def _train_denoiser(
    session: Session,
    trainable: Trainable,
    encoder: AutoencoderKL,
    clock: PhaseClock,
    *,
    first_step: int,
    restarted_at: int | None,
    save: Any,
    grid: Any,
) -> tuple[bool, int]:
    """Train until the phase is over or the session's time is up; (finished?, steps done)."""
    config, device, seed = session.config.denoiser, session.device, session.config.seed
    sampler = ViewSampler(session.pool, session.config.data, seed=mix_seeds(seed, STREAM_LATENTS))
    processes = session.processes
    parts = max(1, config.accumulate_steps) * processes.num
    if config.batch_size % parts:
        raise UsageError(
            f"denoiser.batch_size is {config.batch_size}; expected a multiple of {parts} (accumulate_steps "
            f"{config.accumulate_steps} in each of {processes.num} processes)"
        )
    latents = LatentPool(
        encoder,
        sampler,
        batch_size=config.batch_size,
        reuse=config.latent_reuse,
        size=config.latent_pool if config.latent_reuse > 1 else config.batch_size,
        seed=mix_seeds(seed, STREAM_POOL),
        processes=processes,
    )
    latents.fill(first_step)
    empty_ids = torch.from_numpy(token_ids(session.tokenizer, [""]))[0].long()
    gradients = DenoiserGradients(
        trainable,
        empty_ids=empty_ids,
        config=config,
        parts=parts,
        seed=mix_seeds(seed, STREAM_NOISE),
        device=device,
        processes=processes,
    )
    log = LossLog(
        "denoiser",
        batch_size=config.batch_size,
        every_s=session.config.log_every_s,
        metrics_path=session.output / "metrics.jsonl" if processes.is_main else None,
    )
    begun_s = saved_s = drawn_s = time.monotonic()
    step, rate = first_step, 0.0
    while (progress := processes.as_main_says(clock.progress(step))[0]) < 1:
        batch = latents.batch(step)
        loss = gradients.collect(batch, step=step)
        rate = learning_rate(
            config,
            progress=progress,
            step=step,
            steps_since_restart=None if restarted_at is None else step - restarted_at,
        )
        trainable.step(learning_rate=rate, gradient_clip=config.gradient_clip)
        trainable.update_average(average_decay(config, step))
        log.add(loss)
        step += 1
        if step == first_step + 1:
            log.pause()
            clock.restart()
            logger.info("first step done after %.0f s%s", time.monotonic() - begun_s, _memory_text(device))
        elif log.is_due:
            log.report(
                step=step, elapsed_s=clock.elapsed_s, progress=clock.progress(step), learning_rate=rate
            )
        now_s = time.monotonic()
        is_leaving = session.stop.is_set or clock.is_out_of_time
        if processes.as_main_says(is_leaving)[0]:
            save(step, last_loss=log.last_loss)
            session.stop_if_asked("denoiser", step)
            grid(step)
            return False, step
        # The others go on to their next step and wait there while the first one saves and draws.
        if not processes.is_main:
            continue
        if now_s - saved_s > session.config.checkpoint_every_minutes * 60:
            save(step, last_loss=log.last_loss)
            saved_s = time.monotonic()
            log.pause()
        if 0 < session.config.grid_every_minutes * 60 < now_s - drawn_s:
            grid(step)
            drawn_s = time.monotonic()
            log.pause()
    log.report(step=step, elapsed_s=clock.elapsed_s, progress=1.0, learning_rate=rate)
    save(step, last_loss=log.last_loss)
    grid(step)
    return True, step


class DenoiserGradients:
    """Gradients of the denoiser's loss, a part of the batch at a time.

    On a GPU the UNet is compiled where that is asked for, and a whole part is replayed as one CUDA graph;
    what fails of that (no compiler, an unsupported operation) is left out with a warning.

    Args:
        trainable: the networks "unet", "text_encoder" and "camera_token".
        empty_ids: token ids of the empty prompt, int64 [L].
        parts: equal parts that a batch is split into, over all processes.
        seed: of the noise; a step always draws the same.
        processes: take turns with the parts, and each has the sum of all gradients in the end.
    """

    def __init__(
        self,
        trainable: Trainable,
        *,
        empty_ids: Tensor,
        config: DenoiserConfig,
        parts: int,
        seed: int,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        self.trainable = trainable
        self.parts = parts
        self.processes = processes or Processes()
        self._plain_unet: Any = trainable.networks["unet"]
        is_fast = config.compile and device.type == "cuda"
        self.loss_of = DenoiserLoss(
            torch.compile(self._plain_unet, dynamic=False) if is_fast else self._plain_unet,
            trainable.networks["text_encoder"],  # type: ignore[arg-type]
            trainable.networks["camera_token"],  # type: ignore[arg-type]
            empty_ids=empty_ids,
            config=config,
            seed=seed,
            device=device,
        )
        self._gradients = CapturedGradients(
            lambda *drawn: self.loss_of.loss(*drawn) / parts, trainable.parameters, is_enabled=is_fast
        )

    def collect(self, batch: LatentBatch, *, step: int) -> Tensor:
        """Leave the gradients of the mean loss over `batch` with the masters; returns that loss, detached.

        With several processes it is the mean of the parts that this one took.
        """
        size = batch.latents.shape[0] // self.parts
        total: Tensor | None = None
        for part in range(self.processes.rank, self.parts, self.processes.num):
            chosen = slice(part * size, (part + 1) * size)
            piece = LatentBatch(batch.latents[chosen], batch.token_ids[chosen], batch.conditioning[chosen])
            loss = self._of(self.loss_of.draw(piece, noise_index=step * self.parts + part))
            self.trainable.collect_gradients()
            total = loss if total is None else total + loss
        assert total is not None
        self.processes.add_up_([m.grad for m in self.trainable.masters if m.grad is not None])
        return total * self.processes.num

    def _of(self, drawn: tuple[Tensor, ...]) -> Tensor:
        try:
            return self._gradients(*drawn)
        except Exception as error:
            if self.loss_of.unet is self._plain_unet or isinstance(
                error, torch.OutOfMemoryError | Interrupted
            ):
                raise
            logger.warning("torch.compile failed (%s); going on without it", str(error).splitlines()[0])
            self.loss_of.unet = self._plain_unet
            return self._gradients(*drawn)


def compile_ahead(config: TeacherConfig, *, vocabulary_size: int = 2000, num_processes: int = 1) -> float:
    """Run two denoiser steps on noise so that torch's compile cache holds the UNet; returns the seconds.

    Compiling is work for the CPU: run this in a second process while the autoencoder trains, and the denoiser
    starts within seconds. `num_processes` is how many will train: each gets that part of the batch.
    """
    started_s = time.monotonic()
    device = choose_device(config.device)
    torch.set_float32_matmul_precision("high")
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = config.denoiser
    text = CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=settings.context_dim,
        intermediate_size=4 * settings.context_dim,
        num_hidden_layers=1,
        num_attention_heads=settings.text_heads,
        max_position_embeddings=settings.context_length,
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
        pad_token_id=vocabulary_size - 1,
    )
    unet = build_unet(settings, config.autoencoder)
    trainable = Trainable(
        {
            "unet": unet,
            "text_encoder": CLIPTextModel(text),
            "camera_token": CameraToken(settings.context_dim),
        },
        device=device,
        compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        weight_decay=0.0,
        channels_last=settings.compile and device.type == "cuda",
    )
    ids = torch.full((settings.context_length,), vocabulary_size - 1)
    parts = max(1, settings.accumulate_steps)
    gradients = DenoiserGradients(
        trainable, empty_ids=ids, config=settings, parts=parts, seed=0, device=device
    )
    side = int(unet.config["sample_size"])
    num = settings.batch_size // num_processes
    batch = LatentBatch(
        latents=torch.randn(num, config.autoencoder.latent_channels, side, side, device=device),
        token_ids=ids.to(device).expand(num, -1),
        conditioning=torch.zeros(num, 5, device=device),
    )
    for step in range(2):
        gradients.collect(batch, step=step)
        trainable.step(learning_rate=0.0, gradient_clip=1.0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started_s


def _memory_text(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
