"""The program behind `uni3d teacher train`: views -> autoencoder -> denoiser -> a published teacher.

    views --> caption tables, tokenizer --> ViewPool on the device
          --> autoencoder (then frozen, latents whitened) --> UNet + text encoder + camera token --> teacher/

Folders under the output: `checkpoints/autoencoder` and `checkpoints/denoiser` (exact continuation, float32),
`autoencoder/` (the finished one), `compact/` (half-precision weights that another machine can go on from or
publish; few small files), `grids/`, `metrics.jsonl` and `teacher/`.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uni3d.data.captions import known_words, vocabulary_from_records
from uni3d.data.view_shards import load_views
from uni3d.errors import UsageError
from uni3d.teacher.autoencoder_training import autoencoder_phase
from uni3d.teacher.checkpoint_files import read_state
from uni3d.teacher.denoiser_training import denoiser_phase
from uni3d.teacher.initial_weights import read_initial_teacher
from uni3d.teacher.publish import publish_teacher, read_tokenizer
from uni3d.teacher.session import Resume, Session
from uni3d.teacher.settings import TeacherConfig
from uni3d.teacher.view_batches import (
    VIEW_WORDS,
    CaptionTexts,
    build_view_pool,
    collect_captions,
    tokenizer_for,
)
from uni3d.training.devices import choose_device
from uni3d.training.processes import Processes, joined_processes
from uni3d.training.stop import StopFlag

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from uni3d.data.view_shards import Views

logger = logging.getLogger(__name__)

_TOKENIZER = "tokenizer"


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

    Under `torchrun` with several processes the denoiser's batch is shared among them, one GPU each.

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
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    with joined_processes(uses_cuda=device.type == "cuda") as processes:
        return _train(
            config,
            processes.device(device),
            processes,
            views=views,
            views_dir=views_dir,
            output=Path(output_dir),
            resume=resume,
            deadline_s=None if max_minutes is None else started_s + max_minutes * 60,
            publish=publish,
        )


def _train(
    config: TeacherConfig,
    device: torch.device,
    processes: Processes,
    *,
    views: Views | None,
    views_dir: str | os.PathLike[str] | None,
    output: Path,
    resume: Resume,
    deadline_s: float | None,
    publish: bool,
) -> TrainingResult:
    """`train_teacher` in one of `processes`."""
    started_s = time.monotonic()
    if processes.is_main:
        _prepare_output(output, resume)
    torch.manual_seed(config.seed)
    initial_teacher = None if config.initial_teacher is None else read_initial_teacher(config.initial_teacher)
    if views is None:
        if views_dir is None:
            raise UsageError("no views were given; pass the folder that `uni3d teacher render` wrote")
        views = load_views(
            Path(views_dir),
            num_workers=config.data.num_workers,
            limit=config.data.limit_views,
            roles=config.data.roles,
        )
    logger.info("%d views loaded in %.0f s", len(views.records), time.monotonic() - started_s)
    texts = collect_captions(views.records, config.data, seed=config.seed)
    if processes.is_main:
        tokenizer = _tokenizer(output, texts, config, resume)
        processes.wait()
    else:
        processes.wait()
        tokenizer = _saved_tokenizer(output)
    pool = build_view_pool(views, texts, tokenizer, config.data, device=device)
    logger.info(
        "%d assets, %d nouns, caption tables and views on %s after %.0f s",
        len(texts.plain), len({r.noun for r in views.records}), device, time.monotonic() - started_s,
    )  # fmt: skip
    with StopFlag() as stop:
        session = Session(
            config=config,
            output=output,
            device=device,
            deadline_s=deadline_s,
            stop=stop,
            pool=pool,
            tokenizer=tokenizer,
            vocabulary=_vocabulary(views, texts),
            processes=processes,
            initial_teacher=initial_teacher,
        )
        del views
        autoencoder, autoencoder_metrics = autoencoder_phase(session, resume)
        if autoencoder is None:
            return TrainingResult(False, 0, None, autoencoder_metrics)
        is_finished, step, metrics = denoiser_phase(session, autoencoder, autoencoder_metrics, resume)
    is_published = publish and processes.is_main
    folder = publish_teacher(output / "compact", output / "teacher") if is_published else None
    return TrainingResult(is_finished, step, folder, metrics)


# ---------------------------------------------------------------------- preparation


def _prepare_output(output: Path, resume: Resume) -> None:
    folders = ("checkpoints/autoencoder", "autoencoder", "compact")
    has_state = any(read_state(output / name) for name in folders)
    if resume == "no" and has_state:
        raise UsageError(
            f"{output} already holds a training run; pass --resume auto to go on, or another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be made ({error.strerror}); choose another folder") from error


def _tokenizer(output: Path, texts: CaptionTexts, config: TeacherConfig, resume: Resume) -> CLIPTokenizer:
    """The tokenizer of the run being resumed, or one trained on `texts`."""
    folder = output / _TOKENIZER
    if resume != "no" and folder.is_dir():
        return _saved_tokenizer(output)
    state = read_state(output / "compact") if resume != "no" else None
    if state is not None:
        tokenizer = read_tokenizer(state)
    else:
        tokenizer = tokenizer_for(
            texts, extra_words=sorted(known_words()), context_length=config.denoiser.context_length
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _saved_tokenizer(output: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(output / _TOKENIZER, local_files_only=True)


def _vocabulary(views: Views, texts: CaptionTexts) -> dict[str, Any]:
    """What the teacher has seen: see `vocabulary_from_records`; besides, view words and all caption words."""
    return {**vocabulary_from_records(views.records), "views": list(VIEW_WORDS), "words": texts.all_words()}
