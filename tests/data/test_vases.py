"""Procedural vases are closed solids that follow from their seed and look as their names say."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from uni3d.data.vases import PATTERN_PHRASES, make_vase, plan_vase, vase_name, vase_tags


def seed_with(pattern: str, *, handles: bool | None = None) -> int:
    return next(
        s
        for s in range(500)
        if plan_vase(s).pattern == pattern and handles in (None, plan_vase(s).has_handles)
    )


@pytest.mark.parametrize("handles", [False, True])
def test_vases_are_closed_and_face_outwards(handles: bool) -> None:
    mesh = make_vase(seed_with("", handles=handles))
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    for part in solid.split(only_watertight=False):
        assert part.is_watertight
        assert part.volume > 0
    assert len(solid.split(only_watertight=False)) == (3 if handles else 1)
    assert np.isfinite(mesh.vertices).all()


@pytest.mark.parametrize("pattern", list(PATTERN_PHRASES))
def test_patterns_show_every_colour_of_the_plan(pattern: str) -> None:
    seed = seed_with(pattern)
    texture = make_vase(seed).materials[0].texture
    assert texture is not None
    for colour in plan_vase(seed).colours[:2]:
        share = (np.abs(texture[..., :3] - colour).max(axis=-1) < 0.01).mean()
        assert 0.02 < share < 0.98
    assert PATTERN_PHRASES[pattern] in vase_name(seed)
    assert "patterned" in vase_tags(seed)


def test_same_seed_same_vase_other_seed_other_vase() -> None:
    np.testing.assert_array_equal(make_vase(3).vertices, make_vase(3).vertices)
    assert not np.array_equal(make_vase(3).vertices, make_vase(4).vertices)


def test_plain_vases_have_one_colour() -> None:
    texture = make_vase(seed_with("")).materials[0].texture
    assert texture is not None
    assert np.ptp(texture.reshape(-1, 4), axis=0).max() == 0
