"""Stand-ins for the evaluation tests: painted shapes as views; an evaluator that reads labels off pixels."""

from __future__ import annotations

import numpy as np
import torch

from uni3d.data.view_shards import ViewRecord, Views
from uni3d.evaluation.benchmark_nouns import BENCHMARK_COLOURS, BenchmarkNoun
from uni3d.evaluation.network import VIEW_WORDS, ImageOutput

RGB = {"red": (0.85, 0.1, 0.1), "blue": (0.1, 0.15, 0.8)}


def record(
    asset_id: str, noun: str, colour: str, *, role: str, azimuth: float = 0.0, name: str = ""
) -> ViewRecord:
    return ViewRecord(
        asset_id=asset_id,
        name=name or noun,
        noun=noun,
        category="test",
        colours=(colour,),
        materials=(),
        tags=(),
        main_colour=RGB.get(colour, (0.5, 0.5, 0.5)),
        role=role,
        source="painted",
        creator="nobody",
        licence="CC0-1.0",
        azimuth_deg=azimuth,
        elevation_deg=15.0,
        radius=2.4,
        fov_y_deg=40.0,
    )


def shape_mask(noun: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square for a crate, a disc for a planet, somewhere near the middle."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    x, y = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
    radius = rng.uniform(0.2, 0.3)
    return (np.maximum(abs(x), abs(y)) < radius) if noun == "crate" else (x**2 + y**2 < radius**2)


def painted_views(num: int, *, role: str, size: int = 32, seed: int = 0) -> Views:
    """Red crates and blue planets, half each."""
    rng = np.random.default_rng(seed)
    images = np.zeros((num, size, size, 4), dtype=np.uint8)
    masks = np.zeros((num, size, size), dtype=np.uint8)
    records = []
    for index in range(num):
        noun, colour = (("crate", "red"), ("planet", "blue"))[index % 2]
        mask = shape_mask(noun, size, rng)
        images[index, mask, :3] = np.round(255 * np.asarray(RGB[colour]))
        images[index, mask, 3] = 255
        masks[index, mask] = 255
        records.append(
            record(f"{role}/{index % 8}", noun, colour, role=role, azimuth=float(index * 37 % 360))
        )
    return Views(images, masks, records)


def merged(*parts: Views) -> Views:
    return Views(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.main_masks for part in parts]),
        [entry for part in parts for entry in part.records],
    )


class _Anything:
    def knows(self, text: str) -> bool:
        return True


class PixelEvaluator:
    """Reads verdicts off an image: mean red is the noun's index / 20, green the colour's, blue the view's."""

    def __init__(self, nouns: list[tuple[str, bool]], image_size: int = 8) -> None:
        self.benchmark_nouns = [BenchmarkNoun(name, front, 1, (name,)) for name, front in nouns]
        self.vocabulary = _Anything()
        config = type("Config", (), {"image_size": image_size})()
        self.network = type("Network", (), {"config": config})()

    @property
    def noun_names(self) -> list[str]:
        return [noun.name for noun in self.benchmark_nouns]

    def encode(self, images: torch.Tensor) -> ImageOutput:
        means = images.mean(dim=(2, 3))
        return ImageOutput(means, means, means)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images).features

    def _one_hot(self, output: ImageOutput, channel: int, num: int) -> torch.Tensor:
        index = (output.features[:, channel] * 20).round().long().clamp(0, num - 1)
        return 0.1 / num + 0.9 * torch.nn.functional.one_hot(index, num).float()

    def noun_probabilities(self, output: ImageOutput, nouns: list[str]) -> torch.Tensor:
        return self._one_hot(output, 0, len(nouns))

    def colour_probabilities(self, output: ImageOutput, colours: list[str]) -> torch.Tensor:
        return self._one_hot(output, 1, len(colours))

    def view_probabilities(self, output: ImageOutput) -> torch.Tensor:
        return self._one_hot(output, 2, len(VIEW_WORDS))

    def image(self, noun: str, colour: str | None, view: str, size: int = 8) -> torch.Tensor:
        """An image [3, size, size] that this evaluator reads as `noun`, `colour`, `view`."""
        colour_index = 0 if colour is None else BENCHMARK_COLOURS.index(colour)
        values = (self.noun_names.index(noun), colour_index, VIEW_WORDS.index(view))
        return torch.tensor(values).float().div(20)[:, None, None].expand(3, size, size).clone()
