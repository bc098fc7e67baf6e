"""Train the evaluator on rendered views, measure its own accuracy, and write the folder that ships.

It is trained on views of other assets than the teacher wherever a noun has several. What it then gets right
on renders of assets that neither network saw is the ceiling of every figure measured with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from uni3d.errors import MissingWeightsError, TrainingDiverged, UsageError
from uni3d.evaluation.benchmark_nouns import NamedRecord, choose_benchmark_nouns, record_category
from uni3d.evaluation.ceiling import measure_ceiling
from uni3d.evaluation.evaluator import Evaluator, colour_text, noun_text
from uni3d.evaluation.evaluator_card import write_card
from uni3d.evaluation.evaluator_data import (
    BENCHMARK_COLOURS,
    TRAINING_ROLES,
    UNSEEN_ROLE,
    EvaluatorBatch,
    EvaluatorPool,
    LabelWords,
    build_pool,
    build_vocabulary,
    collect_captions,
    compatible_nouns,
    draw_batch,
    label_words,
    select_views,
)
from uni3d.evaluation.evaluator_losses import (
    benchmark_loss,
    caption_loss,
    feature_loss,
    noun_loss,
    soft_cross_entropy,
    view_loss,
)
from uni3d.evaluation.image_tower import EfficientNetTower, read_tower, start_from, tower_credit
from uni3d.evaluation.network import EvaluatorNetwork, NetworkConfig, network_tower
from uni3d.evaluation.settings import EvaluatorSettings
from uni3d.evaluation.vocabulary import PADDING, Vocabulary
from uni3d.training.checkpoint import atomic_write, atomic_write_json

if TYPE_CHECKING:
    from uni3d.data.view_shards import Views

logger = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint"
_PROGRESS_VIEWS = 768
_MAX_BAD_STEPS = 20


def train_evaluator(
    settings: EvaluatorSettings,
    views_dir: str | Path,
    output_dir: str | Path,
    *,
    resume: bool = False,
    checkpoint_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Train on the view shards in `views_dir` and write the evaluator into `output_dir`; returns its metrics.

    Views of the roles "evaluator" and "both" are trained on, those of the role "neither" measure the result.
    Checkpoints go into `checkpoint_dir` (default: `output_dir`/checkpoints) and `resume` goes on from there.
    Raises UsageError for shards without views to train on and for a checkpoint that does not fit.
    """
    from uni3d.data.view_shards import load_views

    if settings.initial_tower is not None:
        read_tower(settings.initial_tower)  # A bad file is refused before the views are read.
    roles = sorted(TRAINING_ROLES | {UNSEEN_ROLE})
    views = load_views(
        Path(views_dir), num_workers=settings.num_workers, limit=settings.limit_views, roles=roles
    )
    return fit_evaluator(
        settings,
        views,
        output_dir,
        resume=resume,
        checkpoint_dir=checkpoint_dir,
        library=_read_library(Path(views_dir) / "library.json"),
    )


def fit_evaluator(
    settings: EvaluatorSettings,
    views: Views,
    output_dir: str | Path,
    *,
    resume: bool = False,
    checkpoint_dir: str | Path | None = None,
    library: Sequence[NamedRecord] | None = None,
) -> dict[str, Any]:
    """`train_evaluator` for views that are already in memory.

    `library` names all assets of the data, whoever trains on them: the benchmark's nouns are the most
    frequent of its categories that there are views to train on. The default takes the views' own records.
    """
    from uni3d.data.captions import COLOUR_WORDS, sample_caption

    output = Path(output_dir)
    started = time.monotonic()
    device = _device(settings.device)
    torch.manual_seed(settings.seed)
    train_views = select_views(views, TRAINING_ROLES)
    if not train_views.records:
        raise UsageError(
            "no views with role 'evaluator' or 'both' to train on; render views for the evaluator"
        )
    benchmark = choose_benchmark_nouns(
        library or views.records,
        num=settings.num_benchmark_nouns,
        among={category for record in train_views.records if (category := record_category(record))},
    )
    unseen_views = select_views(views, {UNSEEN_ROLE})
    words = label_words(train_views.records, benchmark, COLOUR_WORDS)
    assets, captions = collect_captions(
        train_views.records,
        words,
        lambda record, rng, colours: sample_caption(record, rng, colours=colours, view=False),
        seed=settings.seed,
    )
    vocabulary = build_vocabulary(words, captions)
    pool = build_pool(train_views, words, assets, captions, vocabulary, settings, device=device)
    logger.info(
        "%d views of %d assets, %d views of unseen assets, %d nouns, %d words; prepared in %.0f s",
        len(pool), len(assets), len(unseen_views.records), len(words.nouns), len(vocabulary),
        time.monotonic() - started,
    )  # fmt: skip
    run = _Run(settings, words, vocabulary, pool, device)
    folder = Path(checkpoint_dir) if checkpoint_dir is not None else output / "checkpoints"
    if resume:
        run.load_checkpoint(folder)
    run.train(folder, unseen_views)
    evaluator = run.averaged_evaluator()
    evaluator.save(output)
    # Measured on what was saved, half-precision weights and all.
    evaluator = Evaluator.load(output, device=device)
    metrics: dict[str, Any] = {
        "training": {
            "steps": run.step,
            "images_seen": run.step * settings.batch_size,
            "seconds": round(run.seconds, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "views": len(pool),
            "assets": len(assets),
            "nouns": len(words.nouns),
            "parameters": sum(parameter.numel() for parameter in run.network.parameters()),
            "initial_tower": settings.initial_tower.name if settings.initial_tower else None,
        },
        "ceiling": measure_ceiling(evaluator, unseen_views) if unseen_views.records else None,
    }
    if metrics["ceiling"] is None:
        logger.warning("no views with role 'neither': the evaluator's own accuracy stays unknown")
    atomic_write_json(output / "metrics.json", metrics)
    tower = settings.initial_tower
    credit = "" if tower is None else tower_credit(tower, run.network.config.tower_shape)
    write_card(output / "README.md", evaluator, metrics, train_views.records, credit=credit)
    return metrics


@dataclass(frozen=True)
class _LibraryEntry:
    """One asset of library.json."""

    asset_id: str
    name: str
    noun: str


def _read_library(path: Path) -> list[_LibraryEntry] | None:
    """All assets that the renderer listed beside the shards; None if it wrote no list."""
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["assets"]
        return [_LibraryEntry(str(e["asset_id"]), str(e["name"]), str(e["noun"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the list of assets {path} is damaged ({error}); delete it or render again"
        ) from None


@dataclass(frozen=True)
class _Texts:
    """Tokens of the classes and which nouns exclude each other, on the device."""

    nouns: Tensor
    benchmark: Tensor
    colours: Tensor
    basics: Tensor
    is_compatible: Tensor


class _Run:
    """One training run: network, averaged weights, optimiser, and what a checkpoint holds of them."""

    def __init__(
        self,
        settings: EvaluatorSettings,
        words: LabelWords,
        vocabulary: Vocabulary,
        pool: EvaluatorPool,
        device: torch.device,
    ) -> None:
        self.settings, self.words, self.vocabulary, self.pool, self.device = (
            settings,
            words,
            vocabulary,
            pool,
            device,
        )
        config = NetworkConfig(
            image_size=settings.image_size,
            stage_channels=settings.stage_channels,
            stage_blocks=settings.stage_blocks,
            embedding_size=settings.embedding_size,
            text_width=settings.text_width,
            text_layers=settings.text_layers,
            text_heads=settings.text_heads,
            max_words=settings.max_words,
            vocabulary_size=len(vocabulary),
            dropout=settings.dropout,
            input_size=settings.input_size,
            view_hidden=settings.view_hidden,
            stem_channels=settings.stem_channels,
            head_channels=settings.head_channels,
        )
        self.network = EvaluatorNetwork(config).to(device)
        if settings.initial_tower is not None:
            start_from(self.network.image_tower, settings.initial_tower)
        self.initial_tower = self._initial_tower(config)
        if device.type == "cuda":
            self.network = self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.averaged = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimiser = torch.optim.AdamW(
            _parameter_groups(self.network, settings),
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.texts = _Texts(
            nouns=self._tokens([noun_text(noun) for noun in words.nouns]),
            benchmark=self._tokens([noun_text(noun.name) for noun in words.benchmark]),
            colours=self._tokens([colour_text(word) for word in words.colour_words]),
            basics=self._tokens([colour_text(word) for word in BENCHMARK_COLOURS]),
            is_compatible=torch.from_numpy(compatible_nouns(words.nouns)).to(device),
        )
        self.step = 0
        self.seconds = 0.0
        self._bad_steps = 0

    def _initial_tower(self, config: NetworkConfig) -> EfficientNetTower | None:
        """A frozen tower with the weights started from, if the loss asks for its features.

        It stays in training mode: normalised by ImageNet's statistics instead of the batch's, its features
        would be far from the trained tower's before that learnt anything (cosine distance 0.77, not 0).
        """
        settings = self.settings
        if settings.initial_tower is None or not settings.feature_weight:
            return None
        tower = network_tower(config).requires_grad_(False)
        start_from(tower, settings.initial_tower)
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        return tower.to(device=self.device, memory_format=layout)  # pyright: ignore[reportCallIssue]

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.vocabulary.encode(texts, self.settings.max_words).to(self.device)

    def train(self, checkpoint_folder: Path, unseen_views: Views) -> None:
        """Run to the end of the schedule, reporting and saving on the way."""
        settings = self.settings
        from uni3d.data.recolour import recolour

        start, logged, saved = time.monotonic() - self.seconds, 0.0, self.seconds
        generator = torch.Generator(device=self.device).manual_seed(settings.seed + 7919 * (self.step + 1))
        sums: dict[str, Tensor] = {}
        num_summed = 0
        self.network.train()
        while self.progress() < 1:
            batch = draw_batch(
                self.pool,
                settings.batch_size,
                generator,
                recolour,
                recolour_probability=settings.recolour_probability,
            )
            losses = self._step(batch)
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value
            num_summed += 1
            self.step += 1
            if self.step % 10 == 0 or self.device.type == "cpu":
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self.seconds = time.monotonic() - start
                if self.seconds - logged >= settings.log_seconds or self.step == 50:
                    logged = self.seconds
                    self._report(
                        {name: float(value) / num_summed for name, value in sums.items()}, unseen_views
                    )
                    sums, num_summed = {}, 0
                if self.seconds - saved >= settings.save_seconds:
                    saved = self.seconds
                    self.save_checkpoint(checkpoint_folder)
        self.seconds = time.monotonic() - start
        self.save_checkpoint(checkpoint_folder)

    def progress(self) -> float:
        """Fraction of the run that is done, by steps or by minutes, whichever is further."""
        done = self.step / self.settings.steps
        if self.settings.max_minutes is not None:
            done = max(done, self.seconds / (60 * self.settings.max_minutes))
        return done

    def _step(self, batch: EvaluatorBatch) -> dict[str, Tensor]:
        settings = self.settings
        warmup = min(1.0, (self.step + 1) / max(settings.warmup_steps, 1))
        share = warmup * 0.5 * (1 + math.cos(math.pi * min(self.progress(), 1.0)))
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["peak"]
        losses = self._losses(batch)
        total = losses["total"]
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.gradient_clip)
        if self.step % 50 == 0 and not bool(torch.isfinite(norm)):
            self._bad_steps += 1
            logger.warning("step %d: loss or gradient is not finite; the step is skipped", self.step)
            if self._bad_steps >= _MAX_BAD_STEPS:
                raise TrainingDiverged(
                    f"the evaluator's loss was not finite in {self._bad_steps} checked steps, the last one "
                    f"step {self.step}; lower learning_rate (now {settings.learning_rate:g}) and train again"
                )
        # Zeroed instead of branched on, so that the device never waits: a bad step then adds nothing.
        # (Clipping by a norm that is not finite has made every gradient 0 or NaN.)
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
        self.optimiser.step()
        self._average()
        return {name: value.detach() for name, value in losses.items()}

    def _losses(self, batch: EvaluatorBatch) -> dict[str, Tensor]:
        settings, network, texts = self.settings, self.network, self.texts
        precision = (
            torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()
        )
        with precision:
            images = batch.images
            if self.device.type == "cuda":
                images = images.contiguous(memory_format=torch.channels_last)
            output = network.images(images)
            initial_features = self._initial_features(batch.crisp)
            nouns, benchmark, colours, basics, captions = _embed_together(
                network, [texts.nouns, texts.benchmark, texts.colours, texts.basics, batch.caption]
            )
        image = output.embedding
        smoothing = settings.label_smoothing
        losses = {
            "noun": noun_loss(
                network.similarity(image, nouns, "noun"), batch.noun, texts.is_compatible, smoothing=smoothing
            ),
            "benchmark": benchmark_loss(
                network.similarity(image, benchmark, "noun"), batch.benchmark, smoothing=smoothing
            ),
            "colour": soft_cross_entropy(
                network.similarity(image, basics, "colour"), batch.basic, smoothing=smoothing
            )
            + 0.5
            * soft_cross_entropy(
                network.similarity(image, colours, "colour"), batch.colour, smoothing=smoothing
            ),
            "view": view_loss(output.view_logits, batch.view, batch.front, smoothing=smoothing),
            "caption": caption_loss(network.similarity(image, captions, "caption"), batch.caption_key),
        }
        if initial_features is not None:
            losses["feature"] = feature_loss(output.features[: len(initial_features)], initial_features)
        total = torch.stack(
            [getattr(settings, f"{name}_weight") * loss for name, loss in losses.items()]
        ).sum()
        return {"total": total, **losses}

    @torch.no_grad()
    def _initial_features(self, crisp: Tensor) -> Tensor | None:
        """Features [B / 2, F] that the frozen tower has of the first half of crisp images [B, 3, H, W].

        Half are enough for a mild pull, and cost half.
        """
        return None if self.initial_tower is None else self.initial_tower(crisp[: (len(crisp) + 1) // 2])

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential average of weights and normalisation statistics, shorter at the start."""
        decay = min(self.settings.ema_decay, (self.step + 1) / (self.step + 10))
        state = self.network.state_dict()
        floats = [name for name, value in state.items() if value.is_floating_point()]
        update = get_ema_multi_avg_fn(decay)
        update([self.averaged[name] for name in floats], [state[name] for name in floats], self.step)

    def averaged_evaluator(self) -> Evaluator:
        """An evaluator with the averaged weights, on the training device."""
        network = EvaluatorNetwork(self.network.config).to(self.device)
        network.load_state_dict(self.averaged)
        return Evaluator(network, self.vocabulary, self.words.benchmark)

    def _report(self, losses: dict[str, float], unseen_views: Views) -> None:
        text = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        accuracy = ""
        if unseen_views.records:
            ceiling = measure_ceiling(self.averaged_evaluator(), unseen_views, max_views=_PROGRESS_VIEWS)
            parts = {
                name: ceiling.get(name)
                for name in (
                    "noun_macro",
                    "noun_stress_macro",
                    "noun",
                    "colour_recoloured",
                    "view_with_front",
                    "view",
                )
            }
            accuracy = " | unseen: " + " ".join(
                f"{name} {100 * rate['mean']:.1f} %" for name, rate in parts.items() if rate is not None
            )
        logger.info("step %d, %.0f s: %s%s", self.step, self.seconds, text, accuracy)

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights, averages and optimiser state (safetensors), and progress (JSON)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"averaged.{name}": value for name, value in self.averaged.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        progress = {"step": self.step, "seconds": self.seconds, "words": self.vocabulary.words}
        # One file holds both, so that weights and progress can never belong to different moments.
        atomic_write(
            folder / f"{_CHECKPOINT}.safetensors",
            lambda temporary: save_file(tensors, temporary, metadata={"progress": json.dumps(progress)}),
        )

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from what `save_checkpoint` wrote; UsageError if it does not fit the settings or the data."""
        from safetensors import SafetensorError, safe_open

        path = folder / f"{_CHECKPOINT}.safetensors"
        if not path.is_file():
            raise MissingWeightsError(f"there is no checkpoint {path} to resume from; train without resume")
        try:
            with safe_open(path, "pt") as file:
                progress = json.loads(file.metadata()["progress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if progress["words"] != self.vocabulary.words:
                raise UsageError(
                    f"{path} was trained on other views; resume with the same views or start again"
                )
            self.network.load_state_dict(_below(tensors, "network."))
            averaged = _below(tensors, "averaged.")
            self.averaged = {name: averaged[name].to(self.device) for name in self.averaged}
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _below(tensors, "optimiser.").items():
                index, key = name.split(".", 1)
                state.setdefault(int(index), {})[key] = value
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": state, "param_groups": groups})
            self.step, self.seconds = int(progress["step"]), float(progress["seconds"])
        except (SafetensorError, RuntimeError, KeyError, ValueError, OSError) as error:
            if isinstance(error, UsageError):
                raise
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"checkpoint {path} is damaged or of other settings ({reason}); start again"
            ) from None


def _embed_together(network: EvaluatorNetwork, groups: list[Tensor]) -> list[Tensor]:
    """Embed groups of token rows [T_i, L_i] in one pass of the text tower: a small one costs as much."""
    length = max(tokens.shape[1] for tokens in groups)
    padded = [nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=PADDING) for tokens in groups]
    embedding = network.texts(torch.cat(padded))
    return list(embedding.split([len(tokens) for tokens in groups]))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _parameter_groups(network: EvaluatorNetwork, settings: EvaluatorSettings) -> list[dict[str, Any]]:
    """A learning rate of its own for the image tower; weight decay for matrices and kernels only."""
    tower = list(network.image_tower.parameters())
    of_tower = set(map(id, tower))
    others = [parameter for parameter in network.parameters() if id(parameter) not in of_tower]
    return [
        {
            "params": [p for p in parameters if (p.dim() > 1) == is_matrix],
            "lr": peak,
            "peak": peak,
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
        }
        for parameters, peak in ((tower, settings.tower_learning_rate), (others, settings.learning_rate))
        for is_matrix in (True, False)
    ]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r} was asked for and this machine has no CUDA device; use auto or cpu"
        )
    return device
