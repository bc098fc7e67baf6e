"""The loss of the fake score: denoising score matching on the student's own samples.

The fake score D_p is a denoiser like the teacher, trained on what the student makes now, so that D_p(x_t)
becomes E[x0 | x_t] under the student. Weightings only change which noise levels matter, not the optimum.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.noise_schedule import time_weight
from uni3d.losses.per_sample import at_least_float32, mean_per_sample, per_sample, sum_per_sample

WEIGHTINGS = ("eps", "v", "edm", "x0")


def denoising_loss(
    prediction_x0: Tensor,
    x0: Tensor,
    sigma: Tensor | float,
    *,
    weighting: str = "eps",
    sigma_data: float = 0.5,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """weight(sigma) * |prediction_x0 - sg(x0)|^2 per sample, [B].

    `prediction_x0` [B, ...] is D_p(sg(x0) + sigma eps), `x0` [B, ...] the student's samples.
    `weighting` is the space in which the plain squared error is taken:

    - ``eps``: 1 / sigma^2, the error of the predicted noise (DDPM's simple loss);
    - ``v``: (1 + sigma^2) / sigma^2, the error of v = alpha eps - s x0;
    - ``edm``: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, the error of EDM's network output;
    - ``x0``: 1.

    `reduction` over the elements of one sample. The target is detached: this loss never moves the student.
    Raises ValueError for an unknown weighting or shapes that differ.
    """
    if prediction_x0.shape != x0.shape:
        raise ValueError(
            f"prediction_x0 has shape {tuple(prediction_x0.shape)}, x0 {tuple(x0.shape)}: they must be equal"
        )
    error = (at_least_float32(prediction_x0) - at_least_float32(x0.detach())).square()
    sigma = per_sample(sigma, prediction_x0, "sigma").detach()
    match canonical(weighting):
        case "eps" | "epsilon":
            weight = sigma.pow(-2)
        case "v" | "v_prediction":
            weight = 1 + sigma.pow(-2)
        case "edm":
            weight = time_weight("edm", sigma, sigma_data=sigma_data)
        case "x0" | "sample":
            weight = sigma.new_ones(sigma.shape)
        case _:
            raise unknown_name("fake score weighting", weighting, WEIGHTINGS)
    return weight * (mean_per_sample(error) if reduction == "mean" else sum_per_sample(error))
