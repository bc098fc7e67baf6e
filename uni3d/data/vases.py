"""Procedural vases: turned profiles with painted patterns, so that vases and their ornaments mean something.

Every vase follows from its seed: a smooth profile is revolved into a closed solid with an inner wall, painted
with one to four colours in bands, stripes, checks, dots, zigzags, waves, diamonds or flowers, sometimes with
two handles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uni3d.data.colours import COLOUR_WORDS, sample_colour
from uni3d.mesh.renderable import Material, RenderableMesh

NUM_SIDES = 48
NUM_PROFILE_POINTS = 40
TEXTURE_SIZE = 256
PLAIN_SHARE = 0.25

# Pattern kind -> how a caption names it after "with".
PATTERN_PHRASES = {
    "bands": "bands",
    "stripes": "stripes",
    "checks": "checks",
    "dots": "dots",
    "zigzag": "zigzag patterns",
    "waves": "waves",
    "diamonds": "diamond patterns",
    "flowers": "flowers",
    "ornaments": "artistic patterns",
}


@dataclass(frozen=True)
class VasePlan:
    """What a seed decides: pattern kind ("" for plain), colours (ground first) as words and sRGB, handles."""

    pattern: str
    words: tuple[str, ...]
    colours: np.ndarray
    has_handles: bool
    seed: int


@lru_cache(maxsize=512)
def plan_vase(seed: int) -> VasePlan:
    """Decide pattern and colours of one vase."""
    rng = np.random.default_rng([seed, 77])
    pattern = "" if rng.random() < PLAIN_SHARE else str(rng.choice(list(PATTERN_PHRASES)))
    num_colours = (
        1 if not pattern else int(rng.integers(3, 5)) if pattern == "ornaments" else int(rng.integers(2, 4))
    )
    ground_weights = np.array(
        [3.0 if w in ("white", "beige", "blue", "brown") else 1.5 for w in COLOUR_WORDS]
    )
    words = rng.choice(
        list(COLOUR_WORDS), size=num_colours, replace=False, p=ground_weights / ground_weights.sum()
    )
    colours = np.stack([sample_colour(str(w), rng) for w in words])
    return VasePlan(pattern, tuple(map(str, words)), colours, bool(rng.random() < 0.22), seed)


def vase_name(seed: int) -> str:
    """Full name without colours, for example "vase with stripes"."""
    plan = plan_vase(seed)
    return f"vase with {PATTERN_PHRASES[plan.pattern]}" if plan.pattern else "vase"


def vase_tags(seed: int) -> tuple[str, ...]:
    """Words a caption may use: "patterned" and "refined" for painted ones, "handles"."""
    plan = plan_vase(seed)
    tags = ["procedural"]
    if plan.pattern:
        tags.append("patterned")
    if plan.pattern in ("ornaments", "flowers", "diamonds"):
        tags.append("refined")
    if plan.has_handles:
        tags.append("handles")
    return tuple(tags)


def make_vase(seed: int) -> RenderableMesh:
    """Build one vase as a closed, outward-facing mesh about 1 unit tall standing on y = 0."""
    plan = plan_vase(seed)
    rng = np.random.default_rng([seed, 78])
    profile, num_outer = _profile(rng)
    vertices, faces, corner_uv, face_material = _revolve(profile, num_outer)
    if plan.has_handles:
        for side in (-1.0, 1.0):
            tube_vertices, tube_faces = _handle(profile[:num_outer], side, rng_seed=seed)
            faces = np.concatenate([faces, tube_faces + len(vertices)])
            vertices = np.concatenate([vertices, tube_vertices])
            corner_uv = np.concatenate([corner_uv, np.zeros((len(tube_faces), 3, 2), np.float32)])
            face_material = np.concatenate([face_material, np.full(len(tube_faces), 2)])
    ground = np.append(plan.colours[0], 1).astype(np.float32)
    accent = np.append(plan.colours[-1], 1).astype(np.float32)
    paint = np.ones((TEXTURE_SIZE, TEXTURE_SIZE, 4), dtype=np.float32)
    paint[..., :3] = _painted(plan, rng)
    white = np.ones(4, dtype=np.float32)
    inner = np.append(plan.colours[0] * 0.6, 1).astype(np.float32)
    return RenderableMesh(
        vertices=vertices.astype(np.float32),
        faces=faces,
        corner_normals=_smooth_normals(vertices, faces),
        corner_uv=corner_uv.astype(np.float32),
        corner_colour=None,
        face_material=face_material.astype(np.int64),
        materials=[
            Material(white, paint, "paint"),
            Material(inner, None, "inside"),
            Material(accent if plan.pattern and seed % 2 else ground, None, "handle"),
        ],
    )


# ---------------------------------------------------------------- shape


def _profile(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Closed half-section [P, 2] (radius, height): middle of the base, up the outside, down the inside.

    Returns the points and how many belong to the outside.
    """
    from scipy.interpolate import PchipInterpolator

    foot, belly, neck, lip = (
        rng.uniform(0.12, 0.26),
        rng.uniform(0.22, 0.45),
        rng.uniform(0.07, 0.22),
        rng.uniform(0.1, 0.28),
    )
    belly_height, neck_height = rng.uniform(0.25, 0.6), rng.uniform(0.72, 0.88)
    if rng.random() < 0.25:  # a straight or conical form without a neck
        neck = 0.5 * (belly + lip)
    heights = [0.0, belly_height * 0.45, belly_height, neck_height, 1.0]
    radii = [foot, 0.5 * (foot + belly) * rng.uniform(0.9, 1.15), belly, neck, lip]
    y = np.linspace(0, 1, NUM_PROFILE_POINTS)
    outer = np.stack([PchipInterpolator(heights, radii)(y), y], axis=1)
    wall = 0.025
    inner_y = np.linspace(1, 0.06, NUM_PROFILE_POINTS // 2)
    inner_radius = np.maximum(np.interp(inner_y, y, outer[:, 0]) - wall, 0.01)
    inner = np.stack([inner_radius, inner_y], axis=1)
    points = np.concatenate([[[0.0, 0.0]], outer, inner, [[0.0, 0.06]]])
    return points, NUM_PROFILE_POINTS + 1


def _revolve(profile: np.ndarray, num_outer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The lathe: vertices [V, 3], outward faces [F, 3], corner uv [F, 3, 2], material (0 outside)."""
    angle = np.linspace(0, 2 * np.pi, NUM_SIDES, endpoint=False)
    ring = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    rings = profile[1:-1]
    body = np.stack(
        [
            rings[:, None, 0] * ring[None, :, 0],
            np.broadcast_to(rings[:, None, 1], (len(rings), NUM_SIDES)),
            rings[:, None, 0] * ring[None, :, 1],
        ],
        axis=-1,
    ).reshape(-1, 3)
    vertices = np.concatenate([body, [[0, profile[0, 1], 0]], [[0, profile[-1, 1], 0]]])
    bottom, top = len(body), len(body) + 1
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(rings[: num_outer - 1], axis=0), axis=1))])
    v_of_ring = np.concatenate([1 - length / length[-1], np.zeros(len(rings) - len(length))])
    faces: list[tuple[int, int, int]] = []
    uv: list[list[tuple[float, float]]] = []
    material: list[int] = []
    for r in range(len(rings) - 1):
        is_inner = int(r >= num_outer - 2)
        for s in range(NUM_SIDES):
            a, b = r * NUM_SIDES + s, r * NUM_SIDES + (s + 1) % NUM_SIDES
            c, d = a + NUM_SIDES, b + NUM_SIDES
            u0, u1, v0, v1 = s / NUM_SIDES, (s + 1) / NUM_SIDES, v_of_ring[r], v_of_ring[r + 1]
            faces += [(a, b, d), (a, d, c)]
            uv += [[(u0, v0), (u1, v0), (u1, v1)], [(u0, v0), (u1, v1), (u0, v1)]]
            material += [is_inner, is_inner]
    last = (len(rings) - 1) * NUM_SIDES
    for s in range(NUM_SIDES):
        following = (s + 1) % NUM_SIDES
        faces += [(bottom, following, s), (top, last + s, last + following)]
        uv += [[(0.0, 0.999)] * 3, [(0.0, 0.0)] * 3]
        material += [0, 1]
    return vertices, np.array(faces, np.int64), np.array(uv, np.float32), np.array(material)


def _handle(outer: np.ndarray, side: float, *, rng_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A closed tube bowed outwards from the shoulder to the neck, at +X or -X."""
    rng = np.random.default_rng([rng_seed, 79])
    low, high, bow = rng.uniform(0.4, 0.55), rng.uniform(0.75, 0.9), rng.uniform(0.1, 0.2)
    t = np.linspace(0, 1, 14)
    radius_at = np.interp([low, high], outer[:, 1], outer[:, 0]) - 0.015
    path_x = radius_at[0] * (1 - t) + radius_at[1] * t + bow * np.sin(np.pi * t)
    path_y = low * (1 - t) + high * t
    tangent = np.stack([np.gradient(path_x), np.gradient(path_y)], axis=1)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.stack([tangent[:, 1], -tangent[:, 0]], axis=1)
    around = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    thickness = 0.024
    x = path_x[:, None] + thickness * np.cos(around)[None] * across[:, :1]
    y = path_y[:, None] + thickness * np.cos(around)[None] * across[:, 1:]
    z = np.broadcast_to(thickness * np.sin(around), x.shape)
    vertices = np.stack([side * x, y, z], axis=-1).reshape(-1, 3)
    vertices = np.concatenate(
        [vertices, [[side * path_x[0], path_y[0], 0], [side * path_x[-1], path_y[-1], 0]]]
    )
    faces = []
    for r in range(len(t) - 1):
        for s in range(8):
            a, b = r * 8 + s, r * 8 + (s + 1) % 8
            faces += [(a, b, b + 8), (a, b + 8, a + 8)]
    start, end, last = len(vertices) - 2, len(vertices) - 1, (len(t) - 1) * 8
    for s in range(8):
        faces += [(start, (s + 1) % 8, s), (end, last + s, last + (s + 1) % 8)]
    array = np.array(faces, np.int64)
    corners = vertices[array]
    volume = np.einsum("fc,fc->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum()
    return vertices, array if volume > 0 else array[:, ::-1]


def _smooth_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area-weighted vertex normals per corner [F, 3, 3], flat where a face turns away from its vertices."""
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(total, faces[:, k], cross)
    smooth = total[faces]
    smooth /= np.maximum(np.linalg.norm(smooth, axis=-1, keepdims=True), 1e-12)
    flat = cross / np.maximum(np.linalg.norm(cross, axis=-1, keepdims=True), 1e-12)
    agrees = np.einsum("fkc,fc->fk", smooth, flat) > 0.7
    return np.where(agrees[..., None], smooth, flat[:, None]).astype(np.float32)


# ---------------------------------------------------------------- paint


def _painted(plan: VasePlan, rng: np.random.Generator) -> np.ndarray:
    """Texture [T, T, 3]; u runs around the vase, v from the lip (0) to the foot (1)."""
    v, u = np.meshgrid(*[(np.arange(TEXTURE_SIZE) + 0.5) / TEXTURE_SIZE] * 2, indexing="ij")
    image = np.broadcast_to(plan.colours[0], (TEXTURE_SIZE, TEXTURE_SIZE, 3)).copy()
    if not plan.pattern:
        return image
    if plan.pattern == "ornaments":
        return _ornaments(plan, u, v, image, rng)
    mask = _pattern_mask(plan.pattern, u, v, rng)
    image[mask] = plan.colours[1]
    if len(plan.colours) > 2:  # rims in the third colour
        width = rng.uniform(0.02, 0.06)
        image[(v < width) | (v > 1 - width)] = plan.colours[2]
    return image


def _ornaments(
    plan: VasePlan, u: np.ndarray, v: np.ndarray, image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Several friezes of different patterns between narrow lines."""
    edges = np.sort(rng.uniform(0.08, 0.92, size=int(rng.integers(3, 5))))
    edges = np.concatenate([[0.06], edges, [0.95]])
    kinds = [kind for kind in PATTERN_PHRASES if kind not in ("ornaments", "bands")]
    for index, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = (v >= low) & (v < high)
        local = (v - low) / max(high - low, 1e-3)
        mask = _pattern_mask(str(rng.choice(kinds)), u, local, rng, rows=1) & inside
        image[mask] = plan.colours[1 + index % (len(plan.colours) - 1)]
        image[np.abs(v - high) < 0.008] = plan.colours[-1]
    return image


def _pattern_mask(
    kind: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator, *, rows: int | None = None
) -> np.ndarray:
    """Boolean mask of the second colour for one pattern."""
    around = int(rng.integers(6, 13))
    along = rows or int(rng.integers(3, 8))
    cell_u, cell_v = (u * around) % 1 - 0.5, (v * along) % 1 - 0.5
    patterns: dict[str, Callable[[], np.ndarray]] = {
        "bands": lambda: np.abs(cell_v) < 0.22,
        "stripes": lambda: np.abs(cell_u) < 0.24,
        "checks": lambda: (
            (np.floor(u * 2 * (around // 2)) + np.floor(v * along * (2 if rows else 1))) % 2 == 0
        ),
        "dots": lambda: cell_u**2 + (cell_v * around / along * 0.5) ** 2 < 0.07,
        "zigzag": lambda: np.abs(cell_v - (np.abs(cell_u) * 2 - 0.5) * 0.5) < 0.16,
        "waves": lambda: np.abs(cell_v - 0.25 * np.sin(2 * np.pi * u * around)) < 0.15,
        "diamonds": lambda: np.abs(cell_u) + np.abs(cell_v) < 0.36,
        "flowers": lambda: _petals(cell_u, cell_v),
    }
    return patterns[kind]()


def _petals(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rosette with six petals around an open centre."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    return (radius < 0.2 + 0.18 * np.abs(np.cos(3 * angle))) & (radius > 0.08)
