"""The network of a hash field as Triton kernels: hidden layer, ReLU and heads of a sample in registers.

In plain torch each of these is a pass over memory of some 32 numbers a sample, and the weights' gradients are
products of matrices millions of rows long and a few columns wide; here a sample is read once, its hidden
units are never stored, and what the weights get is summed inside a program first. The twin is
`radiance_field.two_layers`. All sums are in float32 and in a fixed order, so gradients are the same
every time. Products go through the matrix units. Needs triton; see `grid_kernels` for how it is tested.
Legend: P points, K features, H hidden units, C outputs.
"""

# Triton reads the source of its functions; what their annotations say does not describe calling them.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS = 128  # at a time
ROUNDS = 8  # of so many points each in a program of the backward pass, whose sums are kept in between
# Three products of ten bits each instead of one of 23: as exact as float32 for sums as short as these.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _tile(source, rows, columns, is_row, is_column, row_stride, column_stride):
    """Float32 [rows, columns] of a matrix in memory, 0 outside it."""
    place = source + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(place, mask=is_row[:, None] & is_column[None, :], other=0.0)


@triton.jit
def _network_forward(
    features, hidden_weight, hidden_bias, head_weight, head_bias, outputs,
    num_points, num_features, num_units, num_outputs, point_stride, feature_stride,
    POINTS: tl.constexpr, FEATURES: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    feature, unit, output = tl.arange(0, FEATURES), tl.arange(0, UNITS), tl.arange(0, OUTPUTS)
    is_point, is_feature = point < num_points, feature < num_features
    is_unit, is_output = unit < num_units, output < num_outputs
    values = _tile(features, point, feature, is_point, is_feature, point_stride, feature_stride)
    weights = _tile(hidden_weight, feature, unit, is_feature, is_unit, 1, num_features)
    hidden = tl.dot(values, weights, input_precision=PRECISION)
    hidden += tl.load(hidden_bias + unit, mask=is_unit, other=0.0)[None, :]
    heads = _tile(head_weight, unit, output, is_unit, is_output, 1, num_units)
    total = tl.dot(tl.maximum(hidden, 0.0), heads, input_precision=PRECISION)
    total += tl.load(head_bias + output, mask=is_output, other=0.0)[None, :]
    place = outputs + output[None, :].to(tl.int64) * num_points + point[:, None]
    tl.store(place, total, mask=is_point[:, None] & is_output[None, :])


@triton.jit
def _network_backward(
    features, hidden_weight, hidden_bias, head_weight, grad_outputs, grad_features,
    hidden_weight_sums, hidden_bias_sums, head_weight_sums, head_bias_sums,
    num_points, num_features, num_units, num_outputs,
    point_stride, feature_stride, grad_point_stride, grad_output_stride,
    ROUNDS: tl.constexpr, POINTS: tl.constexpr,
    FEATURES: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    feature, unit, output = tl.arange(0, FEATURES), tl.arange(0, UNITS), tl.arange(0, OUTPUTS)
    is_feature, is_unit, is_output = feature < num_features, unit < num_units, output < num_outputs
    weights = _tile(hidden_weight, unit, feature, is_unit, is_feature, num_features, 1)
    heads = _tile(head_weight, output, unit, is_output, is_unit, num_units, 1)
    bias = tl.load(hidden_bias + unit, mask=is_unit, other=0.0)
    hidden_weight_sum = tl.zeros([UNITS, FEATURES], tl.float32)
    hidden_bias_sum = tl.zeros([UNITS], tl.float32)
    head_weight_sum = tl.zeros([OUTPUTS, UNITS], tl.float32)
    head_bias_sum = tl.zeros([OUTPUTS], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for turn in range(ROUNDS):
        point = (program * ROUNDS + turn) * POINTS + tl.arange(0, POINTS)
        is_point = point < num_points
        values = _tile(features, point, feature, is_point, is_feature, point_stride, feature_stride)
        hidden = tl.dot(values, tl.trans(weights), input_precision=PRECISION) + bias[None, :]
        grad = _tile(grad_outputs, point, output, is_point, is_output, grad_point_stride, grad_output_stride)
        head_weight_sum += tl.dot(tl.trans(grad), tl.maximum(hidden, 0.0), input_precision=PRECISION)
        head_bias_sum += tl.sum(grad, axis=0)
        grad_hidden = tl.dot(grad, heads, input_precision=PRECISION)
        grad_hidden = tl.where(hidden > 0, grad_hidden, 0.0)
        hidden_weight_sum += tl.dot(tl.trans(grad_hidden), values, input_precision=PRECISION)
        hidden_bias_sum += tl.sum(grad_hidden, axis=0)
        grad_values = tl.dot(grad_hidden, weights, input_precision=PRECISION)
        place = grad_features + feature[None, :].to(tl.int64) * num_points + point[:, None]
        tl.store(place, grad_values, mask=is_point[:, None] & is_feature[None, :])
    place = hidden_weight_sums + program * UNITS * FEATURES
    tl.store(place + unit[:, None] * FEATURES + feature[None, :], hidden_weight_sum)
    tl.store(hidden_bias_sums + program * UNITS + unit, hidden_bias_sum)
    place = head_weight_sums + program * OUTPUTS * UNITS
    tl.store(place + output[:, None] * UNITS + unit[None, :], head_weight_sum)
    tl.store(head_bias_sums + program * OUTPUTS + output, head_bias_sum)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        hidden_weight: Tensor,
        hidden_bias: Tensor,
        head_weight: Tensor,
        head_bias: Tensor,
    ) -> Tensor:
        num_points, num_outputs = features.shape[0], head_weight.shape[0]
        num_units, num_features = hidden_weight.shape
        ctx.save_for_backward(features, hidden_weight, hidden_bias, head_weight)
        outputs = features.new_empty(num_outputs, num_points)
        with torch.cuda.device_of(features):
            _network_forward[(triton.cdiv(num_points, POINTS),)](
                features, hidden_weight, hidden_bias, head_weight, head_bias, outputs,
                num_points, num_features, num_units, num_outputs, *features.stride(),
                POINTS=POINTS, FEATURES=_side(num_features), UNITS=_side(num_units),
                OUTPUTS=_side(num_outputs),
            )  # fmt: skip
        return outputs.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        features, hidden_weight, hidden_bias, head_weight = ctx.saved_tensors
        (grad,) = grad_outputs
        num_points, num_outputs = features.shape[0], head_weight.shape[0]
        num_units, num_features = hidden_weight.shape
        sides = {
            "FEATURES": _side(num_features), "UNITS": _side(num_units), "OUTPUTS": _side(num_outputs)
        }  # fmt: skip
        num_programs = triton.cdiv(num_points, POINTS * ROUNDS)
        grad_features = features.new_empty(num_features, num_points)
        sums = [
            features.new_empty(num_programs, *shape)
            for shape in (
                (sides["UNITS"], sides["FEATURES"]),
                (sides["UNITS"],),
                (sides["OUTPUTS"], sides["UNITS"]),
                (sides["OUTPUTS"],),
            )
        ]
        with torch.cuda.device_of(features):
            _network_backward[(num_programs,)](
                features, hidden_weight, hidden_bias, head_weight, grad, grad_features, *sums,
                num_points, num_features, num_units, num_outputs, *features.stride(), *grad.stride(),
                ROUNDS=ROUNDS, POINTS=POINTS, **sides, num_stages=1,
            )  # fmt: skip
        hidden_weights, hidden_biases, head_weights, head_biases = (part.sum(dim=0) for part in sums)
        return (
            grad_features.t(),
            hidden_weights[:num_units, :num_features],
            hidden_biases[:num_units],
            head_weights[:num_outputs, :num_units],
            head_biases[:num_outputs],
        )


def two_layers(
    features: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, head_weight: Tensor, head_bias: Tensor
) -> Tensor:
    """Outputs float32 [P, C] of ReLU(features W1^T + b1) W2^T + b2; twin of `radiance_field.two_layers`.

    Args:
        features: float32 [P, K], in any layout.
        hidden_weight, hidden_bias: float32 [H, K] and [H].
        head_weight, head_bias: float32 [C, H] and [C].
    """
    weights = (hidden_weight, hidden_bias, head_weight, head_bias)
    if features.shape[0] == 0:
        return features.new_zeros(0, head_weight.shape[0]) + 0 * sum(weight.sum() for weight in weights)
    return _Network.apply(features, *(weight.contiguous() for weight in weights))  # type: ignore[return-value]


def _side(size: int) -> int:
    """Side of a tile that holds `size`: a power of two that matrix units take."""
    return max(16, triton.next_power_of_2(size))
