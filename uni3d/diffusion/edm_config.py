"""The settings of an EDM network, and the published networks by name: plain data, without torch.

The networks are those of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
(arXiv 2206.00364, Table 7 and appendix F.3): DDPM++ and NCSN++ (Song et al., arXiv 2011.13456) and ADM
(Dhariwal and Nichol, arXiv 2105.05233), all three behind the same preconditioning.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from uni3d.errors import ConfigError

Body = Literal["ddpm++", "ncsn++", "adm"]
BODIES: tuple[Body, ...] = get_args(Body)

ADM_HEAD_CHANNELS = 64

# Lowest and highest value of each whole number: far beyond any published network, and small enough that a
# made-up file cannot ask for a network that no machine could even describe.
_RANGES = {
    "resolution": (4, 1024),
    "image_channels": (1, 64),
    "label_dim": (0, 100_000),
    "augment_dim": (0, 64),
    "model_channels": (4, 2048),
    "embedding_mult": (1, 16),
    "num_blocks": (1, 16),
}
_MAX_LEVELS = 8
_MAX_MULT = 16


@dataclass(frozen=True, kw_only=True)
class EDMConfig:
    """Everything that decides the tensors and the arithmetic of an EDM network.

    Start from a published one and change what differs: `dataclasses.replace(preset(name), num_blocks=1)`.
    Raises ConfigError, naming the field, for values no network can have.
    """

    body: Body
    """ddpm++ and ncsn++ are EDM's SongUNet ("vp" and "ve" in file names), adm its DhariwalUNet."""
    resolution: int
    """Side of the square images, pixels; divisible by 2 for every level but the first."""
    image_channels: int = 3
    """Colours."""
    label_dim: int = 0
    """Classes; 0 means an unconditional network."""
    augment_dim: int = 0
    """Entries of the augmentation label; 0 means none. EDM trains with 9."""
    model_channels: int
    """Channels that `channel_mult` multiplies; for adm below 64 there is no attention, as in EDM."""
    channel_mult: tuple[int, ...]
    """One multiplier for each level, finest first."""
    embedding_mult: int = 4
    """Width of the embedding, in model channels."""
    num_blocks: int
    """Residual blocks of each level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...]
    """Sides of the feature maps that attend, pixels."""
    dropout: float
    """Probability of zeroing an activation before the second convolution of a block, when training."""
    label_dropout: float = 0.0
    """Probability of zeroing a sample's class label, when training."""
    sigma_data: float = 0.5
    """Standard deviation of the data, in units of images in [-1, 1]."""

    def __post_init__(self) -> None:
        if self.body not in BODIES:
            raise ConfigError(f"body is {_shown(self.body)}; expected one of {', '.join(BODIES)}")
        for name, (low, high) in _RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in ("channel_mult", "attention_resolutions"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) > _MAX_LEVELS:
                raise ConfigError(f"{name} is {_shown(values)}; expected at most {_MAX_LEVELS} whole numbers")
            # A list would make the configuration mutable and unhashable.
            object.__setattr__(self, name, tuple(values))
        if not self.channel_mult:
            raise ConfigError("channel_mult is empty; expected one multiplier for each level")
        for value in self.channel_mult:
            _check_int("channel_mult", value, 1, _MAX_MULT)
        for value in self.attention_resolutions:
            _check_int("attention_resolutions", value, 1, 1024)
        for name in ("dropout", "label_dropout"):
            _check_float(name, getattr(self, name), low=0.0, high=1.0)
        _check_float("sigma_data", self.sigma_data, low=1e-6, high=1e6)
        step = 2 ** (len(self.channel_mult) - 1)
        if self.resolution % step:
            raise ConfigError(
                f"resolution is {self.resolution}; {len(self.channel_mult)} levels need a multiple of {step}"
            )
        if self.model_channels % 4:
            raise ConfigError(f"model_channels is {self.model_channels}; expected a multiple of 4")

    @property
    def resample_taps(self) -> tuple[int, ...]:
        """The filter of every change of resolution, along one axis, before normalisation."""
        return (1, 3, 3, 1) if self.body == "ncsn++" else (1, 1)

    @property
    def noise_channels(self) -> int:
        """Width of the embedding of the noise level, before the mapping layers."""
        return self.model_channels * (2 if self.body == "ncsn++" else 1)

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding that every block reads."""
        return self.model_channels * self.embedding_mult

    @property
    def feature_channels(self) -> int:
        """Channels F of the encoder's output [B, F, h, w]."""
        return self.model_channels * self.channel_mult[-1]

    @property
    def feature_resolution(self) -> int:
        """Side h = w of the encoder's output, pixels."""
        return self.resolution >> (len(self.channel_mult) - 1)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `from_dict` reads them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EDMConfig:
        """The inverse of `as_dict`. Raises ConfigError for missing, unknown or impossible fields."""
        fields = dataclasses.fields(cls)
        known = {item.name for item in fields}
        required = {item.name for item in fields if item.default is dataclasses.MISSING}
        for problem, names in (("unknown", set(values) - known), ("missing", required - set(values))):
            if names:
                shown = ", ".join(sorted(str(name)[:40] for name in names)[:5])
                raise ConfigError(f"{problem} settings of an EDM network: {shown}; correct the file")
        return cls(**values)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {_shown(value)}; expected a whole number from {low} to {high}")


def _check_float(name: str, value: object, *, low: float, high: float) -> None:
    is_number = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name} is {_shown(value)}; expected a number from {low:g} to {high:g}")


def _shown(value: object) -> str:
    """A value for a message; what is not plain is named by its type alone, since it may be of any size."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return repr(value)[:80]
    if isinstance(value, (tuple, list)) and all(type(item) in (int, float) for item in value[:20]):
        return repr(value[:20])[:80]
    return f"a {type(value).__name__}"


def _song(body: Body, resolution: int, label_dim: int, dropout: float) -> EDMConfig:
    return EDMConfig(
        body=body,
        resolution=resolution,
        label_dim=label_dim,
        augment_dim=9,
        model_channels=128,
        channel_mult=(2, 2, 2) if resolution == 32 else (1, 2, 2, 2),
        num_blocks=4,
        attention_resolutions=(16,),
        dropout=dropout,
    )


# By the names of NVIDIA's files, without "edm-" and ".pkl".
PRESETS: dict[str, EDMConfig] = {
    "cifar10-32x32-uncond-vp": _song("ddpm++", 32, 0, 0.13),
    "cifar10-32x32-cond-vp": _song("ddpm++", 32, 10, 0.13),
    "cifar10-32x32-uncond-ve": _song("ncsn++", 32, 0, 0.13),
    "cifar10-32x32-cond-ve": _song("ncsn++", 32, 10, 0.13),
    "ffhq-64x64-uncond-vp": _song("ddpm++", 64, 0, 0.05),
    "ffhq-64x64-uncond-ve": _song("ncsn++", 64, 0, 0.05),
    "afhqv2-64x64-uncond-vp": _song("ddpm++", 64, 0, 0.25),
    "afhqv2-64x64-uncond-ve": _song("ncsn++", 64, 0, 0.25),
    "imagenet-64x64-cond-adm": EDMConfig(
        body="adm",
        resolution=64,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attention_resolutions=(32, 16, 8),
        dropout=0.10,
    ),
}


def preset(name: str) -> EDMConfig:
    """The settings of a published network. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(PRESETS)}"
        raise ConfigError(f"unknown EDM network {_shown(name)}; {hint}")
    return PRESETS[name]
