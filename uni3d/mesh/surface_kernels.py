"""What the rasteriser differentiates, each part one Triton kernel forwards and one backwards.

Twins of the chains of torch operations in `edge_functions`, `rasteriser.interpolate` and `antialias`, for
float32 on a CUDA device: an image is some ten launches instead of hundreds, each of which the host has to
issue. One lane per pixel walks the channels. Gradients reach vertices and attributes by atomic additions,
whose order varies: the last bits do too. The host never waits for the device. Legend: B cameras, C channels,
V vertices, F faces, R rows of a table, E edges, H W pixels.
"""

# Triton annotates what a kernel sees, not what its caller passes, and comes with CUDA builds of torch only.
# pyright: reportArgumentType=false, reportMissingImports=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uni3d.mesh.antialias import MeshEdges
from uni3d.mesh.rasteriser_torch import NOTHING
from uni3d.mesh.rasteriser_triton import LANES, OPTIONS, edge_normal, load_vertex, silhouette_keys

_NOTHING = tl.constexpr(NOTHING)


def hit_points(projected: Tensor, faces: Tensor, face: Tensor) -> tuple[Tensor, Tensor]:
    """As `edge_functions.hit_points`, float32."""
    return _HitPoints.apply(projected, faces, face)


def interpolated(attributes: Tensor, faces: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
    """Attributes float32 [V, C] or [F, 3, C] at what pixels see, [B, C, H, W]; as `interpolate`."""
    return _Interpolated.apply(attributes, faces, face, barycentric)


def blend_silhouettes(
    image: Tensor, projected: Tensor, edges: MeshEdges, face: Tensor, view_depth: Tensor
) -> Tensor:
    """As `antialias.blend_silhouettes`, float32; `view_depth` counts only where there is a face."""
    keys = silhouette_keys(projected.detach(), edges.ends, edges.opposite, face, view_depth)
    return _Blend.apply(image, projected, edges.ends, keys)


def _grid(num_pixels: int) -> tuple[int]:
    return (triton.cdiv(num_pixels, LANES),)


# ---- barycentric coordinates and depth


class _HitPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, faces: Tensor, face: Tensor) -> tuple[Tensor, Tensor]:
        projected, faces, face = projected.contiguous(), faces.contiguous(), face.contiguous()
        barycentric = projected.new_empty(*face.shape, 3)
        depth = projected.new_empty(face.shape)
        _, height, width = face.shape
        _hit_forward[_grid(face.numel())](
            projected, faces, face, projected.shape[1], face.numel(), height, width, barycentric, depth,
            LANES=LANES, **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(projected, faces, face)
        return barycentric, depth

    @staticmethod
    def backward(
        ctx: Any, barycentric_gradient: Tensor, depth_gradient: Tensor
    ) -> tuple[Tensor | None, None, None]:
        projected, faces, face = ctx.saved_tensors
        gradient = torch.zeros_like(projected)
        _, height, width = face.shape
        _hit_backward[_grid(face.numel())](
            projected, faces, face, projected.shape[1], face.numel(), height, width,
            barycentric_gradient.contiguous(), depth_gradient.contiguous(), gradient, LANES=LANES, **OPTIONS,
        )  # fmt: skip
        return gradient, None, None


@triton.jit
def _pixel(num_pixels, height, width, LANES: tl.constexpr):
    """Index of each lane's pixel, whether there is one, its camera, and its centre (x, y)."""
    pixel = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = pixel % (height * width)
    x, y = (inside % width).to(tl.float32) + 0.5, (inside // width).to(tl.float32) + 0.5
    return pixel, pixel < num_pixels, pixel // (height * width), x, y


@triton.jit
def _face_corners(projected, first, second, third, camera, num_vertices, is_hit):
    ax, ay, aw = load_vertex(projected, camera, first, num_vertices, is_hit)
    bx, by, bw = load_vertex(projected, camera, second, num_vertices, is_hit)
    cx, cy, cw = load_vertex(projected, camera, third, num_vertices, is_hit)
    return ax, ay, aw, bx, by, bw, cx, cy, cw


@triton.jit
def _rows(faces, face, is_hit):
    """The three entries of `faces` for each face."""
    place = faces + face.to(tl.int64) * 3
    first = tl.load(place, mask=is_hit, other=0)
    second = tl.load(place + 1, mask=is_hit, other=0)
    return first, second, tl.load(place + 2, mask=is_hit, other=0)


@triton.jit
def _shares(ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, is_hit):
    """Barycentric coordinates at the pixel and the sum of its edge functions, 1 where nothing is seen."""
    nx, ny, nw = edge_normal(bx, by, bw, cx, cy, cw)
    first = nx * x + ny * y + nw
    nx, ny, nw = edge_normal(cx, cy, cw, ax, ay, aw)
    second = nx * x + ny * y + nw
    nx, ny, nw = edge_normal(ax, ay, aw, bx, by, bw)
    third = nx * x + ny * y + nw
    total = tl.where(is_hit, first + second + third, 1.0)
    return first / total, second / total, third / total, total


# Counts change whenever the mesh does, which is no reason to compile again: hence do_not_specialize.
@triton.jit(do_not_specialize=["num_vertices"])
def _hit_forward(
    projected, faces, face, num_vertices, num_pixels, height, width, barycentric, depth, LANES: tl.constexpr
):  # fmt: skip
    pixel, is_pixel, camera, x, y = _pixel(num_pixels, height, width, LANES)
    seen = tl.load(face + pixel, mask=is_pixel, other=-1)
    is_hit = seen >= 0
    first, second, third = _rows(faces, seen, is_hit)
    ax, ay, aw, bx, by, bw, cx, cy, cw = _face_corners(
        projected, first, second, third, camera, num_vertices, is_hit
    )  # fmt: skip
    p, q, r, _ = _shares(ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, is_hit)
    tl.store(barycentric + pixel * 3, p, mask=is_pixel)
    tl.store(barycentric + pixel * 3 + 1, q, mask=is_pixel)
    tl.store(barycentric + pixel * 3 + 2, r, mask=is_pixel)
    tl.store(depth + pixel, p * aw + q * bw + r * cw, mask=is_pixel)


@triton.jit
def _add_vertex(gradient, camera, vertex, num_vertices, x, y, dx, dy, dw, mask):
    """Add the gradient of a vertex given in pixels that count from the pixel centre (x, y)."""
    place = gradient + (camera * num_vertices + vertex) * 3
    tl.atomic_add(place, dx, mask=mask, sem="relaxed")
    tl.atomic_add(place + 1, dy, mask=mask, sem="relaxed")
    tl.atomic_add(place + 2, dw - x * dx - y * dy, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_vertices"])
def _hit_backward(
    projected, faces, face, num_vertices, num_pixels, height, width, barycentric_gradient, depth_gradient,
    gradient, LANES: tl.constexpr,
):  # fmt: skip
    pixel, is_pixel, camera, x, y = _pixel(num_pixels, height, width, LANES)
    seen = tl.load(face + pixel, mask=is_pixel, other=-1)
    is_hit = seen >= 0
    first, second, third = _rows(faces, seen, is_hit)
    ax, ay, aw, bx, by, bw, cx, cy, cw = _face_corners(
        projected, first, second, third, camera, num_vertices, is_hit
    )  # fmt: skip
    p, q, r, total = _shares(ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, is_hit)
    by_depth = tl.load(depth_gradient + pixel, mask=is_hit, other=0.0)
    by_p = tl.load(barycentric_gradient + pixel * 3, mask=is_hit, other=0.0) + by_depth * aw
    by_q = tl.load(barycentric_gradient + pixel * 3 + 1, mask=is_hit, other=0.0) + by_depth * bw
    by_r = tl.load(barycentric_gradient + pixel * 3 + 2, mask=is_hit, other=0.0) + by_depth * cw
    mean = p * by_p + q * by_q + r * by_r
    # Seen from the pixel centre an edge function is 2 (x1 y2 - y1 x2), free of the third coordinate.
    u, v, w = 2 * (by_p - mean) / total, 2 * (by_q - mean) / total, 2 * (by_r - mean) / total
    ax, ay, bx, by, cx, cy = ax - x * aw, ay - y * aw, bx - x * bw, by - y * bw, cx - x * cw, cy - y * cw
    _add_vertex(
        gradient, camera, first, num_vertices, x, y, w * by - v * cy, v * cx - w * bx, by_depth * p, is_hit
    )
    _add_vertex(
        gradient, camera, second, num_vertices, x, y, u * cy - w * ay, w * ax - u * cx, by_depth * q, is_hit
    )
    _add_vertex(
        gradient, camera, third, num_vertices, x, y, v * ay - u * by, u * bx - v * ax, by_depth * r, is_hit
    )


# ---- attributes


class _Interpolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attributes: Tensor, faces: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        attributes, faces, face = attributes.contiguous(), faces.contiguous(), face.contiguous()
        barycentric = barycentric.contiguous()
        num_cameras, height, width = face.shape
        image = attributes.new_empty(num_cameras, attributes.shape[-1], height, width)
        _interpolate_forward[_grid(face.numel())](
            attributes, faces, face, barycentric, face.numel(), height, width, image.shape[1], image,
            BY_CORNER=attributes.ndim == 3, LANES=LANES, **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(attributes, faces, face, barycentric)
        return image

    @staticmethod
    def backward(ctx: Any, image_gradient: Tensor) -> tuple[Tensor, None, None, Tensor]:
        attributes, faces, face, barycentric = ctx.saved_tensors
        _, height, width = face.shape
        gradient, barycentric_gradient = torch.zeros_like(attributes), torch.empty_like(barycentric)
        _interpolate_backward[_grid(face.numel())](
            attributes, faces, face, barycentric, face.numel(), height, width, attributes.shape[-1],
            image_gradient.contiguous(), gradient, barycentric_gradient,
            BY_CORNER=attributes.ndim == 3, LANES=LANES, **OPTIONS,
        )  # fmt: skip
        return gradient, None, None, barycentric_gradient


@triton.jit
def _attribute_rows(faces, seen, is_hit, BY_CORNER: tl.constexpr):
    if BY_CORNER:
        first = seen.to(tl.int64) * 3
        second, third = first + 1, first + 2
    else:
        first, second, third = _rows(faces, seen, is_hit)
    return first, second, third


@triton.jit
def _weights(barycentric, pixel, is_hit):
    place = barycentric + pixel * 3
    p = tl.load(place, mask=is_hit, other=0.0)
    q = tl.load(place + 1, mask=is_hit, other=0.0)
    return p, q, tl.load(place + 2, mask=is_hit, other=0.0)


@triton.jit(do_not_specialize=["num_channels"])
def _interpolate_forward(
    attributes, faces, face, barycentric, num_pixels, height, width, num_channels, image,
    BY_CORNER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pixel, is_pixel, camera, _x, _y = _pixel(num_pixels, height, width, LANES)
    seen = tl.load(face + pixel, mask=is_pixel, other=-1)
    is_hit = seen >= 0
    first, second, third = _attribute_rows(faces, seen, is_hit, BY_CORNER)
    p, q, r = _weights(barycentric, pixel, is_hit)
    # Channel c of camera b starts at (b C + c) H W.
    place = pixel + camera * (num_channels - 1) * height * width
    for channel in range(0, num_channels):
        a = tl.load(attributes + first * num_channels + channel, mask=is_hit, other=0.0)
        b = tl.load(attributes + second * num_channels + channel, mask=is_hit, other=0.0)
        c = tl.load(attributes + third * num_channels + channel, mask=is_hit, other=0.0)
        tl.store(image + place + channel * height * width, p * a + q * b + r * c, mask=is_pixel)


@triton.jit(do_not_specialize=["num_channels"])
def _interpolate_backward(
    attributes, faces, face, barycentric, num_pixels, height, width, num_channels, image_gradient, gradient,
    barycentric_gradient, BY_CORNER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    pixel, is_pixel, camera, x, _y = _pixel(num_pixels, height, width, LANES)
    seen = tl.load(face + pixel, mask=is_pixel, other=-1)
    is_hit = seen >= 0
    first, second, third = _attribute_rows(faces, seen, is_hit, BY_CORNER)
    p, q, r = _weights(barycentric, pixel, is_hit)
    place = pixel + camera * (num_channels - 1) * height * width
    by_p, by_q, by_r = 0.0 * x, 0.0 * x, 0.0 * x
    for channel in range(0, num_channels):
        by_value = tl.load(image_gradient + place + channel * height * width, mask=is_hit, other=0.0)
        by_p += by_value * tl.load(attributes + first * num_channels + channel, mask=is_hit, other=0.0)
        by_q += by_value * tl.load(attributes + second * num_channels + channel, mask=is_hit, other=0.0)
        by_r += by_value * tl.load(attributes + third * num_channels + channel, mask=is_hit, other=0.0)
        tl.atomic_add(gradient + first * num_channels + channel, by_value * p, mask=is_hit, sem="relaxed")
        tl.atomic_add(gradient + second * num_channels + channel, by_value * q, mask=is_hit, sem="relaxed")
        tl.atomic_add(gradient + third * num_channels + channel, by_value * r, mask=is_hit, sem="relaxed")
    tl.store(barycentric_gradient + pixel * 3, by_p, mask=is_pixel)
    tl.store(barycentric_gradient + pixel * 3 + 1, by_q, mask=is_pixel)
    tl.store(barycentric_gradient + pixel * 3 + 2, by_r, mask=is_pixel)


# ---- silhouettes


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, projected: Tensor, ends: Tensor, keys: Tensor) -> Tensor:
        image, projected = image.contiguous(), projected.contiguous()
        num_cameras, num_channels, height, width = image.shape
        num_pixels = num_cameras * height * width
        blended = torch.empty_like(image)
        _blend_forward[_grid(num_pixels)](
            image, projected, ends, keys, projected.shape[1], num_pixels, height, width, num_channels,
            blended, LANES=LANES, **OPTIONS,
        )  # fmt: skip
        ctx.save_for_backward(image, projected, ends, keys)
        return blended

    @staticmethod
    def backward(ctx: Any, blended_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        image, projected, ends, keys = ctx.saved_tensors
        num_cameras, num_channels, height, width = image.shape
        num_pixels = num_cameras * height * width
        image_gradient, gradient = torch.empty_like(image), torch.zeros_like(projected)
        _blend_backward[_grid(num_pixels)](
            image, projected, ends, keys, projected.shape[1], num_pixels, height, width, num_channels,
            blended_gradient.contiguous(), image_gradient, gradient, LANES=LANES, **OPTIONS,
        )  # fmt: skip
        return image_gradient, gradient, None, None


@triton.jit
def _crossed_edge(projected, ends, keys, pixel, is_pair, camera, num_vertices, IS_COLUMN: tl.constexpr):
    """Whether a silhouette separates the pixel from the next one of its row (or column), and the ends of its
    edge, first the vertices and then the coordinates; x and y swapped in columns."""
    key = tl.load(keys + pixel, mask=is_pair, other=_NOTHING)
    is_crossed = key != _NOTHING
    edge = tl.where(is_crossed, key & 0xFFFFFFFF, 0)
    start = tl.load(ends + edge * 2, mask=is_crossed, other=0)
    end = tl.load(ends + edge * 2 + 1, mask=is_crossed, other=0)
    ax, ay, aw = load_vertex(projected, camera, start, num_vertices, is_crossed)
    bx, by, bw = load_vertex(projected, camera, end, num_vertices, is_crossed)
    if IS_COLUMN:
        ax, ay, bx, by = ay, ax, by, bx
    return is_crossed, start, end, ax, ay, aw, bx, by, bw


@triton.jit
def _beyond(is_crossed, ax, ay, aw, bx, by, bw, x, y):
    """How far past halfway to the next pixel the edge crosses, in pixels; 0 where there is none."""
    nx, ny, nw = edge_normal(ax, ay, aw, bx, by, bw)
    crossing = -(ny * y + nw) / tl.where(is_crossed, nx, 1.0) - x
    return tl.where(is_crossed, crossing - 0.5, 0.0)


@triton.jit
def _pair(projected, ends, keys, pixel, is_pair, camera, x, y, num_vertices, IS_COLUMN: tl.constexpr):
    """`_beyond` of the pair that begins at a pixel with centre (x, y); swapped in columns."""
    is_crossed, _start, _end, ax, ay, aw, bx, by, bw = _crossed_edge(
        projected, ends, keys, pixel, is_pair, camera, num_vertices, IS_COLUMN
    )
    return _beyond(is_crossed, ax, ay, aw, bx, by, bw, x, y)


@triton.jit
def _pairs(projected, ends, keys, pixel, is_pixel, camera, x, y, num_vertices, num_pixels, width):
    """`_beyond` of the four pairs of a pixel: with the one left of it, right, above and below."""
    columns = keys + num_pixels
    left = _pair(
        projected, ends, keys, pixel - 1, is_pixel & (x > 1), camera, x - 1, y, num_vertices, False
    )  # fmt: skip
    right = _pair(projected, ends, keys, pixel, is_pixel, camera, x, y, num_vertices, False)
    above = _pair(
        projected, ends, columns, pixel - width, is_pixel & (y > 1), camera, y - 1, x, num_vertices, True
    )  # fmt: skip
    below = _pair(projected, ends, columns, pixel, is_pixel, camera, y, x, num_vertices, True)
    return left, right, above, below


@triton.jit(do_not_specialize=["num_vertices", "num_channels"])
def _blend_forward(
    image, projected, ends, keys, num_vertices, num_pixels, height, width, num_channels, blended,
    LANES: tl.constexpr,
):  # fmt: skip
    pixel, is_pixel, camera, x, y = _pixel(num_pixels, height, width, LANES)
    left, right, above, below = _pairs(
        projected, ends, keys, pixel, is_pixel, camera, x, y, num_vertices, num_pixels, width
    )  # fmt: skip
    # A crossing past halfway changes the second pixel of its pair, one before it the first.
    left, above = tl.maximum(left, 0.0), tl.maximum(above, 0.0)
    right, below = tl.minimum(right, 0.0), tl.minimum(below, 0.0)
    place = image + pixel + camera * (num_channels - 1) * height * width
    target = blended + pixel + camera * (num_channels - 1) * height * width
    for channel in range(0, num_channels):
        own = tl.load(place + channel * height * width, mask=is_pixel, other=0.0)
        neighbour = place + channel * height * width
        change = left * (tl.load(neighbour - 1, mask=left > 0, other=0.0) - own)
        change += right * (own - tl.load(neighbour + 1, mask=right < 0, other=0.0))
        change += above * (tl.load(neighbour - width, mask=above > 0, other=0.0) - own)
        change += below * (own - tl.load(neighbour + width, mask=below < 0, other=0.0))
        tl.store(target + channel * height * width, own + change, mask=is_pixel)


@triton.jit
def _add_edge(
    gradient, projected, ends, keys, pixel, is_pixel, by_beyond, camera, x, y, num_vertices,
    IS_COLUMN: tl.constexpr,
):  # fmt: skip
    """Add what moves the crossing of the pair that begins at the pixel to the gradient of its edge's ends."""
    is_crossed, start, end, ax, ay, aw, bx, by, bw = _crossed_edge(
        projected, ends, keys, pixel, is_pixel, camera, num_vertices, IS_COLUMN
    )
    # Seen from the pixel centre the edge's line meets the row at (ay bx - ax by) / (ay bw - aw by).
    ax, ay, bx, by = ax - x * aw, ay - y * aw, bx - x * bw, by - y * bw
    area = tl.where(is_crossed, ay * bw - aw * by, 1.0)
    crossing, share = (ay * bx - ax * by) / area, by_beyond / area
    start_x, start_y, start_w = -share * by, share * (bx - crossing * bw), share * crossing * by
    end_x, end_y, end_w = share * ay, share * (crossing * aw - ax), -share * crossing * ay
    if IS_COLUMN:
        x, y = y, x
        start_x, start_y, end_x, end_y = start_y, start_x, end_y, end_x
    _add_vertex(gradient, camera, start, num_vertices, x, y, start_x, start_y, start_w, is_crossed)
    _add_vertex(gradient, camera, end, num_vertices, x, y, end_x, end_y, end_w, is_crossed)


@triton.jit(do_not_specialize=["num_vertices", "num_channels"])
def _blend_backward(
    image, projected, ends, keys, num_vertices, num_pixels, height, width, num_channels, blended_gradient,
    image_gradient, gradient, LANES: tl.constexpr,
):  # fmt: skip
    pixel, is_pixel, camera, x, y = _pixel(num_pixels, height, width, LANES)
    left, right, above, below = _pairs(
        projected, ends, keys, pixel, is_pixel, camera, x, y, num_vertices, num_pixels, width
    )  # fmt: skip
    by_right, by_below = 0.0 * x, 0.0 * x
    place = pixel + camera * (num_channels - 1) * height * width
    # The pixels that the pairs change.
    to_left, to_right = tl.where(left > 0, 0, -1), tl.where(right > 0, 1, 0)
    to_above, to_below = tl.where(above > 0, 0, -width), tl.where(below > 0, width, 0)
    for channel in range(0, num_channels):
        at = place + channel * height * width
        own = tl.load(image + at, mask=is_pixel, other=0.0)
        change = blended_gradient + at
        total = tl.load(change, mask=is_pixel, other=0.0)
        total -= left * tl.load(change + to_left, mask=left != 0, other=0.0)
        total -= above * tl.load(change + to_above, mask=above != 0, other=0.0)
        of_right = tl.load(change + to_right, mask=right != 0, other=0.0)
        of_below = tl.load(change + to_below, mask=below != 0, other=0.0)
        total += right * of_right + below * of_below
        tl.store(image_gradient + at, total, mask=is_pixel)
        by_right += of_right * (own - tl.load(image + at + 1, mask=right != 0, other=0.0))
        by_below += of_below * (own - tl.load(image + at + width, mask=below != 0, other=0.0))
    _add_edge(gradient, projected, ends, keys, pixel, is_pixel, by_right, camera, x, y, num_vertices, False)
    columns = keys + num_pixels
    _add_edge(
        gradient, projected, ends, columns, pixel, is_pixel, by_below, camera, y, x, num_vertices, True
    )  # fmt: skip
