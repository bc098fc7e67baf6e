"""The evaluator: says which object, colour and view a picture shows. Used only to measure.

Folder layout: config.json (shape of the network), model.safetensors (matrices in half precision),
vocabulary.json, nouns.json (the benchmark's nouns), metrics.json (its own accuracy on assets that no network
saw), README.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.errors import MissingWeightsError, UsageError
from uni3d.evaluation.benchmark_nouns import BenchmarkNoun, read_benchmark_nouns, write_benchmark_nouns
from uni3d.evaluation.network import VIEW_WORDS, EvaluatorNetwork, ImageOutput, NetworkConfig
from uni3d.evaluation.vocabulary import Vocabulary
from uni3d.resources import weights_folder
from uni3d.training.checkpoint import atomic_write, atomic_write_json

EMBEDDED = "embedded"
_BATCH = 128
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def noun_text(noun: str) -> str:
    """How a noun is put to the text tower, in training and in scoring."""
    return f"a {noun}"


def colour_text(colour: str) -> str:
    """How a colour word is put to the text tower, in training and in scoring."""
    return f"the colour {colour}"


class Evaluator:
    """A trained network with its vocabulary and the benchmark's nouns; all methods run without gradients."""

    def __init__(
        self, network: EvaluatorNetwork, vocabulary: Vocabulary, benchmark_nouns: Sequence[BenchmarkNoun]
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self.benchmark_nouns = list(benchmark_nouns)

    @property
    def device(self) -> torch.device:
        """Where the weights are and where images are moved to."""
        return self.network.image_projection.weight.device

    @property
    def noun_names(self) -> list[str]:
        """The benchmark's nouns, in alphabetical order."""
        return [noun.name for noun in self.benchmark_nouns]

    def to(self, device: torch.device | str) -> Evaluator:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @classmethod
    def load(cls, path: str | Path = EMBEDDED, *, device: torch.device | str = "cpu") -> Evaluator:
        """Load from a folder, or the one shipped with uni3d for "embedded".

        Raises MissingWeightsError if the folder or a file is missing, UsageError if a file is damaged.
        """
        folder = weights_folder("evaluator") if str(path) == EMBEDDED else Path(path)
        for name in ("config.json", "model.safetensors", "vocabulary.json", "nouns.json"):
            if not (folder / name).is_file():
                raise MissingWeightsError(
                    f"the evaluator in {folder} has no {name}; pass the folder that the evaluator's training "
                    f"wrote, or 'embedded' for the one shipped with uni3d"
                )
        vocabulary = Vocabulary.read(folder / "vocabulary.json")
        config = _read_config(folder / "config.json")
        if config.vocabulary_size != len(vocabulary):
            raise UsageError(
                f"{folder}: vocabulary.json has {len(vocabulary)} entries and the weights expect "
                f"{config.vocabulary_size}; take all files from one training run"
            )
        network = EvaluatorNetwork(config)
        _load_weights(network, folder / "model.safetensors")
        return cls(network.to(device), vocabulary, read_benchmark_nouns(folder / "nouns.json"))

    def save(self, folder: str | Path) -> None:
        """Write config, weights, vocabulary and nouns; vectors stay float32, larger tensors turn float16."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: (value.half() if value.dim() > 1 else value).cpu().contiguous()
            for name, value in self.network.state_dict().items()
        }
        atomic_write_json(folder / "config.json", asdict(self.network.config))
        self.vocabulary.write(folder / "vocabulary.json")
        write_benchmark_nouns(self.benchmark_nouns, folder / "nouns.json")
        atomic_write(folder / "model.safetensors", lambda temporary: save_file(tensors, temporary))

    @torch.no_grad()
    def encode(self, images: Tensor) -> ImageOutput:
        """Features, embedding and view logits of images [B, 3, H, W] in [0, 1], on the CPU in float32.

        Other sizes are resampled to the network's. Each image is seen as it is and mirrored, and the two
        outputs are averaged: none of the view words tells left from right.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(
                f"images have shape {tuple(images.shape)}; expected [B, 3, H, W] with values in [0, 1]"
            )
        parts = [
            self._encode_batch(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)
        ]
        if not parts:
            parts = [self._encode_batch(images.new_zeros(1, 3, 8, 8))]
            parts = [ImageOutput(*(getattr(parts[0], name)[:0] for name in _OUTPUTS))]
        return ImageOutput(*(torch.cat([getattr(part, name) for part in parts]) for name in _OUTPUTS))

    def _encode_batch(self, images: Tensor) -> ImageOutput:
        size = self.network.config.image_size
        images = images.to(self.device, torch.float32).clamp(0, 1)
        if images.shape[-2:] != (size, size):
            images = functional.interpolate(
                images, (size, size), mode="bilinear", antialias=True, align_corners=False
            ).clamp(0, 1)
        plain, mirrored = self.network.images(images), self.network.images(images.flip(-1))
        embedding = functional.normalize(plain.embedding + mirrored.embedding, dim=-1)
        return ImageOutput(
            features=((plain.features + mirrored.features) / 2).cpu(),
            embedding=embedding.cpu(),
            view_logits=((plain.view_logits + mirrored.view_logits) / 2).cpu(),
        )

    def image_features(self, images: Tensor) -> Tensor:
        """Pooled features float32 [B, F] of images [B, 3, H, W] in [0, 1], for the Frechet distance."""
        return self.encode(images).features

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings float32 [T, E] on the CPU; unknown words are read as one unknown word."""
        tokens = self.vocabulary.encode(list(texts), self.network.config.max_words)
        return self.network.texts(tokens.to(self.device)).cpu()

    def noun_probabilities(self, images: Tensor | ImageOutput, nouns: Sequence[str]) -> Tensor:
        """Probability [B, N] of each of `nouns`; rows sum to 1. UsageError for a wholly unknown noun."""
        return self._probabilities(images, nouns, [noun_text(noun) for noun in nouns], "noun")

    def colour_probabilities(self, images: Tensor | ImageOutput, colours: Sequence[str]) -> Tensor:
        """Probability [B, C] of each of the colour words `colours` as the main colour; rows sum to 1."""
        return self._probabilities(images, colours, [colour_text(colour) for colour in colours], "colour")

    def view_probabilities(self, images: Tensor | ImageOutput) -> Tensor:
        """Probability [B, 4] of front, side, back and overhead (`VIEW_WORDS`); rows sum to 1."""
        return self._output(images).view_logits.softmax(dim=-1)

    def caption_similarity(self, images: Tensor | ImageOutput, captions: Sequence[str]) -> Tensor:
        """Cosine [B, T] between images and whole captions."""
        return self._output(images).embedding @ self.text_features(captions).T

    def _output(self, images: Tensor | ImageOutput) -> ImageOutput:
        return images if isinstance(images, ImageOutput) else self.encode(images)

    @torch.no_grad()
    def _probabilities(
        self, images: Tensor | ImageOutput, words: Sequence[str], texts: list[str], kind: str
    ) -> Tensor:
        unknown = [word for word in words if not self.vocabulary.knows(word)]
        if unknown or not words:
            raise UsageError(
                f"the evaluator does not know {', '.join(map(repr, unknown))}; choose among the words of its "
                f"vocabulary.json" if unknown else f"got no {kind} words to choose among; pass at least one"
            )  # fmt: skip
        image_embedding = self._output(images).embedding.to(self.device)
        text_embedding = self.text_features(texts).to(self.device)
        return self.network.similarity(image_embedding, text_embedding, kind).softmax(dim=-1).cpu()


_OUTPUTS = ("features", "embedding", "view_logits")


def _read_config(path: Path) -> NetworkConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # What files of before these keys existed were trained with.
        values = {
            "stem_channels": 2 * values["stage_channels"][0],
            "head_channels": 4 * values["stage_channels"][-1],
            "pixel_mean": _IMAGENET_MEAN,
            "pixel_std": _IMAGENET_STD,
        } | values
        for key in ("stage_channels", "stage_blocks", "pixel_mean", "pixel_std"):
            values[key] = tuple(values[key])
        return NetworkConfig(**values)
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot read {path} ({error}); take the file written beside the weights") from None


def _load_weights(network: EvaluatorNetwork, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{path} is damaged or belongs to another config.json ({reason}); "
            f"take all files from one training run"
        ) from None


__all__ = ["EMBEDDED", "VIEW_WORDS", "Evaluator", "colour_text", "noun_text"]
