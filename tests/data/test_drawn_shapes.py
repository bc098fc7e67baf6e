"""Drawn shapes: the same from the same seed, all classes there, and one sentence for a name that is none."""

from __future__ import annotations

import numpy as np
import pytest

from uni3d.data.drawn_shapes import KINDS, draw_shapes, parse_shapes
from uni3d.errors import UsageError


def test_shapes_are_repeatable_and_differ() -> None:
    shapes = draw_shapes(64, size=12)
    assert (len(shapes), shapes.resolution, shapes.num_channels, shapes.num_classes) == (
        64,
        12,
        3,
        len(KINDS),
    )
    pixels = shapes.images()
    assert np.array_equal(pixels, draw_shapes(64, size=12).images())
    assert not np.array_equal(pixels, draw_shapes(64, size=12, seed=1).images())
    assert shapes.labels is not None and set(shapes.labels) == set(range(len(KINDS)))
    assert len(np.unique(pixels.reshape(64, -1), axis=0)) == 64


def test_a_ring_is_open_and_the_others_are_not() -> None:
    shapes = draw_shapes(200, size=32)
    middle = shapes.images()[:, :, 12:20, 12:20].max(axis=1).astype(float)
    darkest = middle.min(axis=(1, 2))
    assert shapes.labels is not None
    assert darkest[shapes.labels == 3].mean() < 0.6 * darkest[shapes.labels == 1].mean()


def test_names() -> None:
    assert parse_shapes("shapes:500") == (500, 16) and parse_shapes("shapes:9:32") == (9, 32)
    for bad in ("shapes:", "shapes:x", "shapes:5:6:7", "shapes:-1", "forms:5", "shapes:99999999999"):
        with pytest.raises(UsageError, match="write shapes:N"):
            parse_shapes(bad)
    for bad in (0, 10**7):
        with pytest.raises(UsageError, match="expected 1 to"):
            draw_shapes(bad)
