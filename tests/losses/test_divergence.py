"""The divergence table against autograd of f, its limits, and its names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from uni3d.losses import divergence as divergences

MIXTURES = ({"forward_kl": 0.4, "reverse_kl": 0.6}, {"js": 2.0, "neyman_chi2": 0.1, "pearson_chi2": 0.3})
ALL = [*(divergences.get(name) for name in divergences.names()), *map(divergences.mixture, MIXTURES)]
WEIGHTS = ("score_weight", "square_weight", "score_slope", "square_slope", "potential")

every_divergence = pytest.mark.parametrize("f", ALL, ids=lambda f: f.name)


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


@every_divergence
def test_weights_are_the_derivatives_of_f(f: divergences.Divergence) -> None:
    r = torch.logspace(-2, 2, 81, dtype=torch.float64).requires_grad_()
    second = derivative(derivative(f.f(r), r), r)
    psi = r.square() * second
    torch.testing.assert_close(f.score_weight(r.log()), psi, rtol=1e-8, atol=1e-9)
    assert (psi > 0).all()

    log_r = r.detach().log().requires_grad_()
    slope = derivative(f.score_weight(log_r), log_r)  # r psi'(r)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(f.score_slope(log_r), slope, **close)
    torch.testing.assert_close(f.square_weight(log_r), f.score_weight(log_r) - slope, **close)
    torch.testing.assert_close(f.square_slope(log_r), derivative(f.square_weight(log_r), log_r), **close)
    torch.testing.assert_close(derivative(f.potential(log_r), log_r), -f.score_weight(log_r), **close)


@every_divergence
def test_f_is_zero_at_one_and_its_flags_are_true(f: divergences.Divergence) -> None:
    assert abs(f.f(torch.ones((), dtype=torch.float64)).item()) < 1e-15
    psi = f.score_weight(torch.linspace(-30, 30, 61, dtype=torch.float64))
    assert f.is_constant == bool((psi == psi[0]).all())
    assert f.is_bounded == bool(psi.max() < 10)


def test_values_at_two() -> None:
    """By hand from the definitions, so that no divergence is another one's."""
    two, log_two = torch.tensor([2.0]), torch.tensor([2.0]).log()
    expected = {  # f(2), psi(2), psi - r psi' at 2
        "forward_kl": (2 * math.log(2), 2.0, 0.0),
        "reverse_kl": (-math.log(2), 1.0, 1.0),
        "jeffreys": (math.log(2), 3.0, 1.0),
        "js": (2 * math.log(4 / 3) + math.log(2 / 3), 2 / 3, 4 / 9),
        "pearson_chi2": (1.0, 8.0, -8.0),
        "neyman_chi2": (0.5, 1.0, 2.0),
        "squared_hellinger": ((math.sqrt(2) - 1) ** 2, math.sqrt(2) / 2, math.sqrt(2) / 4),
        "softened_reverse_kl": (3 * math.log(3 / 4), 1 / 3, 5 / 9),
    }
    assert set(expected) == set(divergences.names())
    for name, values in expected.items():
        f = divergences.get(name)
        got = torch.cat([f.f(two), f.score_weight(log_two), f.square_weight(log_two)])
        torch.testing.assert_close(got, torch.tensor(values), rtol=1e-5, atol=1e-7, msg=name)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_at_the_limit_and_beyond(f: divergences.Divergence, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for values in ([-30.0, -29.5, 0.0, 29.5, 30.0], [-1e4, 1e4, -math.inf, math.inf]):
        for weight in WEIGHTS:
            log_ratio = torch.tensor([values], dtype=dtype).requires_grad_()
            value = getattr(f, weight)(log_ratio)
            (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
            assert value.dtype == wide and value.shape == log_ratio.shape
            assert value.isfinite().all() and gradient.isfinite().all(), weight
            if min(map(abs, values)) > 300:
                assert (gradient == 0).all()
        ratio = torch.tensor(values, dtype=torch.float64).exp().to(dtype).requires_grad_()
        value = f.f(ratio)
        (gradient,) = torch.autograd.grad(value.sum(), ratio)
        assert value.dtype == wide and value.isfinite().all()
        assert gradient.isfinite().all()


@every_divergence
def test_float32_keeps_its_digits_at_the_limit(f: divergences.Divergence) -> None:
    """Against float64: no cancellation, no saturated sigmoid."""
    log_ratio = torch.tensor([-30.0, -20.0, -5.0, 5.0, 20.0, 30.0])
    for weight in WEIGHTS[:4]:
        torch.testing.assert_close(
            getattr(f, weight)(log_ratio).double(), getattr(f, weight)(log_ratio.double()), rtol=2e-5, atol=0
        )


def test_clamping_is_constant_beyond_the_limit_and_nan_stays_nan() -> None:
    f = divergences.get("forward_kl")
    torch.testing.assert_close(f.score_weight(torch.tensor([31.0])), f.score_weight(torch.tensor([30.0])))
    assert f.score_weight(torch.tensor([math.nan])).isnan().all()
    assert f.f(torch.tensor([0.0])).isfinite().all()


def test_any_shape_and_integers() -> None:
    for shape in ((), (3,), (2, 1, 4), (0,)):
        for f in ALL:
            assert f.score_weight(torch.zeros(shape)).shape == shape
            assert f.f(torch.ones(shape, dtype=torch.int64)).shape == shape


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_mixture_is_the_weighted_sum(weights: dict[str, float]) -> None:
    mixed = divergences.mixture(weights)
    log_ratio = torch.linspace(-4, 4, 17, dtype=torch.float64)
    for method in WEIGHTS:
        parts = [
            weight * getattr(divergences.get(name), method)(log_ratio) for name, weight in weights.items()
        ]
        torch.testing.assert_close(getattr(mixed, method)(log_ratio), sum(parts))
    again = divergences.get(mixed.name)
    torch.testing.assert_close(again.f(log_ratio.exp()), mixed.f(log_ratio.exp()))


def test_the_largest_mixture_is_finite() -> None:
    mixed = divergences.mixture(dict.fromkeys(divergences.names(), divergences.MAX_MIXTURE_WEIGHT))
    for extreme in (-math.inf, -30.0, 30.0, math.inf):
        log_ratio = torch.tensor([extreme], requires_grad=True)
        for method in (*WEIGHTS, "potential"):
            value = getattr(mixed, method)(log_ratio)
            (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
            assert value.isfinite().all() and gradient.isfinite().all()


def test_jeffreys_is_the_sum_of_both_kl() -> None:
    both = divergences.mixture({"forward_kl": 1, "reverse_kl": 1})
    log_ratio = torch.linspace(-4, 4, 17, dtype=torch.float64)
    jeffreys = divergences.get("jeffreys")
    for method in WEIGHTS:
        torch.testing.assert_close(getattr(both, method)(log_ratio), getattr(jeffreys, method)(log_ratio))


def test_mixture_of_reverse_kl_alone_needs_no_ratio() -> None:
    assert divergences.mixture({"reverse_kl": 3, "forward_kl": 0}).is_constant
    assert not divergences.mixture({"reverse_kl": 3, "forward_kl": 1e-3}).is_constant


def test_names_in_any_spelling() -> None:
    assert divergences.get("Reverse-KL").name == "reverse_kl"
    assert divergences.get(divergences.get("js")).name == "js"
    assert divergences.get(" 1e-1*Forward-KL+2*js ").name == "0.1*forward_kl + 2.0*js"
    assert divergences.get("1e+2*js + 1*forward_kl").name == "100.0*js + 1.0*forward_kl"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergences.get("forward_lk"), "did you mean 'forward_kl'"),
        (lambda: divergences.get("wasserstein"), "choose one of forward_kl"),
        (lambda: divergences.get(3), "pass a Divergence"),  # type: ignore[arg-type]
        (lambda: divergences.get("0.4*forward_kl + x*js"), "cannot read 'x\\*js'"),
        (lambda: divergences.mixture({"forward_kl": -1.0, "js": 2.0}), "not negative"),
        (lambda: divergences.mixture({"forward_kl": math.nan}), "finite"),
        (lambda: divergences.mixture({"js": 1e300}), "js the weight 1e\\+300: .* at most 1e\\+09"),
        (lambda: divergences.mixture({"js": 10**400}), "js the weight 1000"),
        (lambda: divergences.mixture({"js": None}), "js the weight None"),  # type: ignore[dict-item]
        (lambda: divergences.mixture("js"), "got str for a mixture"),  # type: ignore[arg-type]
        (lambda: divergences.mixture({"js": 0.0}), "no positive weight"),
        (lambda: divergences.mixture({}), "no positive weight"),
        (lambda: divergences.mixture({"jss": 1.0}), "did you mean 'js'"),
    ],
)
def test_bad_names_and_weights(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call()
