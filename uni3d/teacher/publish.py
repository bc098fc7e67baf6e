"""From training weights to a teacher folder in the diffusers layout, with vocabulary and model card.

`diffusers.StableDiffusionPipeline.from_pretrained` loads the folder as it loads any Stable Diffusion; it
ignores `camera_token/`, which this project's own loader puts into the text context.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import __version__ as diffusers_version
from safetensors.torch import save_file
from torch import Tensor, nn

from uni3d.diffusion.camera_token import CameraToken
from uni3d.diffusion.teacher_files import quiet_libraries
from uni3d.errors import UsageError
from uni3d.teacher.autoencoder import build_autoencoder
from uni3d.teacher.checkpoint_files import read_state, read_tensors
from uni3d.teacher.denoiser import build_scheduler, build_text_encoder, build_unet
from uni3d.teacher.settings import AutoencoderConfig, DenoiserConfig
from uni3d.teacher.tokenizer import build_tokenizer
from uni3d.teacher.trainable import cast_network

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TRAINING_NAME = "training.json"
_MAX_LISTED_NOUNS = 60


def tokenizer_text(tokenizer: CLIPTokenizer) -> str:
    """A tokenizer as one JSON text, for a checkpoint's state."""
    return json.dumps(
        {"context_length": tokenizer.model_max_length, "tokenizer": tokenizer.backend_tokenizer.to_str()}
    )


def read_tokenizer(state: Mapping[str, Any]) -> CLIPTokenizer:
    """The tokenizer whose `tokenizer_text` is in a checkpoint's state."""
    stored = json.loads(state["tokenizer"])
    model = json.loads(stored["tokenizer"])["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return build_tokenizer(model["vocab"], merges, context_length=int(stored["context_length"]))


def publish_teacher(
    compact_folder: str | os.PathLike[str],
    teacher_folder: str | os.PathLike[str],
    *,
    card_notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the teacher of a compact checkpoint to `teacher_folder` in half precision; returns the folder.

    `card_notes`: sections added to the model card, text by heading (data and licences, evaluation).
    Raises UsageError when the checkpoint is missing, damaged or of another configuration.
    """
    state = read_state(compact_folder)
    if state is None:
        raise UsageError(f"{compact_folder} holds no compact checkpoint; run `uni3d teacher train` first")
    tensors = read_tensors(compact_folder)
    autoencoder_config = AutoencoderConfig(**_as_tuples(state["config"]["autoencoder"]))
    denoiser_config = DenoiserConfig(**_as_tuples(state["config"]["denoiser"]))
    tokenizer = read_tokenizer(state)
    networks: dict[str, nn.Module] = {
        "vae": build_autoencoder(autoencoder_config),
        "unet": build_unet(denoiser_config, autoencoder_config),
        "text_encoder": build_text_encoder(denoiser_config, tokenizer),
        "camera_token": CameraToken(denoiser_config.context_dim),
    }
    for name, network in networks.items():
        _load(network, tensors, name)
        cast_network(network, device=torch.device("cpu"), dtype=torch.float16)
    target = Path(teacher_folder)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with quiet_libraries():
        for name, network in networks.items():
            network.save_pretrained(fresh / name)  # type: ignore[operator]
    _finish_text_encoder(networks["text_encoder"], fresh / "text_encoder")
    _write_tokenizer(tokenizer, fresh / "tokenizer")
    build_scheduler().save_pretrained(fresh / "scheduler")
    _write_json(fresh / "model_index.json", _model_index())
    _write_json(fresh / "vocabulary.json", state["vocabulary"])
    _write_json(fresh / TRAINING_NAME, state["metrics"])
    (fresh / "README.md").write_text(model_card(state, networks, card_notes or {}), encoding="utf-8")
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes them readable by their owner alone
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)
    return target


def _as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples: give the configuration its own back."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _load(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    prefix = f"{name}."
    chosen = {key.removeprefix(prefix): t.float() for key, t in tensors.items() if key.startswith(prefix)}
    own = {key.removeprefix("text_model."): key for key, _ in network.named_parameters()}
    try:
        network.load_state_dict({own[key]: tensor for key, tensor in chosen.items()}, strict=False)
    except (KeyError, RuntimeError) as error:
        raise UsageError(
            f"the {name} weights do not fit their configuration ({error}); use the version that trained"
        ) from error
    missing = sorted(own.keys() - chosen.keys())
    if missing:
        raise UsageError(f"the checkpoint lacks {name} weights ({missing[0]}, ...); train again")


def _finish_text_encoder(text_encoder: nn.Module, folder: Path) -> None:
    """Rewrite what transformers wrote so that every release of it reads the same thing.

    Weights get the names of every published Stable Diffusion (some releases write shorter ones). The
    configuration asks for float32: transformers would else keep the stored half precision while diffusers
    loads the other networks as float32, and the pipeline would fail on the mixture.
    """
    weights = {
        "text_model." + name.removeprefix("text_model."): parameter.detach().contiguous()
        for name, parameter in text_encoder.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "config.json", {**config, "dtype": "float32"})


def _write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The tokenizer's own files and the two older ones that every release of transformers reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def model_card(state: Mapping[str, Any], networks: Mapping[str, nn.Module], notes: Mapping[str, str]) -> str:
    """The README of a teacher folder, from its checkpoint's state."""
    vocabulary, metrics = state["vocabulary"], state["metrics"]
    nouns = sorted(vocabulary["nouns"], key=lambda noun: (-vocabulary["nouns"][noun]["count"], noun))
    size = state["config"]["autoencoder"]["image_size"]
    denoiser, autoencoder = metrics["denoiser"], metrics["autoencoder"]
    minutes = f"{denoiser['training_minutes']:g} min after {autoencoder.get('training_minutes', 0):g} min"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "---",
        "",
        "# Embedded teacher of uni3d",
        "",
        f"A small latent diffusion model of single objects, {size}x{size} pixels, in the layout of Stable",
        "Diffusion. It guides text-to-3D on machines that hold no larger model, and nothing else: it",
        f"draws only the {len(nouns)} kinds of objects that it was shown.",
        "",
        "## Parts",
        "",
        "| part | parameters |",
        "| --- | --- |",
        *(f"| {name} | {_millions(network)} |" for name, network in networks.items()),
        "",
        "Weights are half precision. The denoiser predicts v on Stable Diffusion's noise schedule. The",
        "camera token replaces the last of the prompt's context tokens; without it view words do its work",
        '("a red chair, front view"; front, side, back, overhead).',
        "",
        "## Training",
        "",
        f"{denoiser['steps']:,} denoiser steps, {denoiser['images_seen']:,} images seen; {minutes} of",
        f"autoencoder training, on {denoiser.get('num_devices', 1)} x {denoiser['device']}.",
        *_earlier_training(metrics),
        f"Autoencoder on {autoencoder.get('measured_on', 'training views')}:",
        f"{autoencoder['psnr_db']:.1f} dB PSNR, {autoencoder['object_psnr_db']:.1f} dB on the object alone,",
        f"mean chroma error {autoencoder['chroma_error_levels']:.1f} of 255 levels.",
        "",
        "## Vocabulary",
        "",
        f"The most frequent of {len(nouns)} nouns: {', '.join(nouns[:_MAX_LISTED_NOUNS])}. All are in",
        "`vocabulary.json`. Other words are spelt out in pieces and mean nothing to it.",
    ]
    for heading, text in notes.items():
        lines += ["", f"## {heading}", "", text.strip()]
    return "\n".join(lines) + "\n"


def _earlier_training(metrics: Mapping[str, Any]) -> list[str]:
    """Lines about the teachers that the training started from, the last one first."""
    lines = []
    while (initial := metrics.get("initial_teacher")) is not None:
        metrics = initial["training"] or {}
        if "denoiser" not in metrics:
            lines.append("It started from another teacher, whose training is not known.")
            break
        denoiser = metrics["denoiser"]
        minutes = denoiser["training_minutes"] + metrics["autoencoder"].get("training_minutes", 0)
        devices = f"{denoiser.get('num_devices', 1)} x {denoiser['device']}"
        lines += [
            f"It started from a teacher that had seen {denoiser['images_seen']:,} images in",
            f"{denoiser['steps']:,} steps ({minutes:g} min on {devices}).",
        ]
    return lines


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.2f} M"
