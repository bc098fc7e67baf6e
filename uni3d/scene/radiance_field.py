"""Density and colour in a cube around the origin: what the optimisation changes.

Two encodings behind one interface. `dense` (for CPUs): a few voxel grids of growing resolution whose raw
values add up, so that coarse structure moves in a few steps and fine detail follows, with nothing to resample
on the way. `hash` (for GPUs): a multiresolution hash grid and a small network. Colours are sRGB display
values in [0, 1]; density is an extinction coefficient per scene unit.
Legend: P points, G vertices along a grid's edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uni3d.errors import UsageError
from uni3d.scene.encoding import EncodingBackend, HashGridEncoding, dense_corners, weighted_corners

DEFAULT_HALF_EXTENT = 0.6
MAX_LOG_DENSITY = 7.0  # 1,100 per scene unit: opaque within 5 mm of a unit object
MIN_LOG_BLOB = -4.0
SURFACE_DENSITY = 12.0  # per scene unit: half of the light passes 6 % of a unit object
SOFTPLUS_SCALE = 25.0  # so that raw values of a few units are as opaque as they are under exp

DensityActivation = Literal["exp", "softplus"]
Encoding = Literal["dense", "hash"]


class _TruncatedExp(torch.autograd.Function):
    """exp(min(x, MAX_LOG_DENSITY)); the gradient goes on above the ceiling, so that values can come back."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        value = raw.clamp(max=MAX_LOG_DENSITY).exp_()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return grad_outputs[0] * value


class RadianceField(nn.Module):
    """A trainable field over the cube [-half_extent, half_extent]^3; zero density outside.

    It starts as a soft grey ball: density exp(blob_sharpness * (1 - |x| / blob_radius)), 1 per unit at
    `blob_radius` and exp(blob_sharpness) at the centre.

    Args:
        encoding: "dense" voxel grids or "hash" (hash grid and a network of one hidden layer).
        resolutions: vertices along an edge of each dense grid, coarse to fine.
        density_activation: "exp" (truncated; clears fog best) or "softplus" (gentler gradients).
        hash_options: keyword arguments of `HashGridEncoding`; only with encoding="hash".
        encoding_backend: who looks up grids and tables: "torch", "triton" or, for a hash field, "tinycudann".
        hidden_width: width of the hash encoding's network.
        generator: random start of hash tables and network; the dense field starts without randomness.

    Raises UsageError for an unknown encoding or activation, or hash options with a dense field.
    """

    tetrahedron: Tensor

    def __init__(
        self,
        *,
        encoding: Encoding = "dense",
        resolutions: tuple[int, ...] = (24, 48, 96),
        half_extent: float = DEFAULT_HALF_EXTENT,
        density_activation: DensityActivation = "exp",
        blob_radius: float = 0.35,
        blob_sharpness: float = 4.0,
        hash_options: Mapping[str, int] | None = None,
        encoding_backend: EncodingBackend = "torch",
        hidden_width: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if encoding not in ("dense", "hash"):
            raise UsageError(f"field encoding is '{encoding}'; choose 'dense' (CPU) or 'hash' (GPU)")
        if density_activation not in ("exp", "softplus"):
            raise UsageError(f"density activation is '{density_activation}'; choose 'exp' or 'softplus'")
        if encoding == "dense" and hash_options:
            raise UsageError(
                "hash options were given to a dense field; pass encoding='hash' or leave them out"
            )
        if encoding == "dense" and (not resolutions or min(resolutions) < 2):
            raise UsageError(f"grid resolutions are {resolutions}; give one or more, each at least 2")
        if encoding == "dense" and encoding_backend == "tinycudann":
            raise UsageError(
                "tinycudann was chosen for a dense field; it looks up hash tables only, so pass "
                "encoding='hash' or another backend"
            )
        self.encoding = encoding
        self.encoding_backend = encoding_backend
        self.half_extent = half_extent
        self.density_activation = density_activation
        self.blob_radius = blob_radius
        self.blob_sharpness = blob_sharpness
        self.resolutions = tuple(resolutions) if encoding == "dense" else ()
        self.num_active_levels = len(self.resolutions)
        self.density_sharpness = 1.0
        corners = torch.tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], dtype=torch.float32)
        self.register_buffer("tetrahedron", corners, persistent=False)  # on the device, where it is needed
        if encoding == "dense":
            self.density_grids = nn.ParameterList(
                nn.Parameter(torch.zeros(1, size, size, size)) for size in self.resolutions
            )
            self.colour_grids = nn.ParameterList(
                nn.Parameter(torch.zeros(3, size, size, size)) for size in self.resolutions
            )
            with torch.no_grad():
                vertices = self.vertex_positions(resolutions[0])
                self.density_grids[0].copy_(self._raw_blob(vertices).view_as(self.density_grids[0]))
        else:
            self.hash_grid = HashGridEncoding(
                **(hash_options or {}),  # type: ignore[arg-type]
                backend=encoding_backend,
                generator=generator,
            )
            self.hidden = _linear(self.hash_grid.num_features, hidden_width, generator)
            self.density_head = _linear(hidden_width, 1, generator)
            self.colour_head = _linear(hidden_width, 3, generator)

    def density(self, points: Tensor) -> Tensor:
        """Extinction per scene unit, float32 [P] >= 0, at points [P, 3] (scene units); 0 outside the cube."""
        return self._evaluate(points, with_colour=False)[0]

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] (as `density`) and sRGB colour [P, 3] in [0, 1] at points [P, 3].

        Differentiable in the parameters, not in the points.
        """
        density, colour = self._evaluate(points, with_colour=True)
        assert colour is not None
        return density, colour

    def colour(self, points: Tensor) -> Tensor:
        """sRGB colour [P, 3] in [0, 1] at points [P, 3]; outside the cube that of the nearest face."""
        return self(points)[1]

    def normals(self, points: Tensor, *, offset: float | None = None) -> Tensor:
        """Unit normals [P, 3], down the density's gradient; differentiable in the field.

        Four look-ups a point: differences of log(1 + density) between the corners of a tetrahedron of edge
        2.8 `offset` (half a finest voxel unless given); where density is flat the normal is zero.
        """
        if offset is None:
            offset = self.half_extent / max(self.resolutions or self.hash_grid.resolutions)
        tetrahedron = self.tetrahedron.to(points.dtype) * offset
        probes = (points[:, None, :] + tetrahedron).reshape(-1, 3)
        level = torch.log1p(self.density(probes)).view(-1, 4)
        return -nn.functional.normalize(level @ tetrahedron, dim=-1, eps=1e-9)

    def vertex_positions(self, resolution: int) -> Tensor:
        """Positions [resolution^3, 3] of a grid's vertices in scene units, x fastest."""
        ticks = torch.linspace(-self.half_extent, self.half_extent, resolution)
        z, y, x = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
        return torch.stack([x, y, z], dim=-1).reshape(-1, 3)

    def set_active_levels(self, num_levels: int) -> None:
        """Use only the `num_levels` coarsest dense grids; the rest count as zero and get no gradient.

        Grids start at zero, so switching them on later changes nothing at that moment. No effect on a hash
        field. Not part of the state dict: whoever schedules it sets it again on resume.
        """
        if self.encoding == "dense" and not 1 <= num_levels <= len(self.resolutions):
            raise UsageError(f"active levels is {num_levels}; the field has 1 to {len(self.resolutions)}")
        self.num_active_levels = min(num_levels, len(self.resolutions))

    @torch.no_grad()
    def shift_colour(self, logits: Tensor) -> None:
        """Move the colour everywhere by sRGB logits, float [3]: a new field, being grey, takes it."""
        if self.encoding == "dense":
            self.colour_grids[0].add_(logits.view(3, 1, 1, 1))
        else:
            self.colour_head.bias.add_(logits)

    def set_density_sharpness(self, sharpness: float) -> None:
        """Stretch raw densities by this factor about the value that stands for SURFACE_DENSITY.

        Above 1 what is thinner than that grows thinner and what is denser grows denser: fog clears and edges
        take less space, while the surface stays. Not part of the state dict, like the active levels.
        """
        self.density_sharpness = float(sharpness)

    @property
    def parameter_group_names(self) -> tuple[str, ...]:
        """Names that `parameter_groups` expects a learning rate for."""
        return ("density", "colour") if self.encoding == "dense" else ("encoding", "network")

    def parameter_groups(self, learning_rates: Mapping[str, float]) -> list[dict[str, Any]]:
        """Optimiser groups {"params", "lr", "name"}, one for each of `parameter_group_names`.

        Raises UsageError when a name is missing or unknown. `torch.optim.Adam(..., fused=True)` is three
        times as fast as the default on these tensors, also on a CPU.
        """
        if set(learning_rates) != set(self.parameter_group_names):
            raise UsageError(
                f"learning rates are given for {sorted(learning_rates)}; a {self.encoding} field takes "
                f"exactly {sorted(self.parameter_group_names)}"
            )
        if self.encoding == "dense":
            members: dict[str, list[nn.Parameter]] = {
                "density": list(self.density_grids),
                "colour": list(self.colour_grids),
            }
        else:
            network = [self.hidden, self.density_head, self.colour_head]
            members = {
                "encoding": list(self.hash_grid.parameters()),
                "network": [parameter for layer in network for parameter in layer.parameters()],
            }
        return [
            {"params": members[name], "lr": learning_rates[name], "name": name}
            for name in self.parameter_group_names
        ]

    def _evaluate(self, points: Tensor, *, with_colour: bool) -> tuple[Tensor, Tensor | None]:
        unit = points.detach() / (2 * self.half_extent) + 0.5
        is_inside = (points.detach().abs() <= self.half_extent).all(dim=-1)
        if self.encoding == "dense":
            raw_density, raw_colour = self._raw_from_grids(unit, with_colour=with_colour)
        else:
            raw = self._raw_from_network(self.hash_grid(unit.clamp(0, 1)), with_colour=with_colour)
            raw_density = raw[:, 0] + self._raw_blob(points.detach())
            raw_colour = raw[:, 1:] if with_colour else None
        density = self._activate(raw_density) * is_inside
        return density, None if raw_colour is None else torch.sigmoid(raw_colour)

    def _raw_from_network(self, features: Tensor, *, with_colour: bool) -> Tensor:
        """Raw density and, if asked for, colour, [P, 1] or [P, 4], of hash features [P, K]."""
        heads = [self.density_head, self.colour_head] if with_colour else [self.density_head]
        apply = two_layers
        if self.encoding_backend == "triton":
            from uni3d.scene import network_kernels

            apply = network_kernels.two_layers
        return apply(
            features,
            self.hidden.weight,
            self.hidden.bias,
            torch.cat([head.weight for head in heads]),
            torch.cat([head.bias for head in heads]),
        )

    def _raw_from_grids(self, unit: Tensor, *, with_colour: bool) -> tuple[Tensor, Tensor | None]:
        raw_density = unit.new_zeros(unit.shape[0], 1)
        raw_colour = unit.new_zeros(unit.shape[0], 3) if with_colour else None
        for level in range(self.num_active_levels):
            look_up = self._look_up_at(unit, self.resolutions[level])
            raw_density = raw_density + look_up(self.density_grids[level])
            if raw_colour is not None:
                raw_colour = raw_colour + look_up(self.colour_grids[level])
        return raw_density[:, 0], raw_colour

    def _look_up_at(self, unit: Tensor, resolution: int) -> Callable[[Tensor], Tensor]:
        """The function that reads a grid of `resolution` [C, G, G, G] at points [P, 3] in [0, 1]^3."""
        if self.encoding_backend == "triton":
            from uni3d.scene import grid_kernels

            return lambda grid: grid_kernels.dense_look_up(unit, grid)
        corners = dense_corners(unit, resolution)  # found once for density and colour
        return lambda grid: weighted_corners(grid, corners)

    def _activate(self, raw: Tensor) -> Tensor:
        if self.density_sharpness != 1.0:
            surface = self._raw_of_density(SURFACE_DENSITY)
            raw = surface + self.density_sharpness * (raw - surface)
        if self.density_activation == "exp":
            return _TruncatedExp.apply(raw)  # type: ignore[return-value]
        return SOFTPLUS_SCALE * nn.functional.softplus(raw)

    def _raw_of_density(self, density: float) -> float:
        """The raw value whose activation, unsharpened, is `density`."""
        if self.density_activation == "exp":
            return math.log(density)
        return math.log(math.expm1(density / SOFTPLUS_SCALE))

    def _raw_blob(self, points: Tensor) -> Tensor:
        """Raw values [P] whose activation is the starting blob."""
        distance = points.norm(dim=-1)
        log_density = (self.blob_sharpness * (1 - distance / self.blob_radius)).clamp(min=MIN_LOG_BLOB)
        if self.density_activation == "exp":
            return log_density
        scaled = log_density.exp() / SOFTPLUS_SCALE
        return torch.log(torch.expm1(scaled))  # softplus(log(exp(v) - 1)) = v


def two_layers(
    features: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, head_weight: Tensor, head_bias: Tensor
) -> Tensor:
    """Outputs [P, C] of ReLU(features W1^T + b1) W2^T + b2, features [P, K], W1 [H, K], W2 [C, H]."""
    hidden = torch.relu(nn.functional.linear(features, hidden_weight, hidden_bias))
    return nn.functional.linear(hidden, head_weight, head_bias)


def _linear(num_in: int, num_out: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer drawn from `generator`: uniform in +-1/sqrt(num_in), zero bias."""
    layer = nn.Linear(num_in, num_out)
    bound = 1 / math.sqrt(num_in)
    with torch.no_grad():
        layer.weight.copy_((torch.rand(num_out, num_in, generator=generator) * 2 - 1) * bound)
        layer.bias.zero_()
    return layer
