"""The passes of the rasteriser that need no gradient as Triton kernels: twins of `rasteriser_torch`.

One lane per triangle (or edge) walks its bounding box (or the rows it crosses); the nearest face of a pixel
wins by an atomic minimum of a 64-bit key, which does not depend on the order. Triangles of more than
SMALL_BOX pixels would hold up their neighbours: they go into a queue on the device, which a second kernel
works off by many lanes per triangle. The host never waits for the device. Legend: B cameras, V vertices, F
faces, E edges, H W pixels.
"""

# Triton annotates what a kernel sees, not what its caller passes, and comes with CUDA builds of torch only.
# pyright: reportArgumentType=false, reportMissingImports=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from uni3d.errors import UsageError
from uni3d.mesh.edge_functions import NEAR_DEPTH
from uni3d.mesh.rasteriser_torch import BOX_MARGIN, MIN_AREA, NOTHING, unpack_keys

LANES = 128
SMALL_BOX = 64  # pixels
TILE = 256  # pixels of a large triangle tested at once
QUEUE_READERS = (64, 8)  # large triangles in work at a time, and tiles of each

_NEAR = tl.constexpr(NEAR_DEPTH)
_MARGIN = tl.constexpr(BOX_MARGIN)
_MIN_AREA = tl.constexpr(MIN_AREA)
_IS_INTERPRETED = knobs.runtime.interpret
# Fused multiply-adds could round an edge differently in its two triangles and leave a gap between them.
OPTIONS = {"enable_fp_fusion": False}


def visible_faces(projected: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """As `rasteriser_torch.visible_faces`."""
    _check_device(projected)
    num_cameras, num_vertices = projected.shape[:2]
    num_items = num_cameras * faces.shape[0]
    keys = torch.full((num_cameras * height * width,), NOTHING, device=projected.device)
    queue = torch.empty(num_items, dtype=torch.int32, device=projected.device)
    queue_length = torch.zeros(1, dtype=torch.int32, device=projected.device)
    mesh = (projected.contiguous(), faces.contiguous(), num_vertices, faces.shape[0])
    _small_faces[(triton.cdiv(num_items, LANES),)](
        *mesh, num_items, height, width, keys, queue, queue_length, LANES=LANES, LIMIT=SMALL_BOX, **OPTIONS
    )
    _large_faces[QUEUE_READERS](
        *mesh, height, width, keys, queue, queue_length, TILE=TILE, READERS=QUEUE_READERS[0],
        STRIDE=QUEUE_READERS[1], **OPTIONS,
    )  # fmt: skip
    return unpack_keys(keys).view(num_cameras, height, width)


def crossing_edges(
    projected: Tensor, ends: Tensor, opposite: Tensor, face: Tensor, depth: Tensor, *, wins_ties: bool
) -> Tensor:
    """As `rasteriser_torch.crossing_edges`."""
    num_cameras, height, width = face.shape
    keys = torch.full((num_cameras, height, width), NOTHING, device=projected.device)
    _mark_silhouettes(projected, ends, opposite, face, depth, keys, is_column=False, wins_ties=wins_ties)
    return unpack_keys(keys)


def silhouette_keys(projected: Tensor, ends: Tensor, opposite: Tensor, face: Tensor, depth: Tensor) -> Tensor:
    """The silhouettes between each pixel and the one right of it and, second, the one below: int64 keys
    [2, B, H, W] whose low 32 bits are an edge; NOTHING for none.

    Edges nearer to vertical (or at 45 degrees) count in rows, the others in columns. Arguments as those of
    `crossing_edges`; `depth` counts only where there is a face.
    """
    keys = torch.full((2, *face.shape), NOTHING, device=projected.device)
    for is_column, part in enumerate(keys):
        _mark_silhouettes(
            projected, ends, opposite, face, depth, part, is_column=bool(is_column), wins_ties=not is_column
        )
    return keys


def _mark_silhouettes(
    projected: Tensor,
    ends: Tensor,
    opposite: Tensor,
    face: Tensor,
    depth: Tensor,
    keys: Tensor,
    *,
    is_column: bool,
    wins_ties: bool,
) -> None:
    """Enter edges into `keys` [B, H, W], in rows or in columns."""
    _check_device(projected)
    num_cameras, height, width = face.shape
    num_items = num_cameras * ends.shape[0]
    # Columns are the rows of the transposed picture.
    lines, length, line_step, step = (width, height, 1, width) if is_column else (height, width, width, 1)
    _crossing_edges[(triton.cdiv(num_items, LANES),)](
        projected.contiguous(), ends.contiguous(), opposite.contiguous(), projected.shape[1], ends.shape[0],
        num_items, face.contiguous(), depth.contiguous(), lines, length, line_step, step, keys,
        LANES=LANES, IS_COLUMN=is_column, WINS_TIES=wins_ties, **OPTIONS,
    )  # fmt: skip


def _check_device(projected: Tensor) -> None:
    if projected.device.type != "cuda" and not _IS_INTERPRETED:
        raise UsageError(
            f"the rasteriser triton needs a mesh on a CUDA device, got {projected.device}; use torch"
        )


@triton.jit
def edge_normal(ax, ay, aw, bx, by, bw):
    """As `edge_functions.edge_normals`."""
    sx, sy, sw = ax + bx, ay + by, aw + bw
    dx, dy, dw = bx - ax, by - ay, bw - aw
    return sy * dw - sw * dy, sw * dx - sx * dw, sx * dy - sy * dx


@triton.jit
def load_vertex(projected, camera, vertex, num_vertices, mask):
    place = projected + (camera.to(tl.int64) * num_vertices + vertex) * 3
    x = tl.load(place, mask=mask, other=0.0)
    y = tl.load(place + 1, mask=mask, other=0.0)
    return x, y, tl.load(place + 2, mask=mask, other=0.0)


@triton.jit
def _corners(projected, faces, num_vertices, num_faces, item, mask):
    """The nine coordinates of face `item % num_faces` as camera `item // num_faces` sees it."""
    camera, face = item // num_faces, (item % num_faces).to(tl.int64)
    first = tl.load(faces + face * 3, mask=mask, other=0)
    second = tl.load(faces + face * 3 + 1, mask=mask, other=0)
    third = tl.load(faces + face * 3 + 2, mask=mask, other=0)
    ax, ay, aw = load_vertex(projected, camera, first, num_vertices, mask)
    bx, by, bw = load_vertex(projected, camera, second, num_vertices, mask)
    cx, cy, cw = load_vertex(projected, camera, third, num_vertices, mask)
    return ax, ay, aw, bx, by, bw, cx, cy, cw


@triton.jit
def _is_finite(x, y, w):
    return (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf")) & (tl.abs(w) < float("inf"))


@triton.jit
def _pixel_range(a, b, c, size):
    """First and past-the-last pixel along one axis that may lie between three coordinates."""
    low = tl.ceil(tl.minimum(tl.minimum(a, b), c) - 0.5 - _MARGIN)
    high = tl.floor(tl.maximum(tl.maximum(a, b), c) - 0.5 + _MARGIN) + 1.0
    return tl.minimum(tl.maximum(low, 0.0), size), tl.minimum(tl.maximum(high, 0.0), size)


@triton.jit
def _bounding_box(ax, ay, aw, bx, by, bw, cx, cy, cw, height, width):
    """As `rasteriser_torch._bounding_boxes`: first column, first row, columns, rows."""
    is_before = (aw > _NEAR) & (bw > _NEAR) & (cw > _NEAR)
    is_behind = (aw <= _NEAR) & (bw <= _NEAR) & (cw <= _NEAR)
    px, py, qx, qy, rx, ry = ax / aw, ay / aw, bx / bw, by / bw, cx / cw, cy / cw
    area = tl.abs((qx - px) * (ry - py) - (qy - py) * (rx - px)) / 2
    left, right = _pixel_range(px, qx, rx, width * 1.0)
    top, bottom = _pixel_range(py, qy, ry, height * 1.0)
    is_finite = _is_finite(ax, ay, aw) & _is_finite(bx, by, bw) & _is_finite(cx, cy, cw)
    is_drawn = is_finite & (is_before == 0) & (is_behind == 0) | is_finite & is_before & (area >= _MIN_AREA)
    left, top = tl.where(is_drawn & is_before, left, 0.0), tl.where(is_drawn & is_before, top, 0.0)
    right, bottom = tl.where(is_before, right, width * 1.0), tl.where(is_before, bottom, height * 1.0)
    columns, rows = tl.where(is_drawn, right - left, 0.0), tl.where(is_drawn, bottom - top, 0.0)
    return left.to(tl.int32), top.to(tl.int32), columns.to(tl.int32), rows.to(tl.int32)


@triton.jit
def _mark_pixels(
    ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, is_candidate, camera, face, height, width, keys
):  # fmt: skip
    """Enter the face into the keys of those of the candidate pixels (column x, row y) that it covers."""
    px, py = x.to(tl.float32) + 0.5, y.to(tl.float32) + 0.5
    nx, ny, nw = edge_normal(bx, by, bw, cx, cy, cw)
    first = nx * px + ny * py + nw
    nx, ny, nw = edge_normal(cx, cy, cw, ax, ay, aw)
    second = nx * px + ny * py + nw
    nx, ny, nw = edge_normal(ax, ay, aw, bx, by, bw)
    third = nx * px + ny * py + nw
    total = first + second + third
    is_inside = (first >= 0) & (second >= 0) & (third >= 0) | (first <= 0) & (second <= 0) & (third <= 0)
    is_inside = is_candidate & is_inside & (total != 0)
    depth = (first * aw + second * bw + third * cw) / tl.where(is_inside, total, 1.0)
    pixel = (camera.to(tl.int64) * height + y) * width + x
    key = (depth.to(tl.int32, bitcast=True).to(tl.int64) << 32) | face.to(tl.int64)
    tl.atomic_min(keys + pixel, key, mask=is_inside & (depth > _NEAR), sem="relaxed")


# Counts change whenever the mesh does, which is no reason to compile again: hence do_not_specialize.
@triton.jit(do_not_specialize=["num_vertices", "num_faces", "num_items"])
def _small_faces(
    projected, faces, num_vertices, num_faces, num_items, height, width, keys, queue, queue_length,
    LANES: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * LANES + tl.arange(0, LANES)
    is_item = item < num_items
    ax, ay, aw, bx, by, bw, cx, cy, cw = _corners(
        projected, faces, num_vertices, num_faces, item, is_item
    )  # fmt: skip
    left, top, columns, rows = _bounding_box(ax, ay, aw, bx, by, bw, cx, cy, cw, height, width)
    count = tl.where(is_item, columns * rows, 0)
    is_large = count > LIMIT
    slot = tl.atomic_add(queue_length + tl.zeros_like(item), 1, mask=is_large, sem="relaxed")
    tl.store(queue + slot, item, mask=is_large)
    count = tl.where(is_large, 0, count)
    columns = tl.maximum(columns, 1)
    for place in range(0, tl.max(count, axis=0)):
        x, y = left + place % columns, top + place // columns
        _mark_pixels(
            ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, place < count, item // num_faces, item % num_faces,
            height, width, keys,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_vertices", "num_faces"])
def _large_faces(
    projected, faces, num_vertices, num_faces, height, width, keys, queue, queue_length,
    TILE: tl.constexpr, READERS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    length = tl.load(queue_length)
    for entry in range(tl.program_id(0), length, READERS):
        item = tl.load(queue + entry)
        ax, ay, aw, bx, by, bw, cx, cy, cw = _corners(
            projected, faces, num_vertices, num_faces, item, True
        )  # fmt: skip
        left, top, columns, rows = _bounding_box(ax, ay, aw, bx, by, bw, cx, cy, cw, height, width)
        count = columns * rows
        for tile in range(tl.program_id(1), tl.cdiv(count, TILE), STRIDE):
            place = tile * TILE + tl.arange(0, TILE)
            x, y = left + place % columns, top + place // columns
            _mark_pixels(
                ax, ay, aw, bx, by, bw, cx, cy, cw, x, y, place < count, item // num_faces,
                item % num_faces, height, width, keys,
            )  # fmt: skip


@triton.jit
def _before_near_plane(ay, aw, by, bw):
    """y in pixels of end a of an edge, or of where the edge enters the space before the near plane."""
    share = tl.where(aw < _NEAR, tl.minimum(tl.maximum((aw - _NEAR) / (aw - bw), 0.0), 1.0), 0.0)
    return (ay + share * (by - ay)) / (aw + share * (bw - aw))


@triton.jit(do_not_specialize=["num_vertices", "num_edges", "num_items"])
def _crossing_edges(
    projected, ends, opposite, num_vertices, num_edges, num_items, face, depth, lines, length, line_step,
    step, keys, LANES: tl.constexpr, IS_COLUMN: tl.constexpr, WINS_TIES: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * LANES + tl.arange(0, LANES)
    is_item = item < num_items
    camera, edge = item // num_edges, (item % num_edges).to(tl.int64)
    ax, ay, aw = load_vertex(projected, camera, tl.load(ends + edge * 2), num_vertices, is_item)
    bx, by, bw = load_vertex(projected, camera, tl.load(ends + edge * 2 + 1), num_vertices, is_item)
    px, py, pw = load_vertex(projected, camera, tl.load(opposite + edge * 2), num_vertices, is_item)
    qx, qy, qw = load_vertex(projected, camera, tl.load(opposite + edge * 2 + 1), num_vertices, is_item)
    if IS_COLUMN:
        ax, ay, bx, by, px, py, qx, qy = ay, ax, by, bx, py, px, qy, qx
    nx, ny, nw = edge_normal(ax, ay, aw, bx, by, bw)
    side = nx * (px - ax) + ny * (py - ay) + nw * (pw - aw)
    other_side = nx * (qx - ax) + ny * (qy - ay) + nw * (qw - aw)
    has_positive = (side > 0) | (other_side > 0)
    has_negative = (side < 0) | (other_side < 0)
    if WINS_TIES:
        is_steep = tl.abs(nx) >= tl.abs(ny)
    else:
        is_steep = tl.abs(nx) > tl.abs(ny)
    start, end = _before_near_plane(ay, aw, by, bw), _before_near_plane(by, bw, ay, aw)
    is_seen = ((aw > _NEAR) | (bw > _NEAR)) & _is_finite(start, end, start)
    is_walked = is_item & (has_positive != has_negative) & is_steep & is_seen
    low = tl.minimum(tl.maximum(tl.ceil(tl.minimum(start, end) - 0.5), 0.0), lines * 1.0)
    high = tl.minimum(tl.maximum(tl.ceil(tl.maximum(start, end) - 0.5), 0.0), lines * 1.0)
    first = tl.where(is_walked, low, 0.0).to(tl.int32)
    count = tl.where(is_walked, high - low, 0.0).to(tl.int32)
    nx = tl.where(is_walked, nx, 1.0)
    for place in range(0, tl.max(count, axis=0)):
        row = first + place
        y = row.to(tl.float32) + 0.5
        x = -(ny * y + nw) / nx
        share = (y * aw - ay) / ((by - ay) - y * (bw - aw))
        crossing_depth = aw + tl.minimum(tl.maximum(share, 0.0), 1.0) * (bw - aw)
        column = tl.floor(x - 0.5)
        is_within = (place < count) & (column >= 0) & (column < length - 1)
        column = tl.where(is_within, column, 0.0)
        left = camera.to(tl.int64) * lines * length + row * line_step + column.to(tl.int32) * step
        left_face = tl.load(face + left, mask=is_within, other=-1)
        right_face = tl.load(face + left + step, mask=is_within, other=-1)
        left_depth = tl.load(depth + left, mask=left_face >= 0, other=float("inf"))
        right_depth = tl.load(depth + left + step, mask=right_face >= 0, other=float("inf"))
        left_is_nearer = left_depth < right_depth
        faces_lie_left = (nx < 0) == has_positive
        is_between = (left_face != right_face) & (left_depth != right_depth)
        is_visible = crossing_depth < tl.maximum(left_depth, right_depth)
        is_hit = is_within & is_between & is_visible & (left_is_nearer == faces_lie_left)
        beyond = x - 0.5 - column
        left_over = tl.maximum(tl.where(left_is_nearer, 1 - beyond, beyond), 0.0)
        key = (left_over.to(tl.int32, bitcast=True).to(tl.int64) << 32) | edge
        tl.atomic_min(keys + left, key, mask=is_hit, sem="relaxed")
