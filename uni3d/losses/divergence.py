"""The f-divergences: D_f(q||p) = E_p[f(r)] with r = q/p, teacher over student, f convex, f(1) = 0.

With this direction `forward_kl` is KL(q||p) (covers the teacher's modes) and `reverse_kl` is KL(p||q) (seeks
one). A divergence enters the training losses only through psi(r) = r^2 f''(r), the weight of the squared
score difference in

    d/dsigma D_f(q_sigma||p_sigma) = -sigma E_p[psi(r) |grad log r|^2]           (Uni-Instruct, Theorem 3.1)

and through its derivatives. All are written in l = log r, the discriminator's logit, where they are sums of
exponentials and sigmoids: no ratio is ever formed and then divided.

**Clamping.** `log_ratio` is clamped to [-30, 30] in float32 (half precision is widened to float32 first) and
to [-300, 300] in float64, `ratio` to the exponentials of these; the largest power taken is r^2, so that
neither a value nor a gradient overflows (a gradient that goes back to a float16 input ends at 65504). Beyond
the limit the value is constant and the gradient zero; infinities are clamped as well. NaN stays NaN. Training
uses a far tighter limit (`discriminator.log_ratio_from_logits`); this one is about arithmetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.per_sample import at_least_float32

LOG_RATIO_LIMIT = {torch.float32: 30.0, torch.float64: 300.0}
# The largest slope at the limit, 4 e^60 of chi^2, is 5e26: 1e9 of it still is a float32.
MAX_MIXTURE_WEIGHT = 1e9

_Function = Callable[[Tensor], Tensor]


class _FromFloat16(torch.autograd.Function):
    """float16 to float32, with a gradient that ends at float16's largest number: e^30 is beyond it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        largest = torch.finfo(torch.float16).max
        return grad_outputs[0].clamp(-largest, largest).to(torch.float16)


def widen_ratio(ratio: Tensor) -> Tensor:
    """A ratio or log ratio (any shape and dtype) in float32 or better; its gradient fits its dtype."""
    return _FromFloat16.apply(ratio) if ratio.dtype == torch.float16 else at_least_float32(ratio)


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """`log_ratio` (any shape and dtype) in float32 or better, within `LOG_RATIO_LIMIT` of its dtype."""
    wide = widen_ratio(log_ratio)
    limit = LOG_RATIO_LIMIT[wide.dtype]
    return wide.clamp(-limit, limit)


@dataclass(frozen=True)
class Divergence:
    """One f-divergence. The tensors given to its methods may have any shape; results have the same shape.

    `is_constant`: psi does not depend on r, so no density ratio is needed. `is_bounded`: psi stays bounded
    for every r, so an unnormalised ratio cannot blow up.
    """

    name: str
    is_constant: bool
    is_bounded: bool
    _f: _Function = field(repr=False, compare=False)  # of r
    _psi: _Function = field(repr=False, compare=False)  # this and the rest: of log r
    _square: _Function = field(repr=False, compare=False)
    _score_slope: _Function = field(repr=False, compare=False)
    _square_slope: _Function = field(repr=False, compare=False)
    _potential: _Function = field(repr=False, compare=False)

    def f(self, ratio: Tensor) -> Tensor:
        """f(r) for r >= 0, clamped as the module says (so f(0) is f at the smallest ratio, not infinity)."""
        wide = widen_ratio(ratio)
        limit = LOG_RATIO_LIMIT[wide.dtype]
        return self._f(wide.clamp(math.exp(-limit), math.exp(limit)))

    def score_weight(self, log_ratio: Tensor) -> Tensor:
        """psi = r^2 f''(r) >= 0."""
        return self._psi(clamp_log_ratio(log_ratio))

    def square_weight(self, log_ratio: Tensor) -> Tensor:
        """psi - r psi'(r): the weight of |Delta|^2 in the exact generator loss."""
        return self._square(clamp_log_ratio(log_ratio))

    def score_slope(self, log_ratio: Tensor) -> Tensor:
        """r psi'(r), the derivative of `score_weight` with respect to log r."""
        return self._score_slope(clamp_log_ratio(log_ratio))

    def square_slope(self, log_ratio: Tensor) -> Tensor:
        """-r^2 psi''(r), the derivative of `square_weight` with respect to log r."""
        return self._square_slope(clamp_log_ratio(log_ratio))

    def potential(self, log_ratio: Tensor) -> Tensor:
        """F(l) with F' = -psi, that is f - r f' plus a constant.

        A generator that minimises F of an optimal discriminator's logit descends D_f: -log D is softened
        reverse KL, log(1 - D) is Jensen-Shannon, -l is reverse KL, -exp(l) is forward KL.
        """
        return self._potential(clamp_log_ratio(log_ratio))


# 0 * log_r keeps a constant weight in the autograd graph, so that its gradient is zero and not an error.
_TABLE = (
    Divergence(
        "forward_kl",
        is_constant=False,
        is_bounded=False,
        _f=lambda r: r * r.log(),
        _psi=lambda log_r: log_r.exp(),
        _square=lambda log_r: 0 * log_r,
        _score_slope=lambda log_r: log_r.exp(),
        _square_slope=lambda log_r: 0 * log_r,
        _potential=lambda log_r: -log_r.exp(),
    ),
    Divergence(
        "reverse_kl",
        is_constant=True,
        is_bounded=True,
        _f=lambda r: -r.log(),
        _psi=lambda log_r: 1 + 0 * log_r,
        _square=lambda log_r: 1 + 0 * log_r,
        _score_slope=lambda log_r: 0 * log_r,
        _square_slope=lambda log_r: 0 * log_r,
        _potential=lambda log_r: -log_r,
    ),
    Divergence(  # KL(q||p) + KL(p||q)
        "jeffreys",
        is_constant=False,
        is_bounded=False,
        _f=lambda r: (r - 1) * r.log(),
        _psi=lambda log_r: 1 + log_r.exp(),
        _square=lambda log_r: 1 + 0 * log_r,
        _score_slope=lambda log_r: log_r.exp(),
        _square_slope=lambda log_r: 0 * log_r,
        _potential=lambda log_r: -log_r - log_r.exp(),
    ),
    Divergence(  # KL(q||m) + KL(p||m), m = (p + q)/2: twice the usual Jensen-Shannon divergence
        "js",
        is_constant=False,
        is_bounded=True,
        _f=lambda r: r * (logsigmoid(r.log()) + math.log(2)) + logsigmoid(-r.log()) + math.log(2),
        _psi=lambda log_r: log_r.sigmoid(),
        _square=lambda log_r: log_r.sigmoid().square(),
        _score_slope=lambda log_r: log_r.sigmoid() * (-log_r).sigmoid(),
        _square_slope=lambda log_r: 2 * log_r.sigmoid().square() * (-log_r).sigmoid(),
        _potential=lambda log_r: logsigmoid(-log_r),
    ),
    Divergence(  # integral of (q - p)^2 / p
        "pearson_chi2",
        is_constant=False,
        is_bounded=False,
        _f=lambda r: (r - 1).square(),
        _psi=lambda log_r: 2 * (2 * log_r).exp(),
        _square=lambda log_r: -2 * (2 * log_r).exp(),
        _score_slope=lambda log_r: 4 * (2 * log_r).exp(),
        _square_slope=lambda log_r: -4 * (2 * log_r).exp(),
        _potential=lambda log_r: -(2 * log_r).exp(),
    ),
    Divergence(  # integral of (q - p)^2 / q
        "neyman_chi2",
        is_constant=False,
        is_bounded=False,
        _f=lambda r: (r - 1).square() / r,
        _psi=lambda log_r: 2 * (-log_r).exp(),
        _square=lambda log_r: 4 * (-log_r).exp(),
        _score_slope=lambda log_r: -2 * (-log_r).exp(),
        _square_slope=lambda log_r: -4 * (-log_r).exp(),
        _potential=lambda log_r: 2 * (-log_r).exp(),
    ),
    Divergence(  # integral of (sqrt q - sqrt p)^2
        "squared_hellinger",
        is_constant=False,
        is_bounded=False,
        _f=lambda r: (r.sqrt() - 1).square(),
        _psi=lambda log_r: (log_r / 2).exp() / 2,
        _square=lambda log_r: (log_r / 2).exp() / 4,
        _score_slope=lambda log_r: (log_r / 2).exp() / 4,
        _square_slope=lambda log_r: (log_r / 2).exp() / 8,
        _potential=lambda log_r: -(log_r / 2).exp(),
    ),
    Divergence(  # f-distill's; what the non-saturating GAN loss -log D minimises
        "softened_reverse_kl",
        is_constant=False,
        is_bounded=True,
        _f=lambda r: -(1 + r) * (logsigmoid(r.log()) + math.log(2)),
        _psi=lambda log_r: (-log_r).sigmoid(),
        _square=lambda log_r: (-log_r).sigmoid() * (1 + log_r.sigmoid()),
        _score_slope=lambda log_r: -log_r.sigmoid() * (-log_r).sigmoid(),
        _square_slope=lambda log_r: -2 * log_r.sigmoid().square() * (-log_r).sigmoid(),
        _potential=lambda log_r: -logsigmoid(log_r),
    ),
)
_BY_NAME = {divergence.name: divergence for divergence in _TABLE}


def names() -> list[str]:
    """The names that `get` knows, mixtures aside."""
    return list(_BY_NAME)


def get(name: str | Divergence) -> Divergence:
    """The divergence called `name` (dashes and underscores are one), or `name` itself if it is one already.

    A mixture is written as "0.4*forward_kl + 0.6*reverse_kl", which is also the `name` of a mixture object.
    Raises ValueError with the nearest name for an unknown one.
    """
    if isinstance(name, Divergence):
        return name
    if not isinstance(name, str):
        raise ValueError(
            f"got {type(name).__name__} for a divergence: pass a Divergence or one of {', '.join(names())}"
        )
    if "*" in name or "+" in name:
        return mixture(_parse_mixture(name))
    found = _BY_NAME.get(canonical(name))
    if found is None:
        raise unknown_name("divergence", name, names())
    return found


def mixture(weights: Mapping[str, float]) -> Divergence:
    """The divergence sum_i w_i D_{f_i}, for example {"forward_kl": 0.4, "reverse_kl": 0.6}.

    Weights are from 0 to 1e9, at least one is positive, and they need not sum to one (scaling f scales psi).
    Raises ValueError otherwise, or for an unknown name.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(
            f'got {type(weights).__name__} for a mixture: pass weights by name, such as {{"forward_kl": 0.4}}'
        )
    parts = [(_mixture_weight(get(name), weight), get(name)) for name, weight in weights.items()]
    parts = [(weight, part) for weight, part in parts if weight > 0]
    if not parts:
        raise ValueError(
            f"the mixture {dict(weights)} has no positive weight: give one to at least one divergence"
        )

    def weighted(attribute: str) -> _Function:
        functions = [(weight, getattr(part, attribute)) for weight, part in parts]
        return lambda x: torch.stack([weight * function(x) for weight, function in functions]).sum(dim=0)

    return Divergence(
        " + ".join(f"{weight!r}*{part.name}" for weight, part in parts),
        is_constant=all(part.is_constant for _, part in parts),
        is_bounded=all(part.is_bounded for _, part in parts),
        _f=weighted("_f"),
        _psi=weighted("_psi"),
        _square=weighted("_square"),
        _score_slope=weighted("_score_slope"),
        _square_slope=weighted("_square_slope"),
        _potential=weighted("_potential"),
    )


def _mixture_weight(part: Divergence, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MAX_MIXTURE_WEIGHT:
        raise ValueError(
            f"the mixture gives {part.name} the weight {str(weight)[:40]}: weights must be finite and not "
            f"negative, at most {MAX_MIXTURE_WEIGHT:g}"
        )
    return number


def _parse_mixture(text: str) -> dict[str, float]:
    """Reads "0.4*forward_kl + 0.6*reverse_kl" into {"forward_kl": 0.4, "reverse_kl": 0.6}."""
    weights: dict[str, float] = {}
    for part in re.split(
        r"(?<![0-9.][eE])\+", text
    ):  # the plus of an exponent such as 1e+2 separates nothing
        number, star, name = part.partition("*")
        try:
            weight = float(number) if star else 1.0
        except ValueError:
            raise ValueError(
                f"cannot read {part.strip()!r} in the mixture {text!r}: write 0.4*forward_kl + 0.6*reverse_kl"
            ) from None
        key = canonical(name if star else part)
        weights[key] = weights.get(key, 0.0) + weight
    return weights
