"""Group normalisation of channels-last images as Triton kernels, with the SiLU that mostly follows it.

Torch's own wants channels first: between convolutions that want them last it copies every image twice, and
three times on the way back. Here an image is read twice and written once; backwards the image and its
gradient are. What is kept in between is the image and two numbers a group. The twin is
`torch.nn.functional.group_norm`, followed by `silu`. Needs triton; with TRITON_INTERPRET=1 set before the
import the kernels run on a CPU, for tests.
Legend: B images, P pixels, C channels, G groups, K chunks of pixels.
"""

# Triton reads the source of its functions; what their annotations say does not describe calling them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 32  # pixels at a time
CHANNELS = 64  # of a program
PROGRAMS = 512  # about, that share a pass over all images: some for each multiprocessor of a large GPU
CHUNKS_AT_ONCE = 32  # when the chunks of a group are put together


@triton.jit
def _where(chunk_size, num_pixels, num_channels, CHANNELS: tl.constexpr):
    """Of a program: its image, its chunk of pixels [start, end), its channels and which of them exist."""
    image, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk_size
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    return image, start, tl.minimum(start + chunk_size, num_pixels), channel, channel < num_channels


@triton.jit
def _places(image, first_row, end, channel, is_channel, num_pixels, num_channels, ROWS: tl.constexpr):
    """Offsets [ROWS, CHANNELS] of the values of some pixels, and which of them exist."""
    row = first_row + tl.arange(0, ROWS)
    place = image * num_pixels * num_channels + row[:, None] * num_channels + channel[None, :]
    return place, (row < end)[:, None] & is_channel[None, :]


@triton.jit
def _moments(
    images, moments, num_pixels, num_channels, chunk_size, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    # Of every channel in a chunk: mean, and sum of squared distances from it. They are merged as by Chan,
    # Golub and LeVeque 1979, so that a large mean costs no digits.
    image, start, end, channel, is_channel = _where(chunk_size, num_pixels, num_channels, CHANNELS)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for first_row in range(start, end, ROWS):
        place, is_inside = _places(image, first_row, end, channel, is_channel, num_pixels, num_channels, ROWS)
        values = tl.load(images + place, mask=is_inside, other=0.0).to(tl.float32)
        before = (first_row - start).to(tl.float32)
        here = tl.minimum(end - first_row, ROWS).to(tl.float32)
        mean_here = tl.sum(values, axis=0) / here
        distance = tl.where(is_inside, values - mean_here[None, :], 0.0)
        change = mean_here - mean
        mean += change * (here / (before + here))
        squares += tl.sum(distance * distance, axis=0) + change * change * (before * here / (before + here))
    place = moments + (image * tl.num_programs(1) + tl.program_id(1)) * 2 * num_channels + channel
    tl.store(place, mean, mask=is_channel)
    tl.store(place + num_channels, squares, mask=is_channel)


@triton.jit
def _statistics(
    moments, statistics, num_pixels, num_channels, chunk_size, num_chunks, eps,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of a group, from the moments of its channels in all chunks."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group_size = num_channels // tl.num_programs(1)
    column = tl.arange(0, WIDTH)
    number = tl.zeros([], tl.float32)
    mean = tl.zeros([], tl.float32)
    squares = tl.zeros([], tl.float32)
    for first_chunk in range(0, num_chunks, CHUNKS):
        chunk = first_chunk + tl.arange(0, CHUNKS)
        is_there = (chunk < num_chunks)[:, None] & (column < group_size)[None, :]
        row = (image * num_chunks + chunk) * 2 * num_channels + group * group_size
        place = moments + row[:, None] + column[None, :]
        means = tl.load(place, mask=is_there, other=0.0)
        size = tl.minimum(num_pixels - chunk * chunk_size, chunk_size).to(tl.float32)[:, None]
        weight = tl.where(is_there, size, 0.0)
        here = tl.sum(weight)
        mean_here = tl.sum(means * weight) / here
        distance = means - mean_here
        squares_here = tl.sum(tl.load(place + num_channels, mask=is_there, other=0.0))
        squares_here += tl.sum(weight * distance * distance)
        change = mean_here - mean
        squares += squares_here + change * change * (number * here / (number + here))
        mean += change * (here / (number + here))
        number += here
    place = statistics + (image * tl.num_programs(1) + group) * 2
    tl.store(place, mean)
    tl.store(place + 1, tl.rsqrt(squares / number + eps))


@triton.jit
def _of_channels(statistics, image, channel, is_channel, num_channels, num_groups):
    """The two numbers of each channel's group."""
    place = statistics + (image * num_groups + channel // (num_channels // num_groups)) * 2
    return tl.load(place, mask=is_channel, other=0.0), tl.load(place + 1, mask=is_channel, other=0.0)


@triton.jit
def _forward(
    images, weight, bias, statistics, results, num_pixels, num_channels, num_groups, chunk_size,
    IS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, start, end, channel, is_channel = _where(chunk_size, num_pixels, num_channels, CHANNELS)
    mean, inverse = _of_channels(statistics, image, channel, is_channel, num_channels, num_groups)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    for first_row in range(start, end, ROWS):
        place, is_inside = _places(image, first_row, end, channel, is_channel, num_pixels, num_channels, ROWS)
        values = tl.load(images + place, mask=is_inside, other=0.0).to(tl.float32)
        result = (values - mean[None, :]) * scale[None, :] + shift[None, :]
        if IS_SILU:
            result = result * tl.sigmoid(result)
        tl.store(results + place, result.to(results.dtype.element_ty), mask=is_inside)


@triton.jit
def _normalised_and_gradient(
    images, grads, place, is_inside, mean, inverse, scale, shift, IS_SILU: tl.constexpr
):
    """Normalised values, and the gradient of what they become before the SiLU."""
    values = tl.load(images + place, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(grads + place, mask=is_inside, other=0.0).to(tl.float32)
    normalised = (values - mean[None, :]) * inverse[None, :]
    if IS_SILU:
        before = normalised * scale[None, :] + shift[None, :]
        gate = tl.sigmoid(before)
        grad = grad * gate * (1 + before * (1 - gate))
    return normalised, grad


@triton.jit
def _backward_sums(
    images, grads, weight, bias, statistics, sums, num_pixels, num_channels, num_groups, chunk_size,
    IS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, start, end, channel, is_channel = _where(chunk_size, num_pixels, num_channels, CHANNELS)
    mean, inverse = _of_channels(statistics, image, channel, is_channel, num_channels, num_groups)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    plain = tl.zeros([CHANNELS], tl.float32)
    along = tl.zeros([CHANNELS], tl.float32)
    for first_row in range(start, end, ROWS):
        place, is_inside = _places(image, first_row, end, channel, is_channel, num_pixels, num_channels, ROWS)
        normalised, grad = _normalised_and_gradient(
            images, grads, place, is_inside, mean, inverse, scale, shift, IS_SILU
        )
        plain += tl.sum(grad, axis=0)
        along += tl.sum(grad * normalised, axis=0)
    place = sums + (image * tl.num_programs(1) + tl.program_id(1)) * 2 * num_channels + channel
    tl.store(place, plain * scale, mask=is_channel)
    tl.store(place + num_channels, along * scale, mask=is_channel)


@triton.jit
def _backward_means(
    sums, means, num_pixels, num_channels, num_chunks, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group_size = num_channels // tl.num_programs(1)
    column = tl.arange(0, WIDTH)
    plain = tl.zeros([CHUNKS, WIDTH], tl.float32)
    along = tl.zeros([CHUNKS, WIDTH], tl.float32)
    for first_chunk in range(0, num_chunks, CHUNKS):
        chunk = first_chunk + tl.arange(0, CHUNKS)
        is_there = (chunk < num_chunks)[:, None] & (column < group_size)[None, :]
        row = (image * num_chunks + chunk) * 2 * num_channels + group * group_size
        place = sums + row[:, None] + column[None, :]
        plain += tl.load(place, mask=is_there, other=0.0)
        along += tl.load(place + num_channels, mask=is_there, other=0.0)
    place = means + (image * tl.num_programs(1) + group) * 2
    number = (num_pixels * group_size).to(tl.float32)
    tl.store(place, tl.sum(plain) / number)
    tl.store(place + 1, tl.sum(along) / number)


@triton.jit
def _backward(
    images, grads, weight, bias, statistics, means, results,
    num_pixels, num_channels, num_groups, chunk_size,
    IS_SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, start, end, channel, is_channel = _where(chunk_size, num_pixels, num_channels, CHANNELS)
    mean, inverse = _of_channels(statistics, image, channel, is_channel, num_channels, num_groups)
    plain, along = _of_channels(means, image, channel, is_channel, num_channels, num_groups)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    for first_row in range(start, end, ROWS):
        place, is_inside = _places(image, first_row, end, channel, is_channel, num_pixels, num_channels, ROWS)
        normalised, grad = _normalised_and_gradient(
            images, grads, place, is_inside, mean, inverse, scale, shift, IS_SILU
        )
        result = grad * scale[None, :] - plain[None, :] - normalised * along[None, :]
        result = result * inverse[None, :]
        tl.store(results + place, result.to(results.dtype.element_ty), mask=is_inside)


class _Plan:
    """How the work on images [B, C, ...] with channels last is shared out."""

    def __init__(self, images: Tensor, num_groups: int) -> None:
        self.num_images, self.num_channels = images.shape[:2]
        self.num_pixels = images[0, 0].numel()
        self.num_groups = num_groups
        blocks = triton.cdiv(self.num_channels, CHANNELS)
        wanted = min(triton.cdiv(PROGRAMS, self.num_images * blocks), triton.cdiv(self.num_pixels, ROWS))
        self.chunk_size = triton.cdiv(triton.cdiv(self.num_pixels, wanted), ROWS) * ROWS
        self.num_chunks = triton.cdiv(self.num_pixels, self.chunk_size)
        self.chunks = (self.num_images, self.num_chunks, blocks)
        self.groups = (self.num_images, num_groups)
        self.tile = {"ROWS": ROWS, "CHANNELS": CHANNELS}
        width = triton.next_power_of_2(self.num_channels // num_groups)
        self.table = {"WIDTH": width, "CHUNKS": CHUNKS_AT_ONCE}


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, is_silu: bool
    ) -> Tensor:
        plan = _Plan(images, num_groups)
        moments = images.new_empty(
            plan.num_images, plan.num_chunks, 2, plan.num_channels, dtype=torch.float32
        )
        statistics = images.new_empty(plan.num_images, num_groups, 2, dtype=torch.float32)
        results = torch.empty_like(images)
        sizes = (plan.num_pixels, plan.num_channels)
        with torch.cuda.device_of(images):
            _moments[plan.chunks](images, moments, *sizes, plan.chunk_size, **plan.tile)
            _statistics[plan.groups](
                moments, statistics, *sizes, plan.chunk_size, plan.num_chunks, eps, **plan.table
            )
            _forward[plan.chunks](
                images, weight, bias, statistics, results, *sizes, num_groups, plan.chunk_size,
                IS_SILU=is_silu, **plan.tile,
            )  # fmt: skip
        ctx.save_for_backward(images, weight, bias, statistics)
        ctx.num_groups, ctx.is_silu = num_groups, is_silu
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        images, weight, bias, statistics = ctx.saved_tensors
        plan = _Plan(images, ctx.num_groups)
        results = torch.empty_like(images)
        grads = grad_outputs[0]
        if grads.stride() != images.stride():
            grads = torch.empty_like(images).copy_(grads)
        sums = images.new_empty(plan.num_images, plan.num_chunks, 2, plan.num_channels, dtype=torch.float32)
        means = torch.empty_like(statistics)
        sizes = (plan.num_pixels, plan.num_channels)
        with torch.cuda.device_of(images):
            _backward_sums[plan.chunks](
                images, grads, weight, bias, statistics, sums, *sizes, plan.num_groups, plan.chunk_size,
                IS_SILU=ctx.is_silu, **plan.tile,
            )  # fmt: skip
            _backward_means[plan.groups](sums, means, *sizes, plan.num_chunks, **plan.table)
            _backward[plan.chunks](
                images, grads, weight, bias, statistics, means, results,
                *sizes, plan.num_groups, plan.chunk_size, IS_SILU=ctx.is_silu, **plan.tile,
            )  # fmt: skip
        return results, None, None, None, None, None


def has_channels_last(images: Tensor) -> bool:
    """Whether images [B, C, ...] lie in memory without gaps, the channels of a pixel side by side."""
    return images.ndim >= 3 and images.movedim(1, -1).is_contiguous()


def group_norm(
    images: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, silu: bool = False
) -> Tensor:
    """Group normalisation (Wu and He 2018) of images [B, C, ...] with channels last, then SiLU if asked for.

    Statistics are taken in float32; the result has the images' dtype and layout. Differentiable in the images
    alone: weight and bias, [C], are those of frozen networks.
    """
    return _GroupNorm.apply(images, weight, bias, num_groups, eps, silu)  # type: ignore[return-value]
