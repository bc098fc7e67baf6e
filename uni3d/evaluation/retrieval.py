"""Whether images are found by their own prompt among all prompts of a benchmark (R-precision).

A joint embedding of images and texts (the evaluator, CLIP, HPSv2) says how well they match.
Legend: B images, V views of one result, T prompts, E features of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.errors import MissingWeightsError, UsageError

_BATCH = 64


class JointEmbedding(Protocol):
    """Images and texts in one space. `name` tells in reports whose cosines these are."""

    name: str

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to unit vectors float32 [B, E] on the CPU."""
        ...

    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors float32 [T, E] on the CPU."""
        ...


@dataclass(frozen=True)
class Retrieval:
    """How one result matches its prompt, by cosines and by rank among all prompts."""

    mean_similarity: float
    worst_similarity: float
    """Of the view that matches its prompt least."""
    is_first: bool
    """By the mean over views, no other prompt of the benchmark matches better."""
    views_first: float
    """Share of views that no other prompt matches better."""


def retrieve(similarity: Tensor, asked: int) -> Retrieval:
    """Judge the cosines [V, T] of a result's views with all prompts; `asked` is the index of its own.

    A tie with another prompt counts as lost: a blank view matches everything alike.
    """
    if similarity.ndim != 2 or len(similarity) == 0 or not 0 <= asked < similarity.shape[1]:
        raise UsageError(
            f"got similarities of shape {tuple(similarity.shape)} and prompt {asked}; expected [V, T]"
        )
    own = similarity[:, asked]
    others = torch.cat([similarity[:, :asked], similarity[:, asked + 1 :]], dim=1)
    if others.shape[1] == 0:
        raise UsageError("got one prompt; finding it among others needs at least two")
    return Retrieval(
        mean_similarity=float(own.mean()),
        worst_similarity=float(own.min()),
        is_first=bool(own.mean() > others.mean(0).max()),
        views_first=float((own > others.max(1).values).float().mean()),
    )


class ClipEmbedding:
    """CLIP, or a model of its classes such as HPSv2, by transformers: a hub id or a folder; safetensors only.

    The cosine of HPSv2 is its preference score; `title` then says so in reports. Raises MissingWeightsError
    if nothing can be loaded.
    """

    def __init__(
        self, name_or_path: str | Path, *, title: str = "clip", device: torch.device | str = "cpu"
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.name = f"{title}:{Path(name_or_path).name}"
        try:
            model = CLIPModel.from_pretrained(str(name_or_path), use_safetensors=True)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(name_or_path))
            processor: Any = CLIPImageProcessor.from_pretrained(str(name_or_path))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MissingWeightsError(
                f"no CLIP model could be loaded from '{name_or_path}' ({reason}); pass a hub id or a folder "
                f"that `save_pretrained` of a CLIPModel and a CLIPProcessor wrote"
            ) from error
        self._model: Any = model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self._size = int(self._model.config.vision_config.image_size)
        self._mean = torch.tensor(processor.image_mean)[:, None, None]
        self._std = torch.tensor(processor.image_std)[:, None, None]

    @torch.no_grad()
    def image_embeddings(self, images: Tensor) -> Tensor:
        """As `JointEmbedding`; images are resized as CLIP's own processor does, bicubic with antialiasing."""
        parts = [self._embed(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        return torch.cat(parts)

    def _embed(self, images: Tensor) -> Tensor:
        size = (self._size, self._size)
        pixels = functional.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = ((pixels - self._mean) / self._std).to(self._model.device)
        return functional.normalize(
            _pooled(self._model.get_image_features(pixel_values=pixels)), dim=-1
        ).cpu()

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """As `JointEmbedding`; texts longer than the model reads are cut."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._model.device)
        features = self._model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return functional.normalize(_pooled(features), dim=-1).cpu()


def _pooled(output: Any) -> Tensor:
    """The projected vector: the output itself, or its field in newer releases of transformers."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
