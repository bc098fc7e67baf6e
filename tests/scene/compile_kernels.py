"""Compile every kernel for an H100, which needs no GPU: run by a test, in a process of its own."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from uni3d.diffusion import norm_kernels
from uni3d.scene import grid_kernels, network_kernels, ray_kernels

H100 = GPUTarget("cuda", 90, 32)
INTEGERS = (
    "num_points",
    "num_rays",
    "num_features",
    "num_units",
    "num_outputs",
    "num_pixels",
    "num_channels",
    "num_groups",
    "num_chunks",
    "chunk_size",
    "grad_point_stride",
    "grad_output_stride",
    "resolution",
    "size",
    "point_stride",
    "feature_stride",
    "channel_stride",
)
FLOATS = ("eps", "step", "half_extent", "per_unit", "limit")
INT32_TENSORS = ("levels", "count")
BF16_TENSORS = ("images", "grads", "weight", "bias", "results")
INT64_TENSORS = ("found", "wanted", "kept", "places", "lit", "end", "scenes")


def type_of(kernel: Any, name: str) -> str:
    """The type that the wrappers pass; all other arguments are float32 tensors."""
    if name.isupper():
        return "constexpr"
    if name in INTEGERS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name == "occupied":
        return "*u8"
    is_slot = name == "start" and "directions" not in kernel.arg_names  # else a distance
    if name in INT64_TENSORS or is_slot:
        return "*i64"
    if name in BF16_TENSORS:
        return "*bf16"
    return "*i32" if name in INT32_TENSORS else "*fp32"


def compile_for_h100(kernel: Any, **constants: int) -> str:
    """The machine code's assembly of a kernel."""
    signature = {name: type_of(kernel, name) for name in kernel.arg_names}
    tensors = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in tensors}  # as torch allocates them
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return compile(source, target=H100).asm["ptx"]


for features in (1, 2):
    constants = {"FEATURES": features, "POINTS": grid_kernels.BLOCK}
    compile_for_h100(grid_kernels._hash_forward, **constants)
    addition = "add.v2.f32" if features == 2 else "add.f32"
    assert addition in compile_for_h100(grid_kernels._hash_backward, **constants)
for is_many in (False, True):
    constants = {"CHANNELS": 3, "POINTS": grid_kernels.BLOCK, "MANY": is_many}
    compile_for_h100(grid_kernels._dense_forward, **constants)
    compile_for_h100(grid_kernels._dense_backward, **constants)
for kernel in (ray_kernels._count_occupied, ray_kernels._write_places, ray_kernels._absorb):
    compile_for_h100(kernel, RAYS=ray_kernels.RAYS)
for features in (3,):
    constants = {"FEATURES": features, "RAYS": ray_kernels.RAYS}
    compile_for_h100(ray_kernels._composite_forward, **constants)
    compile_for_h100(ray_kernels._composite_backward, **constants)
constants = {"POINTS": network_kernels.POINTS, "FEATURES": 32, "UNITS": 32, "OUTPUTS": 16}
compile_for_h100(network_kernels._network_forward, **constants)
compile_for_h100(network_kernels._network_backward, ROUNDS=network_kernels.ROUNDS, **constants)
tile = {"ROWS": norm_kernels.ROWS, "CHANNELS": norm_kernels.CHANNELS}
table = {"WIDTH": 16, "CHUNKS": norm_kernels.CHUNKS_AT_ONCE}
compile_for_h100(norm_kernels._moments, **tile)
compile_for_h100(norm_kernels._statistics, **table)
compile_for_h100(norm_kernels._backward_means, **table)
for kernel in (norm_kernels._forward, norm_kernels._backward_sums, norm_kernels._backward):
    compile_for_h100(kernel, IS_SILU=1, **tile)
