"""The program behind `uni3d teacher train`: views -> autoencoder -> denoiser -> a published teacher.

    views --> caption tables, tokenizer --> ViewPool on the device
          --> autoencoder (then frozen, latents whitened) --> UNet + text encoder + camera token --> teacher/

Folders under the output: `checkpoints/autoencoder` and `checkpoints/denoiser` (exact continuation, float32),
`autoencoder/` (the finished one), `compact/` (half-precision weights that another machine can go on from or
publish; few small files), `grids/`, `metrics.jsonl` and `teacher/`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from uni3d.data.captions import known_words, vocabulary_from_records
from uni3d.data.view_shards import load_views
from uni3d.diffusion.camera_token import CameraToken
from uni3d.errors import Interrupted, UsageError
from uni3d.teacher.autoencoder import (
    autoencoder_loss,
    build_autoencoder,
    reconstruction_metrics,
    whiten_latents,
)
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
from uni3d.teacher.publish import publish_teacher, read_tokenizer, tokenizer_text
from uni3d.teacher.sampling import TeacherModules, sample_grid
from uni3d.teacher.settings import DenoiserConfig, TeacherConfig
from uni3d.teacher.tokenizer import token_ids
from uni3d.teacher.trainable import Trainable, cast_network
from uni3d.teacher.view_batches import (
    VIEW_WORDS,
    CaptionTexts,
    ViewPool,
    ViewSampler,
    build_view_pool,
    collect_captions,
    mix_seeds,
    tokenizer_for,
)
from uni3d.training.stop import StopFlag

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from uni3d.data.view_shards import Views

logger = logging.getLogger(__name__)

Resume = Literal["no", "auto", "full", "compact"]
# Each stream of random numbers gets its own number, so that none repeats another.
_STREAM_AUTOENCODER, _STREAM_LATENTS, _STREAM_POOL, _STREAM_NOISE, _STREAM_STATISTICS = range(1, 6)
_NUM_STATISTICS_VIEWS = 2048
_NUM_MEASURED_VIEWS = 256
_AUTOENCODER_AVERAGE_DECAY = 0.998


@dataclass(frozen=True)
class TrainingResult:
    """Where a session of training ended."""

    is_finished: bool
    """False when the session's time was up first: train again with resume."""
    step: int
    """Denoiser steps done."""
    teacher_folder: Path | None
    """The published teacher, when it was written."""
    metrics: dict[str, Any]


@dataclass
class _Session:
    """What the phases of one call share."""

    config: TeacherConfig
    output: Path
    device: torch.device
    deadline_s: float | None
    stop: StopFlag
    pool: ViewPool
    tokenizer: CLIPTokenizer
    vocabulary: dict[str, Any]

    @property
    def compute_dtype(self) -> torch.dtype:
        # bf16 on a CPU is emulated and hundreds of times slower.
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def stop_if_asked(self, phase: str, step: int) -> None:
        """Call after saving: raises Interrupted when a signal arrived."""
        if self.stop.is_set:
            raise self.stop.interruption(
                f"stopped in the {phase} at step {step}, saved in {self.output}; run the same line with --resume"
            )


def train_teacher(
    config: TeacherConfig,
    views_dir: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    *,
    resume: Resume = "no",
    max_minutes: float | None = None,
    views: Views | None = None,
    publish: bool = True,
) -> TrainingResult:
    """Train the embedded teacher on rendered views, for at most `max_minutes` of this call.

    Args:
        config: all settings.
        views_dir: folder of view shards written by `uni3d teacher render`.
        output_dir: made when missing; without `resume` it must hold no earlier training.
        resume: "full" continues exactly; "compact" continues from `compact/` with fresh optimiser moments;
            "auto" takes what there is, full first, and begins when there is nothing.
        max_minutes: save and return when this call has taken so long, loading included.
        views: already loaded views, instead of `views_dir`.
        publish: write `teacher/` at the end, also when time ran out.

    Raises:
        UsageError: bad folders or a checkpoint that does not fit.
        Interrupted: a signal arrived; everything was saved before.
        TrainingDiverged: the loss became infinite or NaN.
    """
    started_s = time.monotonic()
    output = Path(output_dir)
    _prepare_output(output, resume)
    device = _device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.seed)
    if views is None:
        if views_dir is None:
            raise UsageError("no views were given; pass the folder that `uni3d teacher render` wrote")
        views = load_views(
            views_dir,
            num_workers=config.data.num_workers,
            limit=config.data.limit_views,
            roles=config.data.roles,
        )
    logger.info("%d views loaded in %.0f s", len(views.records), time.monotonic() - started_s)
    texts = collect_captions(views.records, config.data, seed=config.seed)
    tokenizer = _tokenizer(output, texts, config, resume)
    pool = build_view_pool(views, texts, tokenizer, config.data, device=device)
    logger.info(
        "%d assets, %d nouns, caption tables and views on %s after %.0f s",
        len(texts.plain), len({r.noun for r in views.records}), device, time.monotonic() - started_s,
    )  # fmt: skip
    with StopFlag() as stop:
        session = _Session(
            config=config,
            output=output,
            device=device,
            deadline_s=None if max_minutes is None else started_s + max_minutes * 60,
            stop=stop,
            pool=pool,
            tokenizer=tokenizer,
            vocabulary=_vocabulary(views, texts),
        )
        del views
        autoencoder, autoencoder_metrics = _autoencoder_phase(session, resume)
        if autoencoder is None:
            return TrainingResult(False, 0, None, autoencoder_metrics)
        is_finished, step, metrics = _denoiser_phase(session, autoencoder, autoencoder_metrics, resume)
    folder = publish_teacher(output / "compact", output / "teacher") if publish else None
    return TrainingResult(is_finished, step, folder, metrics)


# ---------------------------------------------------------------------- preparation


def _prepare_output(output: Path, resume: Resume) -> None:
    has_state = any(read_state(output / name) for name in ("checkpoints/autoencoder", "autoencoder", "compact"))
    if resume == "no" and has_state:
        raise UsageError(f"{output} already holds a training run; pass --resume to go on or another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made ({error.strerror}); choose another folder") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch sees no CUDA device; use --device cpu")
    return device


def _tokenizer(output: Path, texts: CaptionTexts, config: TeacherConfig, resume: Resume) -> CLIPTokenizer:
    """The tokenizer of the run being resumed, or one trained on `texts`."""
    folder = output / "tokenizer"
    if resume != "no" and folder.is_dir():
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    state = read_state(output / "compact") if resume != "no" else None
    if state is not None:
        tokenizer = read_tokenizer(state)
    else:
        tokenizer = tokenizer_for(
            texts, extra_words=sorted(known_words()), context_length=config.denoiser.context_length
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _vocabulary(views: Views, texts: CaptionTexts) -> dict[str, Any]:
    """What the teacher has seen, for warnings about prompts: see `vocabulary_from_records`, and every word."""
    return {**vocabulary_from_records(views.records), "views": list(VIEW_WORDS), "words": texts.all_words()}


# ---------------------------------------------------------------------- phase 1: autoencoder


def _autoencoder_phase(session: _Session, resume: Resume) -> tuple[AutoencoderKL | None, dict[str, Any]]:
    """The finished, whitened autoencoder (float32, on the device) and its metrics; None when time ran out."""
    config, device = session.config, session.device
    autoencoder = build_autoencoder(config.autoencoder)
    for name in ("autoencoder", "compact"):
        state = read_state(session.output / name)
        if resume != "no" and state is not None:
            weights = read_tensors(session.output / name)
            _load_network(autoencoder, weights, "vae.")
            return autoencoder.to(device), dict(state["autoencoder_metrics"])
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
    logger.info("autoencoder: %.2f M parameters", trainable.num_parameters / 1e6)
    clock = PhaseClock(
        planned_minutes=config.autoencoder.planned_minutes,
        planned_steps=config.autoencoder.planned_steps,
        elapsed_s=elapsed_s,
        deadline_s=session.deadline_s,
    )

    def save(step: int) -> None:
        write_checkpoint(
            checkpoint,
            trainable.full_state(),
            {"step": step, "elapsed_s": clock.elapsed_s, "config": dataclasses.asdict(config)},
            max_file_mib=config.max_file_mib,
        )

    is_finished = _train_autoencoder(session, trainable, clock, first_step=step, save=save)
    if not is_finished:
        return None, {}
    training_minutes = round(clock.elapsed_s / 60, 2)
    finished = build_autoencoder(config.autoencoder).to(device)
    _load_network(finished, trainable.weights(averaged=True), "vae.")
    metrics = _finish_autoencoder(session, finished)
    metrics["training_minutes"] = training_minutes
    write_checkpoint(
        session.output / "autoencoder",
        {f"vae.{name}": tensor for name, tensor in finished.state_dict().items()},
        {"autoencoder_metrics": metrics, "config": dataclasses.asdict(config)},
        max_file_mib=config.max_file_mib,
    )
    return finished, metrics


def _train_autoencoder(
    session: _Session, trainable: Trainable, clock: PhaseClock, *, first_step: int, save: Any
) -> bool:
    """Train until the phase is over (True) or the session's time is up (False)."""
    config = session.config.autoencoder
    sampler = ViewSampler(
        session.pool,
        session.config.data,
        seed=mix_seeds(session.config.seed, _STREAM_AUTOENCODER),
        is_allowed=~session.pool.is_heldout,
    )
    network: Any = trainable.networks["vae"]
    network.train()
    encode, decode = network.encode, network.decode
    if config.compile and session.device.type == "cuda":
        encode, decode = torch.compile(encode), torch.compile(decode)
    generator = torch.Generator(device=session.device)
    log = LossLog(
        "autoencoder",
        batch_size=config.batch_size,
        every_s=session.config.log_every_s,
        metrics_path=session.output / "metrics.jsonl",
    )
    saved_s = time.monotonic()
    step, rate = first_step, 0.0
    while (progress := clock.progress(step)) < 1:
        batch = sampler.batch(step, config.batch_size)
        generator.manual_seed(mix_seeds(sampler.seed, -1 - step))
        posterior = encode(batch.images.to(session.compute_dtype)).latent_dist
        noise = torch.randn(posterior.mean.shape, device=session.device, generator=generator)
        reconstruction = decode(posterior.mean + posterior.std * noise.to(posterior.mean.dtype)).sample
        loss = autoencoder_loss(reconstruction, batch, _kl(posterior.mean, posterior.logvar), config)
        loss.backward()
        trainable.collect_gradients()
        rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
        rate *= max(0.02, 1 - progress)
        trainable.step(learning_rate=rate, gradient_clip=config.gradient_clip)
        trainable.update_average(min(_AUTOENCODER_AVERAGE_DECAY, (1 + step) / (10 + step)))
        log.add(loss)
        step += 1
        if log.is_due:
            log.report(
                step=step, elapsed_s=clock.elapsed_s, progress=clock.progress(step), learning_rate=rate
            )
        is_leaving = session.stop.is_set or clock.is_out_of_time
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
def _finish_autoencoder(session: _Session, autoencoder: AutoencoderKL) -> dict[str, Any]:
    """Whiten the latents in place, freeze, and measure the reconstruction of held-out assets."""
    autoencoder.eval().requires_grad_(False)
    part = 64
    sampler = ViewSampler(
        session.pool, session.config.data, seed=mix_seeds(session.config.seed, _STREAM_STATISTICS)
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
        session.pool, session.config.data, seed=mix_seeds(session.config.seed, -1), is_allowed=allowed
    )
    num_measured = max(1, min(_NUM_MEASURED_VIEWS, 4 * len(session.pool)) // part)
    totals: Counter[str] = Counter()
    for index in range(num_measured):
        images = measured.batch(index, part).images
        decoded = autoencoder.decode(autoencoder.encode(images).latent_dist.mode()).sample  # type: ignore[union-attr]
        for name, value in reconstruction_metrics(decoded, images).items():
            totals[name] += value / num_measured  # type: ignore[assignment]
    metrics: dict[str, Any] = {name: round(float(value), 3) for name, value in totals.items()}
    metrics["measured_on"] = "assets left out of its training" if has_heldout else "training views"
    metrics["latent_std_before"] = [round(float(value), 4) for value in std]
    logger.info("autoencoder: %s", metrics)
    return metrics


# ---------------------------------------------------------------------- phase 2: denoiser


def _denoiser_phase(
    session: _Session, autoencoder: AutoencoderKL, autoencoder_metrics: dict[str, Any], resume: Resume
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
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
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
    session: _Session,
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
    sampler = ViewSampler(session.pool, session.config.data, seed=mix_seeds(seed, _STREAM_LATENTS))
    parts = max(1, config.accumulate_steps)
    latents = LatentPool(
        encoder,
        sampler,
        batch_size=config.batch_size,
        reuse=config.latent_reuse,
        size=config.latent_pool if config.latent_reuse > 1 else config.batch_size,
        seed=mix_seeds(seed, _STREAM_POOL),
    )
    latents.fill(first_step)
    empty_ids = torch.from_numpy(token_ids(session.tokenizer, [""]))[0].long()
    loss_of = denoiser_loss_module(
        trainable, empty_ids=empty_ids, config=config, seed=mix_seeds(seed, _STREAM_NOISE), device=device
    )
    log = LossLog(
        "denoiser",
        batch_size=config.batch_size,
        every_s=session.config.log_every_s,
        metrics_path=session.output / "metrics.jsonl",
    )
    begun_s = saved_s = drawn_s = time.monotonic()
    step, rate = first_step, 0.0
    while (progress := clock.progress(step)) < 1:
        batch = latents.batch(step)
        loss = accumulate_gradients(trainable, loss_of, batch, step=step, parts=parts)
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
        if is_leaving or now_s - saved_s > session.config.checkpoint_every_minutes * 60:
            save(step, last_loss=log.last_loss)
            saved_s = time.monotonic()
            session.stop_if_asked("denoiser", step)
            if is_leaving:
                grid(step)
                return False, step
            log.pause()
        if 0 < session.config.grid_every_minutes * 60 < now_s - drawn_s:
            grid(step)
            drawn_s = time.monotonic()
            log.pause()
    log.report(step=step, elapsed_s=clock.elapsed_s, progress=1.0, learning_rate=rate)
    save(step, last_loss=log.last_loss)
    grid(step)
    return True, step


def denoiser_loss_module(
    trainable: Trainable, *, empty_ids: Tensor, config: DenoiserConfig, seed: int, device: torch.device
) -> DenoiserLoss:
    """The loss over the networks of `trainable`, with the UNet compiled where that is asked for."""
    unet: Any = trainable.networks["unet"]
    is_compiled = config.compile and device.type == "cuda"
    return DenoiserLoss(
        torch.compile(unet, dynamic=False) if is_compiled else unet,
        trainable.networks["text_encoder"],  # type: ignore[arg-type]
        trainable.networks["camera_token"],  # type: ignore[arg-type]
        empty_ids=empty_ids,
        config=config,
        seed=seed,
        device=device,
    )


def accumulate_gradients(
    trainable: Trainable, loss_of: DenoiserLoss, batch: LatentBatch, *, step: int, parts: int
) -> Tensor:
    """Gradients of the mean loss over `batch`, taken in `parts` equal parts; returns that loss, detached.

    When a compiled UNet fails (no compiler on the machine, an unsupported operation) the plain one takes over.
    """
    size = batch.latents.shape[0] // parts
    total: Tensor | None = None
    for part in range(parts):
        chosen = slice(part * size, (part + 1) * size)
        piece = LatentBatch(
            batch.latents[chosen], batch.token_ids[chosen], batch.conditioning[chosen]
        )
        try:
            loss = loss_of(piece, noise_index=step * parts + part) / parts
            loss.backward()
        except Exception as error:
            plain = trainable.networks["unet"]
            if loss_of.unet is plain or isinstance(error, torch.OutOfMemoryError | Interrupted):
                raise
            logger.warning("torch.compile failed (%s); going on without it", str(error).splitlines()[0])
            loss_of.unet = plain
            for parameter in trainable.parameters:
                parameter.grad = None
            loss = loss_of(piece, noise_index=step * parts + part) / parts
            loss.backward()
        trainable.collect_gradients()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def compile_ahead(config: TeacherConfig, *, vocabulary_size: int = 2000) -> float:
    """Run two denoiser steps on noise so that torch's compile cache holds the UNet; returns the seconds taken.

    Compiling is work for the CPU: run this in a second process while the autoencoder trains, and the denoiser
    starts within seconds.
    """
    started_s = time.monotonic()
    device = _device(config.device)
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
    loss_of = denoiser_loss_module(trainable, empty_ids=ids, config=settings, seed=0, device=device)
    side = int(unet.config["sample_size"])
    num = settings.batch_size
    batch = LatentBatch(
        latents=torch.randn(num, config.autoencoder.latent_channels, side, side, device=device),
        token_ids=ids.to(device).expand(num, -1),
        conditioning=torch.zeros(num, 5, device=device),
    )
    for step in range(2):
        accumulate_gradients(trainable, loss_of, batch, step=step, parts=max(1, settings.accumulate_steps))
        trainable.step(learning_rate=0.0, gradient_clip=1.0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started_s


# ---------------------------------------------------------------------- small parts


def _load_network(network: torch.nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Fill `network` with the tensors of `weights` whose name starts with `prefix`."""
    chosen = {name.removeprefix(prefix): t.float() for name, t in weights.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(chosen)
    except RuntimeError as error:
        raise UsageError(
            f"checkpoint does not fit this configuration ({str(error).splitlines()[0]}); resume with the "
            "configuration it was trained with"
        ) from error


def _memory_text(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
