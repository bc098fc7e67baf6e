"""Noise levels: the table and its inverse, conversions between forms, weights, sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from uni3d.losses import noise_schedule as ns

SCHEDULE = ns.DiscreteVPSchedule.scaled_linear()


def test_table_matches_stable_diffusion() -> None:
    """alphas_cumprod of scaled_linear 0.00085-0.012, computed step by step, and the known end points."""
    product, expected = 1.0, []
    for i in range(1000):
        root = 0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)
        product *= 1 - root**2
        expected.append(math.sqrt((1 - product) / product))
    sigma = SCHEDULE.sigma(torch.arange(1000))
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)
    assert SCHEDULE.num_timesteps == 1000
    assert SCHEDULE.sigma_min == pytest.approx(0.02917, abs=1e-5)
    assert SCHEDULE.sigma_max == pytest.approx(14.6146, abs=1e-3)


def test_log_interpolation_between_timesteps() -> None:
    sigma = SCHEDULE.sigma(torch.tensor([10.0, 10.25, 11.0], dtype=torch.float64))
    expected = sigma[0].log() * 0.75 + sigma[2].log() * 0.25
    torch.testing.assert_close(sigma[1].log(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_timestep_inverts_sigma(dtype: torch.dtype) -> None:
    t = torch.cat([torch.arange(1000.0), 999 * torch.rand(500)]).to(dtype).reshape(10, -1)
    back = SCHEDULE.timestep(SCHEDULE.sigma(t))
    assert back.dtype == dtype and back.shape == t.shape
    torch.testing.assert_close(back, t, rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-9)


def test_outside_the_table_is_clamped_and_floats_are_taken() -> None:
    assert SCHEDULE.sigma(-5.0) == SCHEDULE.sigma(0)
    assert SCHEDULE.sigma(5000) == SCHEDULE.sigma(999)
    assert SCHEDULE.timestep(1e-9) == 0 and SCHEDULE.timestep(1e9) == 999
    assert SCHEDULE.sigma(3).shape == () and SCHEDULE.sigma(torch.zeros(0)).shape == (0,)


def test_half_precision_timesteps_are_computed_in_float32() -> None:
    assert SCHEDULE.sigma(torch.tensor([1.0], dtype=torch.float16)).dtype == torch.float32


def test_density_is_that_of_uniform_timesteps() -> None:
    low, high = 0.02, 0.5
    edges = SCHEDULE.sigma(torch.tensor([low * 999, high * 999], dtype=torch.float64))
    sigma = torch.linspace(edges[0].item(), edges[1].item(), 200_001, dtype=torch.float64)
    density = SCHEDULE.density(sigma, low, high)
    step = sigma[1] - sigma[0]
    assert (density[:-1].sum() * step).item() == pytest.approx(1.0, abs=1e-3)
    below = SCHEDULE.sigma(torch.tensor(0.2 * 999, dtype=torch.float64))
    assert (density[sigma < below].sum() * step).item() == pytest.approx(0.18 / 0.48, abs=1e-3)
    assert SCHEDULE.density(torch.tensor([0.01, 14.0]), low, high).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "table", [[0.9], [[0.9, 0.8]], [0.9, 0.95], [1.0, 0.9], [0.9, 0.0], [0.9, 0.9], [0.9, math.nan]]
)
def test_bad_tables(table: list[float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ns.DiscreteVPSchedule(table)


def example(form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in `form`, x0, eps [4, 2, 3] and sigma [4]."""
    x0, eps = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    sigma = torch.tensor([0.03, 0.5, 1.0, 12.0], dtype=torch.float64)
    column = sigma[:, None, None]
    alpha, s = (1 + column**2).rsqrt(), column * (1 + column**2).rsqrt()
    return (x0 + column * eps if form == "ve" else alpha * x0 + s * eps), x0, eps, sigma


@pytest.mark.parametrize("form", ["ve", "vp"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0", "epsilon", "v_prediction", "sample", "v-prediction"])
def test_predictions_convert_both_ways(form: ns.Form, kind: str) -> None:
    x, x0, eps, sigma = example(form)
    column = sigma[:, None, None]
    alpha, s = (1 + column**2).rsqrt(), column * (1 + column**2).rsqrt()
    output = {"e": eps, "v": alpha * eps - s * x0, "x": x0, "s": x0}[kind[0]]
    torch.testing.assert_close(ns.x0_from_prediction(output, x, sigma, kind, form), x0)
    torch.testing.assert_close(ns.prediction_from_x0(x0, x, sigma, kind, form), output)


def test_forms_convert_both_ways() -> None:
    ve, x0, eps, sigma = example("ve")
    column = sigma[:, None, None]
    vp = (x0 + column * eps) / (1 + column**2).sqrt()
    torch.testing.assert_close(ns.vp_from_ve(ve, sigma), vp)
    torch.testing.assert_close(ns.ve_from_vp(vp, sigma), ve)
    assert ns.vp_from_ve(ve.half(), 1.0).dtype == torch.float32
    # Flow matching: (1 - t) x0 + t eps.
    t = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    x, flow_sigma = ns.ve_from_scaled((1 - t)[:, None, None] * x0 + t[:, None, None] * eps, 1 - t, t)
    torch.testing.assert_close(flow_sigma, t / (1 - t))
    torch.testing.assert_close(x, x0 + flow_sigma[:, None, None] * eps)


def test_unknown_prediction_type_and_form() -> None:
    x, x0, _, sigma = example("ve")
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        ns.x0_from_prediction(x0, x, sigma, "epsilom")
    with pytest.raises(ValueError, match="form of x"):
        ns.x0_from_eps(x, x0, sigma, "fm")  # type: ignore[arg-type]


def test_time_weights_in_the_units_they_are_named_for() -> None:
    sigma = torch.tensor([0.05, 0.7, 1.0, 9.0], dtype=torch.float64)
    alpha_bar = 1 / (1 + sigma**2)
    on_eps = sigma  # Delta = sigma * (difference of eps-predictions)
    expected = {
        "uniform": torch.ones(4, dtype=torch.float64),
        "vsd": (1 - alpha_bar) / on_eps,
        "eps": 1 / on_eps,
        "sds_sqrt": alpha_bar.sqrt() * (1 - alpha_bar) / on_eps,
        "integral": sigma**-2,
        "edm": (sigma**2 + 0.25) / (0.5 * sigma) ** 2,
        "expansion": sigma**-3,
        "sim": (1 - alpha_bar) / on_eps**2,
        "vsd_expansion": (sigma - sigma.arctan()) / sigma**2,
    }
    assert list(expected) == ns.time_weight_names()
    for name, weight in expected.items():
        torch.testing.assert_close(ns.time_weight(name, sigma), weight, msg=name)
        assert ns.time_weight(name, sigma.reshape(2, 2).float()).shape == (2, 2)
    with pytest.raises(ValueError, match="did you mean 'vsd'"):
        ns.time_weight("vds", sigma)


def test_vsd_expansion_does_not_cancel() -> None:
    sigma = torch.tensor([1e-4, 1e-2, 0.0999, 0.1001, 1.0])
    exact = sigma.double()
    expected = torch.where(exact < 0.02, exact / 3 - exact**3 / 5, (exact - exact.arctan()) / exact**2)
    torch.testing.assert_close(ns.time_weight("vsd_expansion", sigma).double(), expected, rtol=3e-5, atol=0)


def test_lognormal_and_rho_samples() -> None:
    seed = torch.Generator().manual_seed(0)
    log_sigma = ns.sample_lognormal_sigma(20_000, generator=seed).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)

    levels = ns.karras_sigmas(18)
    assert levels[0].item() == pytest.approx(80.0, rel=1e-5)
    assert levels[-1].item() == pytest.approx(0.002, rel=1e-3)
    root = levels.double() ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(17), rtol=1e-4, atol=0)
    drawn = ns.sample_rho_sigma(20_000, sigma_max=24.4, generator=seed)
    assert 0.002 <= drawn.min() and drawn.max() <= 24.4001
    assert drawn.median().item() == pytest.approx(((24.4 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7, rel=0.05)


def test_timestep_window_anneals() -> None:
    step = ns.TimestepWindow(0.02, 0.98, final_maximum=0.5, anneal_start=0.2, anneal_end=0.2)
    assert step.at(0.0) == (0.02, 0.98) and step.at(0.19) == (0.02, 0.98)
    assert step.at(0.2) == (0.02, 0.5) and step.at(1.0) == (0.02, 0.5)
    slope = ns.TimestepWindow(
        0.1, 0.9, final_minimum=0.0, final_maximum=0.3, anneal_start=0.5, anneal_end=1.0
    )
    assert slope.at(0.5) == (0.1, 0.9)
    assert slope.at(0.75) == pytest.approx((0.05, 0.6))
    assert slope.at(2.0) == pytest.approx((0.0, 0.3))
    assert ns.TimestepWindow().at(0.7) == (0.02, 0.98)


def test_timestep_window_samples() -> None:
    window = ns.TimestepWindow(0.1, 0.9, final_maximum=0.4)
    seed = torch.Generator().manual_seed(0)
    t = window.sample(5000, 1.0, generator=seed)
    assert 99.9 <= t.min() and t.max() <= 0.4 * 999
    assert t.mean().item() == pytest.approx(0.25 * 999, rel=0.02)
    stratified = window.sample(8, stratified=True, generator=seed)
    width = 0.8 * 999 / 8
    assert ((stratified - 99.9) / width).floor().tolist() == list(range(8))


@pytest.mark.parametrize(
    "values",
    [{"minimum": 0.5, "maximum": 0.4}, {"final_maximum": 0.01}, {"anneal_start": 0.6, "anneal_end": 0.5}],
)
def test_bad_windows(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ns.TimestepWindow(**values)


# ---- rectified flow


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_those_of_shifted_times(shift: float) -> None:
    schedule = ns.FlowSchedule(1000, shift=shift)
    assert schedule.num_timesteps == 999  # pure noise has no finite sigma
    index = torch.tensor([0, 499, 998], dtype=torch.float64)
    time = (index + 1) / 1000
    time = shift * time / (1 + (shift - 1) * time)
    torch.testing.assert_close(schedule.sigma(index), time / (1 - time))
    torch.testing.assert_close(ns.flow_time(schedule.sigma(index)), time)
    torch.testing.assert_close(schedule.timestep(schedule.sigma(index)), index)
    with pytest.raises(ValueError, match="shift > 0"):
        ns.FlowSchedule(1000, shift=0.0)


def test_velocity_is_the_flows_derivative() -> None:
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.2, 40.0], dtype=torch.float64)
    x = x0 + sigma[:, None, None, None] * eps
    time = ns.flow_time(sigma)[:, None, None, None]
    torch.testing.assert_close(ns.flow_from_ve(x, sigma), (1 - time) * x0 + time * eps)
    torch.testing.assert_close(ns.x0_from_prediction(eps - x0, x, sigma, "velocity"), x0)
    torch.testing.assert_close(ns.prediction_from_x0(x0, x, sigma, "flow_prediction"), eps - x0)


@pytest.mark.parametrize("table", [[0.0], [0.0, math.inf], [1.0, 0.5], [[0.0, 1.0]]])
def test_a_table_of_levels_must_rise(table: list[float]) -> None:
    with pytest.raises(ValueError, match="log_sigmas"):
        ns.SigmaTable(torch.tensor(table))
