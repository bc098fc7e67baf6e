"""A stand-in for the evaluator: embeddings are pooled pixels, texts fixed random directions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from uni3d.evaluation.benchmark_nouns import BenchmarkNoun
from uni3d.evaluation.network import ImageOutput

POOLED = 4
WIDTH = 3 * POOLED**2


class PlainEvaluator:
    """Has the methods of `Evaluator` that a benchmark calls."""

    def __init__(self) -> None:
        self.benchmark_nouns = [
            BenchmarkNoun(name, front, 1, (name,)) for name, front in (("chair", True), ("vase", False))
        ]
        self.vocabulary = type("Anything", (), {"knows": lambda self, text: True})()
        self.network = type("Network", (), {"config": type("Config", (), {"image_size": 16})()})()

    @classmethod
    def load(cls, path: Any, *, device: Any = "cpu") -> PlainEvaluator:
        return cls()

    @property
    def noun_names(self) -> list[str]:
        return [noun.name for noun in self.benchmark_nouns]

    def encode(self, images: Tensor) -> ImageOutput:
        pooled = functional.adaptive_avg_pool2d(images.float(), POOLED).flatten(1) - 0.45
        embedding = functional.normalize(pooled, dim=-1)
        return ImageOutput(pooled, embedding, pooled[:, :4])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            rows.append(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
        return functional.normalize(torch.stack(rows), dim=-1)

    def noun_probabilities(self, output: ImageOutput, nouns: Sequence[str]) -> Tensor:
        return output.features[:, : len(nouns)].softmax(dim=-1)

    def colour_probabilities(self, output: ImageOutput, colours: Sequence[str]) -> Tensor:
        return output.features[:, : len(colours)].softmax(dim=-1)

    def view_probabilities(self, output: ImageOutput) -> Tensor:
        return output.view_logits.softmax(dim=-1)
