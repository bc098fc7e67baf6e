"""Colour words: prototypes, the nearest word to a colour, and the dominant colours of a set of samples.

All colours are sRGB in [0, 1]. Distances are Euclidean in CIELAB (D65) with lightness weighted down, because
shading and wood grain move lightness far more than hue. Legend: N samples, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LIGHTNESS_WEIGHT = 0.7
CLUSTER_LIGHTNESS_WEIGHT = 0.45
SAME_CLUSTER_DISTANCE = 17.0
SECOND_COLOUR_SHARE = 0.15

_PROTOTYPES_8BIT: dict[str, list[tuple[int, int, int]]] = {
    "red": [(205, 30, 32), (150, 22, 25), (224, 62, 50), (122, 20, 28), (176, 45, 52), (140, 36, 46)],
    "orange": [(240, 130, 28), (226, 108, 38), (248, 160, 58), (205, 95, 30)],
    "yellow": [(246, 216, 48), (236, 200, 82), (250, 236, 122), (196, 160, 50), (218, 180, 62)],
    "green": [
        (70, 180, 60),
        (100, 160, 60),
        (132, 202, 92),
        (150, 192, 60),
        (42, 190, 128),
        (196, 206, 100),
        (110, 162, 120),
        (76, 126, 104),
        (24, 84, 38),
        (42, 92, 42),
        (52, 72, 36),
        (22, 62, 50),
        (62, 86, 74),
        (78, 88, 50),
    ],
    "blue": [
        (30, 60, 202),
        (40, 60, 122),
        (62, 92, 172),
        (25, 35, 82),
        (22, 100, 200),
        (20, 22, 110),
        (72, 86, 132),
        (20, 110, 140),
    ],
    "light blue": [(130, 190, 240), (92, 172, 230), (166, 206, 232), (62, 192, 212), (150, 222, 226)],
    "purple": [
        (130, 50, 172),
        (92, 40, 110),
        (162, 112, 202),
        (70, 40, 92),
        (122, 92, 162),
        (88, 60, 172),
        (104, 76, 190),
    ],
    "pink": [(250, 150, 190), (240, 100, 160), (246, 182, 192), (222, 82, 142), (230, 140, 140)],
    "brown": [
        (112, 66, 32),
        (140, 92, 52),
        (82, 50, 30),
        (166, 116, 76),
        (56, 36, 26),
        (122, 86, 66),
        (150, 80, 48),
        (66, 54, 42),
        (84, 70, 54),
    ],
    "beige": [(226, 206, 172), (206, 180, 142), (236, 222, 196), (192, 166, 130)],
    "white": [(255, 255, 255), (240, 240, 240), (226, 226, 226), (213, 213, 213)],
    "grey": [
        (128, 128, 128),
        (96, 96, 96),
        (166, 166, 166),
        (186, 186, 186),
        (110, 120, 130),
        (72, 74, 78),
        (150, 146, 140),
    ],
    "black": [(10, 10, 10), (40, 40, 40), (26, 26, 30)],
}

COLOUR_WORDS: dict[str, list[tuple[float, float, float]]] = {
    word: [(r / 255, g / 255, b / 255) for r, g, b in values] for word, values in _PROTOTYPES_8BIT.items()
}

COLOUR_SYNONYMS: dict[str, list[str]] = {
    "grey": ["gray"],
    "purple": ["violet"],
    "light blue": ["sky blue", "cyan"],
    "beige": ["cream", "tan"],
    "yellow": ["golden yellow"],
}


def lab_from_srgb(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB values [..., 3] in [0, 1]; float32."""
    rgb = np.clip(np.asarray(rgb, dtype=np.float32), 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ],
        dtype=np.float32,
    )
    white = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)
    relative = linear @ to_xyz.T / white
    cubic = np.where(relative > 216 / 24389, np.cbrt(relative), relative * (24389 / 27 / 116) + 16 / 116)
    x, y, z = cubic[..., 0], cubic[..., 1], cubic[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


_WORDS = list(COLOUR_WORDS)
_PROTOTYPE_WORD = np.array([i for i, word in enumerate(_WORDS) for _ in COLOUR_WORDS[word]])
_PROTOTYPE_LAB = lab_from_srgb(np.array([rgb for values in COLOUR_WORDS.values() for rgb in values]))


def nearest_colour_word(rgb: np.ndarray | tuple[float, float, float]) -> str:
    """The word whose prototypes come closest to one sRGB colour."""
    difference = (lab_from_srgb(np.asarray(rgb)) - _PROTOTYPE_LAB) * [LIGHTNESS_WEIGHT, 1, 1]
    return _WORDS[int(_PROTOTYPE_WORD[np.argmin((difference**2).sum(axis=1))])]


def sample_colour(word: str, rng: np.random.Generator, *, jitter: float = 0.04) -> np.ndarray:
    """An sRGB colour [3] that the word describes: a random prototype, moved by up to `jitter` a channel.

    Raises KeyError for a word that is not in COLOUR_WORDS.
    """
    prototypes = COLOUR_WORDS[word]
    base = np.array(prototypes[int(rng.integers(len(prototypes)))])
    for _ in range(8):
        candidate = np.clip(base + rng.uniform(-jitter, jitter, size=3), 0, 1)
        if nearest_colour_word(candidate) == word:
            return candidate
    return base


@dataclass(frozen=True)
class DominantColours:
    """Clusters of base colour by falling share: centres sRGB [K, 3], shares [K] summing to 1."""

    centres: np.ndarray
    shares: np.ndarray
    _features: np.ndarray

    def words(self) -> tuple[str, ...]:
        """The main colour word, and a second one if another cluster is large enough and named differently."""
        share_of: dict[str, float] = {}
        for centre, share in zip(self.centres, self.shares, strict=True):
            word = nearest_colour_word(centre)
            share_of[word] = share_of.get(word, 0.0) + float(share)
        main = nearest_colour_word(self.centres[0])
        others = sorted((w for w in share_of if w != main), key=lambda w: -share_of[w])
        return (main, others[0]) if others and share_of[others[0]] >= SECOND_COLOUR_SHARE else (main,)

    def is_main(self, rgb: np.ndarray) -> np.ndarray:
        """Boolean [N]: does each sRGB colour [N, 3] belong to the largest cluster?"""
        features = _cluster_features(rgb)
        distance = ((features[:, None] - self._features[None]) ** 2).sum(axis=-1)
        return distance.argmin(axis=1) == 0


def _cluster_features(rgb: np.ndarray) -> np.ndarray:
    return lab_from_srgb(rgb) * np.array([CLUSTER_LIGHTNESS_WEIGHT, 1, 1], dtype=np.float32)


def dominant_colours(rgb: np.ndarray, *, max_clusters: int = 7, max_samples: int = 4000) -> DominantColours:
    """Cluster base colours [N, 3]: farthest-point seeds, Lloyd steps, near clusters merged. Deterministic."""
    if len(rgb) == 0:
        raise ValueError("dominant_colours needs at least one sample")
    rgb = np.asarray(rgb, dtype=np.float32)
    rgb = rgb[:: max(1, len(rgb) // max_samples)]
    features = _cluster_features(rgb)
    centres = [np.median(features, axis=0)]
    nearest = ((features - centres[0]) ** 2).sum(axis=1)
    while len(centres) < max_clusters and nearest.max() > SAME_CLUSTER_DISTANCE**2:
        centres.append(features[int(nearest.argmax())])
        nearest = np.minimum(nearest, ((features - centres[-1]) ** 2).sum(axis=1))
    means = np.stack(centres)
    for _ in range(8):
        label = ((features[:, None] - means[None]) ** 2).sum(axis=-1).argmin(axis=1)
        means = np.stack(
            [features[label == k].mean(axis=0) if (label == k).any() else means[k] for k in range(len(means))]
        )
    label = _merge_near(features, label, len(means))
    kept, counts = np.unique(label, return_counts=True)
    order = kept[np.argsort(-counts, kind="stable")]
    shares = np.sort(counts)[::-1] / len(label)
    return DominantColours(
        centres=np.stack([rgb[label == k].mean(axis=0) for k in order]),
        shares=shares,
        _features=np.stack([features[label == k].mean(axis=0) for k in order]),
    )


def _merge_near(features: np.ndarray, label: np.ndarray, num: int) -> np.ndarray:
    """Join the two nearest clusters until all lie SAME_CLUSTER_DISTANCE apart."""
    label = label.copy()
    while True:
        present = [k for k in range(num) if (label == k).any()]
        means = np.stack([features[label == k].mean(axis=0) for k in present])
        distance = np.sqrt(((means[:, None] - means[None]) ** 2).sum(axis=-1))
        np.fill_diagonal(distance, np.inf)
        if len(present) < 2 or distance.min() > SAME_CLUSTER_DISTANCE:
            return label
        a, b = np.unravel_index(int(distance.argmin()), distance.shape)
        label[label == present[int(b)]] = present[int(a)]
