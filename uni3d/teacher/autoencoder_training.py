"""Phase 1 of a teacher's training: the autoencoder, its whitening and its measurement."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from uni3d.teacher.autoencoder import (
    autoencoder_loss,
    build_autoencoder,
    reconstruction_metrics,
    whiten_latents,
)
from uni3d.teacher.checkpoint_files import read_state, read_tensors, write_checkpoint
from uni3d.teacher.progress import LossLog, PhaseClock
from uni3d.teacher.session import (
    STREAM_AUTOENCODER,
    STREAM_MEASURED,
    STREAM_STATISTICS,
    Resume,
    Session,
    load_network,
    start_from,
)
from uni3d.teacher.trainable import Trainable, cast_network
from uni3d.teacher.view_batches import ViewSampler
from uni3d.training.captured_gradients import CapturedGradients
from uni3d.training.seeds import mix_seeds

logger = logging.getLogger(__name__)

_NUM_STATISTICS_VIEWS = 2048
_NUM_MEASURED_VIEWS = 256
_AVERAGE_DECAY = 0.998


def autoencoder_phase(session: Session, resume: Resume) -> tuple[AutoencoderKL | None, dict[str, Any]]:
    """The finished, whitened autoencoder (float32, on the device) and its metrics; None when time ran out.

    Several processes share every batch; the first one finishes it and leaves it for the others to read.
    """
    config, device = session.config, session.device
    torch.manual_seed(mix_seeds(config.seed, STREAM_AUTOENCODER))
    autoencoder = build_autoencoder(config.autoencoder)
    for name in ("autoencoder", "compact"):
        state = read_state(session.output / name)
        if resume != "no" and state is not None:
            weights = read_tensors(session.output / name)
            load_network(autoencoder, weights, "vae.")
            cast_network(autoencoder, device=device, dtype=torch.float32)
            autoencoder.eval().requires_grad_(False)
            return autoencoder, dict(state["autoencoder_metrics"])
    checkpoint = session.output / "checkpoints" / "autoencoder"
    trainable = Trainable(
        {"vae": autoencoder},
        device=device,
        compute_dtype=session.compute_dtype,
        weight_decay=config.autoencoder.weight_decay,
        channels_last=config.autoencoder.compile and device.type == "cuda",
        averaged=True,
    )
    step, elapsed_s = 0, 0.0
    state = read_state(checkpoint) if resume in ("auto", "full") else None
    if state is not None:
        trainable.load_full_state(read_tensors(checkpoint))
        step, elapsed_s = int(state["step"]), float(state["elapsed_s"])
    elif session.initial_teacher is not None:
        start_from(session, trainable)
    logger.info("autoencoder: %.2f M parameters", trainable.num_parameters / 1e6)
    clock = PhaseClock(
        planned_minutes=config.autoencoder.planned_minutes,
        planned_steps=config.autoencoder.planned_steps,
        elapsed_s=elapsed_s,
        deadline_s=session.deadline_s,
    )
    session.processes.wait()  # all have read the checkpoint before the first one writes the next

    def save(step: int) -> None:
        if not session.processes.is_main:
            return
        write_checkpoint(
            checkpoint,
            trainable.full_state(),
            {"step": step, "elapsed_s": clock.elapsed_s, "config": dataclasses.asdict(config)},
            max_file_mib=config.max_file_mib,
        )

    is_finished = _train_autoencoder(session, trainable, clock, first_step=step, save=save)
    if not is_finished:
        return None, {}
    if not session.processes.is_main:
        session.processes.wait()
        return autoencoder_phase(session, "auto")
    training_minutes = round(clock.elapsed_s / 60, 2)
    finished = build_autoencoder(config.autoencoder)
    cast_network(finished, device=device, dtype=torch.float32)
    load_network(finished, trainable.weights(averaged=True), "vae.")
    metrics = _finish_autoencoder(session, finished)
    metrics["training_minutes"] = training_minutes
    write_checkpoint(
        session.output / "autoencoder",
        {f"vae.{name}": tensor for name, tensor in finished.state_dict().items()},
        {"autoencoder_metrics": metrics, "config": dataclasses.asdict(config)},
        max_file_mib=config.max_file_mib,
    )
    session.processes.wait()
    return finished, metrics


def _train_autoencoder(
    session: Session, trainable: Trainable, clock: PhaseClock, *, first_step: int, save: Callable[[int], None]
) -> bool:
    """Train until the phase is over (True) or the session's time is up (False)."""
    config, processes = session.config.autoencoder, session.processes
    sampler = ViewSampler(
        session.pool,
        session.config.data,
        seed=mix_seeds(session.config.seed, STREAM_AUTOENCODER),
        is_allowed=~session.pool.is_heldout,
    )
    network: Any = trainable.networks["vae"]
    network.train()
    is_cuda = session.device.type == "cuda"
    encode, decode = network.encode, network.decode
    if config.compile and is_cuda:
        encode, decode = torch.compile(encode), torch.compile(decode)

    def loss_of(images: Tensor, alpha: Tensor, noise: Tensor, share_of_batch: Tensor) -> Tensor:
        posterior = encode(images.to(session.compute_dtype)).latent_dist
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        kl = _kl(posterior.mean, posterior.logvar)
        return share_of_batch * autoencoder_loss(decode(latents).sample, images, alpha, kl, config)

    gradients = CapturedGradients(loss_of, trainable.parameters, is_enabled=is_cuda)
    generator = torch.Generator(device=session.device)
    log = LossLog(
        "autoencoder",
        batch_size=config.batch_size,
        every_s=session.config.log_every_s,
        metrics_path=session.output / "metrics.jsonl" if processes.is_main else None,
    )
    saved_s = time.monotonic()
    step, rate = first_step, 0.0
    while (progress := processes.as_main_says(clock.progress(step))[0]) < 1:
        generator.manual_seed(mix_seeds(sampler.seed, -1 - step))
        whole = sampler.batch(step, config.batch_size)
        if progress < config.crop_share:
            whole = whole.crops(config.crop_side, generator)
        num = whole.images.shape[0]
        share = processes.share(num)
        batch = whole.part(share)
        side = whole.images.shape[-1] // 2 ** (len(config.block_out_channels) - 1)
        shape = (num, config.latent_channels, side, side)
        noise = torch.randn(shape, device=session.device, generator=generator)[share]
        portion = torch.full((), batch.images.shape[0] / num, device=session.device)
        loss = gradients(batch.images, batch.alpha, noise, portion)
        trainable.collect_gradients()
        processes.add_up_([master.grad for master in trainable.masters if master.grad is not None])
        rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
        rate *= max(0.02, 1 - progress)
        trainable.step(learning_rate=rate, gradient_clip=config.gradient_clip)
        trainable.update_average(min(_AVERAGE_DECAY, (1 + step) / (10 + step)))
        log.add(loss / portion)
        step += 1
        if log.is_due:
            log.report(
                step=step, elapsed_s=clock.elapsed_s, progress=clock.progress(step), learning_rate=rate
            )
        is_leaving = bool(processes.as_main_says(session.stop.is_set or clock.is_out_of_time)[0])
        if is_leaving or time.monotonic() - saved_s > session.config.checkpoint_every_minutes * 60:
            save(step)
            saved_s = time.monotonic()
            session.stop_if_asked("autoencoder", step)
            if is_leaving:
                return False
            log.pause()
    log.report(step=step, elapsed_s=clock.elapsed_s, progress=1.0, learning_rate=rate)
    return True


def _kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence to a unit Gaussian summed over each latent, float32 [B]."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


@torch.no_grad()
def _finish_autoencoder(session: Session, autoencoder: AutoencoderKL) -> dict[str, Any]:
    """Whiten the latents in place, freeze, and measure the reconstruction of held-out assets."""
    autoencoder.eval().requires_grad_(False)
    part = 64
    sampler = ViewSampler(
        session.pool, session.config.data, seed=mix_seeds(session.config.seed, STREAM_STATISTICS)
    )
    num_parts = -(-min(_NUM_STATISTICS_VIEWS, 8 * len(session.pool)) // part)
    latents = torch.cat(
        [autoencoder.encode(sampler.batch(i, part).images).latent_dist.mode() for i in range(num_parts)]  # type: ignore[union-attr]
    )
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    whiten_latents(autoencoder, mean, std)
    has_heldout = bool(session.pool.is_heldout.any())
    allowed = session.pool.is_heldout if has_heldout else None
    measured = ViewSampler(
        session.pool,
        session.config.data,
        seed=mix_seeds(session.config.seed, STREAM_MEASURED),
        is_allowed=allowed,
    )
    num_measured = max(1, min(_NUM_MEASURED_VIEWS, 4 * len(session.pool)) // part)
    totals: Counter[str] = Counter()
    for index in range(num_measured):
        batch = measured.batch(index, part)
        decoded = autoencoder.decode(autoencoder.encode(batch.images).latent_dist.mode()).sample  # type: ignore[union-attr]
        for name, value in reconstruction_metrics(decoded, batch.images, batch.alpha).items():
            totals[name] += value / num_measured  # type: ignore[assignment]
    metrics: dict[str, Any] = {name: round(float(value), 3) for name, value in totals.items()}
    metrics["measured_on"] = "assets left out of its training" if has_heldout else "training views"
    metrics["latent_std_before"] = [round(float(value), 4) for value in std]
    logger.info("autoencoder: %s", metrics)
    return metrics
