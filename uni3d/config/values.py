"""What a setting may be: schedules, names and ranges, and what a user reads when it is something else."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from uni3d.errors import ConfigError

Schedule = tuple[tuple[float, float], ...]

METHOD_NAMES: tuple[str, ...] = (
    "uni-instruct",
    "vsd",
    "sds",
    "diff-instruct",
    "di-plus-plus",
    "di-star",
    "dds",
    "csd",
    "ism",
    "sdi",
    "adv-sd",
    "jsd",
    "dmd",
    "dmd2",
    "red-diff",
    "swift-brush",
    "sim",
    "sid",
    "sida",
    "sid-lsg",
    "f-distill",
    "uni-instruct-integral",
    "uni-instruct-four-term",
    "uni-instruct-detached",
    "uni-instruct-released",
)
DIVERGENCE_NAMES: tuple[str, ...] = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "pearson_chi2",
    "neyman_chi2",
    "squared_hellinger",
    "softened_reverse_kl",
)
MAX_MIXTURE_WEIGHT = 1e9  # as in `losses.divergence`, where it is explained
MAX_SEED = 2**63 - 1


def value_at(schedule: Schedule, progress: float) -> float:
    """The schedule's value when the fraction `progress` of the run is done; flat outside its points."""
    first_position, first_value = schedule[0]
    if progress <= first_position:
        return first_value
    for (left, left_value), (right, right_value) in zip(schedule, schedule[1:], strict=False):
        if progress <= right:
            share = (progress - left) / (right - left) if right > left else 1.0
            return left_value + (right_value - left_value) * share
    return schedule[-1][1]


def parse_divergence(text: str) -> dict[str, float]:
    """Read `name`, or a mixture `0.4*name+0.6*name`, into weights by name; ConfigError if that fails."""
    weights: dict[str, float] = {}
    # The plus of an exponent such as 1e+2 separates nothing.
    for part in re.split(r"(?<![0-9.][eE])\+", text):
        weight_text, star, name = part.rpartition("*")
        name = name.strip().lower().replace("-", "_")
        if not name and text.strip():
            raise ConfigError(
                f"divergence {text[:80]!r}: a name is missing; expected for example "
                f"'0.4*forward_kl+0.6*reverse_kl'"
            )
        check_name("divergence", name, DIVERGENCE_NAMES)
        try:
            weight = float(weight_text) if star else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight <= MAX_MIXTURE_WEIGHT:
            raise ConfigError(
                f"divergence {text[:80]!r}: {weight_text.strip()[:80]!r} is not a positive weight up to "
                f"{MAX_MIXTURE_WEIGHT:g}; expected for example '0.4*forward_kl+0.6*reverse_kl'"
            )
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def check_method(method: str | None, divergence: str | None) -> None:
    """Raise ConfigError for a method or a divergence that nobody knows; None says nothing."""
    if method is not None:
        check_name("method", method.replace("_", "-"), METHOD_NAMES)
    if divergence is not None:
        parse_divergence(divergence)


def check_name(key: str, name: str, known: Sequence[str]) -> None:
    """Raise ConfigError with the nearest known name unless `name` is one of `known`."""
    if name in known:
        return
    raise ConfigError(f"unknown {key} {name[:80]!r}; {suggestion(name, known)}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """'did you mean ...?' for a near miss, else the list of what is known."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"


def check_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless low <= value <= high (so NaN is refused)."""
    if not low <= value <= high:
        raise ConfigError(f"{key} is {str(value)[:40]}; expected a number from {low:g} to {high:g}")


def check_ranges(group: str, settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise ConfigError for a number outside its range, in tuples too, and for an empty tuple."""
    for key, (low, high) in ranges.items():
        value: Any = getattr(settings, key)
        if value == ():
            raise ConfigError(f"{group}{key} is empty; expected at least one number")
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None:
                check_range(f"{group}{key}", number, low, high)


def check_pair(key: str, pair: tuple[float, float], low: float, high: float) -> None:
    """Raise ConfigError unless both numbers are in range and in rising order."""
    for value in pair:
        check_range(key, value, low, high)
    if pair[0] > pair[1]:
        raise ConfigError(f"{key} is {list(pair)}; expected the smaller number first")


def check_schedule(key: str, schedule: Schedule, low: float, high: float) -> None:
    """Raise ConfigError unless the positions rise from 0 to 1 and every value is in range."""
    if not schedule:
        raise ConfigError(f"{key} is empty; expected a number or pairs such as [[0, 12], [1, 6]]")
    positions = [position for position, _ in schedule]
    if positions != sorted(positions) or not all(0.0 <= position <= 1.0 for position in positions):
        raise ConfigError(
            f"{key} has the positions {positions}; expected fractions of the run from 0 to 1 in rising order"
        )
    for _, value in schedule:
        check_range(key, value, low, high)


def check_noise_and_scale(
    group: str, *, guidance_scale: Schedule, noise_max: Schedule, noise_min: Schedule, span: str
) -> None:
    """Raise ConfigError unless each can be followed and noise_min stays below noise_max, all over the `span`
    ("run" or "stage") of the schedules."""
    check_schedule(f"{group}guidance_scale", guidance_scale, 0.0, 1000.0)
    check_schedule(f"{group}noise_max", noise_max, 0.0, 1.0)
    check_schedule(f"{group}noise_min", noise_min, 0.0, 1.0)
    for progress in sorted({position for position, _ in noise_max + noise_min}):
        low, high = value_at(noise_min, progress), value_at(noise_max, progress)
        if low >= high:
            raise ConfigError(
                f"{group}noise_min is {low:g} and {group}noise_max is {high:g} at {progress:g} of the "
                f"{span}; noise_min must stay below noise_max"
            )
