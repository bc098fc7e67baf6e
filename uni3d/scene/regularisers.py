"""Terms that keep a field compact, crisp and smooth, and a measure of fog.

Each is a plain function that returns a scalar to be multiplied by its weight; callers skip a term whose
weight is zero. Averages run over pixels or rays of the whole batch, so weights do not depend on resolution.
Legend: B views, H W pixels, R rays, N packed samples, G grid vertices along an edge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.scene.packed import Segments, exclusive_sum, weighted_ray_sum
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.renderer import RaySamples, RenderOutput

UNIT_BOX_HALF_EXTENT = 0.5


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean binary entropy of opacities [B, 1, H, W], in nats (0 to 0.69): pushes pixels to empty or full.

    The aim is that of the beta prior on opacity in Neural Volumes (Lombardi et al. 2019, section 5.2);
    entropy has a bounded value, and its slope is clamped by 1e-4 at both ends.
    """
    share = opacity.clamp(1e-4, 1 - 1e-4)
    return -(share * share.log() + (1 - share) * torch.log1p(-share)).mean()


def opacity_sparsity(opacity: Tensor) -> Tensor:
    """Mean of opacities [B, 1, H, W], in [0, 1]: space costs, as in Dream Fields (Jain et al. 2022)."""
    return opacity.mean()


def weight_entropy(samples: RaySamples) -> Tensor:
    """Mean entropy, nats, of the weights along rays that met matter: one surface a ray, no layers.

    Ray entropy minimisation of InfoNeRF (Kim et al. 2022, Eq. 5): weights are normalised along the ray, and
    each ray counts in proportion to its opacity.
    """
    segments, weights = samples.segments, samples.weights
    opacity = _ray_sum(weights, segments)
    share = weights / opacity[segments.ray_index].clamp(min=1e-6)
    entropy = _ray_sum(-share * torch.log(share.clamp(min=1e-9)), segments)
    seen = opacity.detach()
    return (entropy * seen).sum() / seen.sum().clamp(min=1e-6)


def distortion(samples: RaySamples) -> Tensor:
    """Mean over all rays of sum_ij w_i w_j |t_i - t_j| + step / 3 sum_i w_i^2, in scene units.

    The distortion loss of Mip-NeRF 360 (Barron et al. 2022, Eq. 15) without its warp, since the scene is a
    small cube. Since samples are sorted, the double sum is 2 sum_i w_i (t_i W_i - M_i) with W_i and M_i the
    sums of w and w t over the earlier samples of the ray: linear in the number of samples.
    """
    weights, distances, segments = samples.weights, samples.distances, samples.segments
    earlier = exclusive_sum(weights, segments)
    earlier_moment = exclusive_sum(weights * distances, segments)
    between = 2 * (weights * (distances * earlier - earlier_moment)).sum()
    within = samples.step / 3 * weights.square().sum()
    return (between + within) / max(1, segments.num_rays)


def orientation(samples: RaySamples) -> Tensor:
    """Mean over rays of sum_i w_i max(0, n_i . d)^2: visible matter should face the camera.

    Ref-NeRF (Verbin et al. 2022, Eq. 11). The weights are not differentiated. Raises UsageError if the image
    was rendered without normals.
    """
    if samples.normals is None:
        raise UsageError("the orientation term needs normals; render with with_normals=True")
    facing_away = (samples.normals * samples.directions[samples.segments.ray_index]).sum(dim=1).clamp(min=0)
    return (samples.weights.detach() * facing_away.square()).sum() / max(1, samples.segments.num_rays)


def containment(samples: RaySamples, *, half_extent: float = UNIT_BOX_HALF_EXTENT) -> Tensor:
    """Mean over rays of visible weight times distance beyond the unit box (scene units, largest axis)."""
    beyond = (samples.points.abs().amax(dim=1) - half_extent).clamp(min=0)
    return (samples.weights * beyond).sum() / max(1, samples.segments.num_rays)


def off_centre(output: RenderOutput) -> Tensor:
    """Squared distance (scene units) of the centre of what all views see from the origin; moves density."""
    samples = output.samples
    total = samples.weights.sum().clamp(min=1e-6)
    return ((samples.weights[:, None] * samples.points).sum(dim=0) / total).square().sum()


def total_variation(
    field: RadianceField,
    *,
    density_weight: float = 1.0,
    colour_weight: float = 1.0,
    fraction: float = 0.25,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared difference of a dense field's raw values between neighbouring vertices, summed over axes.

    Averaged over the active levels. With a generator only a random slab of each grid is visited, `fraction`
    of its layers (the same mean in expectation, a quarter of the time); without one the whole grid is. The
    squared, differentiable relative of Rudin, Osher and Fatemi's total variation (1992), as in Plenoxels
    (2022). Raises UsageError for a hash field: use `local_variation` there.
    """
    if field.encoding != "dense":
        raise UsageError("total variation needs voxel grids; use local_variation with a hash field")
    total = torch.zeros((), device=next(field.parameters()).device)
    for level in range(field.num_active_levels):
        layers = _random_slab(field.resolutions[level], fraction, generator)
        for weight, grid in (
            (density_weight, field.density_grids[level]),
            (colour_weight, field.colour_grids[level]),
        ):
            if weight > 0:
                total = total + weight * _squared_differences(grid, layers)
    return total / field.num_active_levels


def local_variation(
    field: RadianceField, points: Tensor, *, offset: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Mean squared change of colour and of log(1 + density) from points [P, 3] to places about `offset` away.

    Works for any encoding and can be aimed, e.g. at `samples.points`; cost: two look-ups a point.
    """
    shift = torch.randn(
        points.shape, generator=generator, device=generator.device if generator else points.device
    )
    density, colour = field(points)
    near_density, near_colour = field(points + offset * shift.to(points.device))
    density_change = torch.log1p(density) - torch.log1p(near_density)
    return density_change.square().mean() + (colour - near_colour).square().sum(dim=1).mean()


@torch.no_grad()
def fog_fraction(opacity: Tensor | NDArray[np.floating], *, low: float = 0.1, high: float = 0.9) -> float:
    """Share of the silhouette (opacity > low) that is not solid (opacity < high), over all images.

    Opacities of any shape, in [0, 1]; 0 is crisp. Outlines of a solid object count too, so thin shapes have
    a floor above zero. A picture without a silhouette holds no fog: 0; emptiness is another question.
    Raises UsageError for no pixels, NaN or infinity.
    """
    values = torch.as_tensor(opacity)
    if values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise UsageError(f"opacity images of shape {tuple(values.shape)} are empty or hold NaN or infinity")
    silhouette = values > low
    return float((silhouette & (values < high)).sum()) / max(1, int(silhouette.sum()))


def _ray_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of values [N] over each ray, [R]."""
    return weighted_ray_sum(values, torch.ones_like(values)[:, None], segments)[:, 0]


def _random_slab(resolution: int, fraction: float, generator: torch.Generator | None) -> slice:
    """Some successive layers of a grid, all of them without a generator."""
    thickness = max(2, round(fraction * resolution))
    if generator is None or thickness >= resolution:
        return slice(0, resolution)
    start = int(torch.randint(resolution - thickness + 1, (1,), generator=generator, device=generator.device))
    return slice(start, start + thickness)


class _SquaredDifferences(torch.autograd.Function):
    """Sum over axes of the mean squared difference along the axis; forms its gradient in the same pass."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor) -> Tensor:
        total = grid.new_zeros(())
        gradient = torch.zeros_like(grid)
        for axis in (1, 2, 3):
            size = grid.shape[axis]
            change = grid.narrow(axis, 1, size - 1) - grid.narrow(axis, 0, size - 1)
            total += change.square().mean()
            scale = 2 / change.numel()
            gradient.narrow(axis, 1, size - 1).add_(change, alpha=scale)
            gradient.narrow(axis, 0, size - 1).sub_(change, alpha=scale)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * grad_outputs[0]


def _squared_differences(grid: Tensor, layers: slice) -> Tensor:
    """`_SquaredDifferences` of some layers of a grid [C, G, G, G]."""
    return _SquaredDifferences.apply(grid[:, layers])  # type: ignore[return-value]
