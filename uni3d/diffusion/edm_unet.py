"""The bodies of EDM networks: F(x, c_noise, labels), without the preconditioning that `edm` puts around.

DDPM++ and NCSN++ (Song et al., arXiv 2011.13456) and ADM (Dhariwal and Nichol, arXiv 2105.05233) in the form
of Karras et al. (arXiv 2206.00364, Table 7), written anew; parameters and buffers carry the names that EDM's
files have, so that its weights load strictly. A body computes in the dtype of its input, whatever its
parameters are stored in, except for the embedding, which stays float32.
Legend: B batch, C channels, H W pixels, E embedding channels, N = H * W tokens, F feature channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from uni3d.diffusion.edm_config import ADM_HEAD_CHANNELS, EDMConfig
from uni3d.errors import ConfigError

Resample = Literal["none", "up", "down"]


@dataclass(frozen=True)
class Init:
    """How a layer begins: a distribution scaled by fans, times a gain; biases the same, times theirs."""

    distribution: Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"]
    gain: float = 1.0
    bias_gain: float = 0.0

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
        """Draw `weight` [out, in, ...] and `bias` [out] in place."""
        fan_in, receptive = weight[0].numel(), weight[0, 0].numel()
        for tensor, gain in ((weight, self.gain), (bias, self.bias_gain)):
            if tensor is None:
                continue
            match self.distribution:
                case "xavier_uniform":
                    bound = math.sqrt(6 / (fan_in + weight.shape[0] * receptive))
                    tensor.uniform_(-bound, bound, generator=generator)
                case "kaiming_uniform":
                    bound = math.sqrt(3 / fan_in)
                    tensor.uniform_(-bound, bound, generator=generator)
                case "kaiming_normal":
                    tensor.normal_(0, math.sqrt(1 / fan_in), generator=generator)
            tensor.mul_(gain)


class Linear(nn.Module):
    """[..., in] -> [..., out] in the dtype of the input."""

    def __init__(self, in_features: int, out_features: int, init: Init, *, has_bias: bool = True) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class Conv2d(nn.Module):
    """A convolution that keeps the size, after doubling or halving it with the filter `taps`.

    `kernel=0` changes the size alone and has no weight. `filters_last` is NCSN++'s fused form of halving: the
    convolution comes first, on an input padded for both. The filter is the buffer `resample_filter`.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init,
        *,
        resample: Resample = "none",
        taps: tuple[int, ...] = (1, 1),
        filters_last: bool = False,
    ) -> None:
        super().__init__()
        self.init = init
        self.resample: Resample = resample
        self.is_box = taps == (1, 1)
        self.filters_last = filters_last
        self.padding = kernel // 2
        self.filter_padding = (len(taps) - 1) // 2
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape)) if kernel else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if kernel else None
        self.register_buffer("resample_filter", None if resample == "none" else box_or_fir(taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return self._resampled(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if self.filters_last:
            # The filter sums to one and pads nothing here, so the bias passes through it unchanged.
            x = functional.conv2d(x, weight, bias, padding=self.padding + self.filter_padding)
            return functional.conv2d(x, self._depthwise(x), stride=2, groups=x.shape[1])
        return functional.conv2d(self._resampled(x), weight, bias, padding=self.padding)

    def _resampled(self, x: Tensor) -> Tensor:
        match self.resample:
            case "none":
                return x
            case "up" if self.is_box:
                return functional.interpolate(x, scale_factor=2, mode="nearest")
            case "down" if self.is_box:
                return functional.avg_pool2d(x, 2)
            case "up":
                return functional.conv_transpose2d(
                    x, 4 * self._depthwise(x), stride=2, padding=self.filter_padding, groups=x.shape[1]
                )
            case "down":
                return functional.conv2d(
                    x, self._depthwise(x), stride=2, padding=self.filter_padding, groups=x.shape[1]
                )

    def _depthwise(self, x: Tensor) -> Tensor:
        """The filter for every channel of x [B, C, H, W]: [C, 1, k, k]."""
        assert self.resample_filter is not None
        size = self.resample_filter.shape[-1]
        return self.resample_filter.to(x.dtype).expand(x.shape[1], 1, size, size)


def box_or_fir(taps: tuple[int, ...]) -> Tensor:
    """The outer product of `taps` with itself, normalised to sum one: float32 [1, 1, k, k]."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / sum(taps) ** 2)[None, None]


class GroupNorm(nn.Module):
    """Group normalisation with at most 32 groups of at least four channels."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.num_groups = min(32, channels // 4)
        self.eps = eps
        if channels % self.num_groups:
            raise ConfigError(
                f"a layer would have {channels} channels, which {self.num_groups} groups do not divide; "
                f"choose model_channels as a multiple of 32"
            )
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return functional.group_norm(x, self.num_groups, weight, bias, self.eps)


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one body have in common."""

    embedding_channels: int
    dropout: float
    eps: float
    gain: float
    """Multiplies the sum of a residual branch and its skip: sqrt(1/2) keeps the variance, 1 does nothing."""
    has_scale: bool
    """The embedding scales and shifts the normalised activations, or only shifts them before the norm."""
    always_projects: bool
    """The skip of a block that changes the resolution alone has a 1x1 convolution, too."""
    head_channels: int | None
    """Channels of an attention head; None means one head."""
    taps: tuple[int, ...]
    init: Init
    init_last: Init
    init_attention: Init


class Block(nn.Module):
    """A residual block with optional change of resolution and self-attention.

    x [B, in, H, W] and embedding float32 [B, E] -> [B, out, H', W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        skip_channels: int = 0,
        resample: Resample = "none",
        has_attention: bool = False,
    ) -> None:
        super().__init__()
        in_channels += skip_channels
        self.takes_skip = skip_channels > 0
        self.dropout, self.gain, self.has_scale = style.dropout, style.gain, style.has_scale
        heads = 1 if style.head_channels is None else out_channels // style.head_channels
        self.num_heads = heads if has_attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ConfigError(
                f"a layer would have {out_channels} channels for {self.num_heads} attention heads; choose "
                f"model_channels as a multiple of {style.head_channels}"
            )

        def conv(inputs: int, outputs: int, kernel: int, init: Init, resample: Resample = "none") -> Conv2d:
            return Conv2d(inputs, outputs, kernel, init, resample=resample, taps=style.taps)

        def norm(channels: int) -> GroupNorm:
            return GroupNorm(channels, eps=style.eps)

        self.norm0 = norm(in_channels)
        self.conv0 = conv(in_channels, out_channels, 3, style.init, resample)
        self.affine = Linear(style.embedding_channels, out_channels * (1 + self.has_scale), style.init)
        self.norm1 = norm(out_channels)
        self.conv1 = conv(out_channels, out_channels, 3, style.init_last)
        self.skip = None
        if in_channels != out_channels or resample != "none":
            kernel = 1 if style.always_projects or in_channels != out_channels else 0
            self.skip = conv(in_channels, out_channels, kernel, style.init, resample)
        if self.num_heads:
            self.norm2 = norm(out_channels)
            self.qkv = conv(out_channels, 3 * out_channels, 1, style.init_attention)
            self.proj = conv(out_channels, out_channels, 1, style.init_last)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.conv0(silu(self.norm0(x)))
        modulation = self.affine(embedding)[:, :, None, None].to(hidden.dtype)
        if self.has_scale:
            scale, shift = modulation.chunk(2, dim=1)
            hidden = torch.addcmul(shift, self.norm1(hidden), scale + 1)
        else:
            hidden = self.norm1(hidden + modulation)
        hidden = functional.dropout(silu(hidden), self.dropout, self.training)
        hidden = self.conv1(hidden)
        x = self._sum(hidden, x if self.skip is None else self.skip(x))
        return self._sum(self._attention(x), x) if self.num_heads else x

    def _sum(self, branch: Tensor, skip: Tensor) -> Tensor:
        total = branch + skip
        return total if self.gain == 1 else total * self.gain

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels, [B, C, H, W] -> [B, C, H, W].

        EDM's files order the rows of `qkv` as (head, channel, {q, k, v}). Sorting the rows of the weight
        instead of the activations costs next to nothing and leaves q, k and v dense in their last axis,
        which the fused kernels need.
        """
        batch, channels, height, width = x.shape
        heads, size = self.num_heads, channels // self.num_heads
        assert self.qkv.weight is not None and self.qkv.bias is not None
        assert self.proj.weight is not None and self.proj.bias is not None
        weight = self.qkv.weight.to(x.dtype).view(heads, size, 3, channels).permute(2, 0, 1, 3)
        bias = self.qkv.bias.to(x.dtype).view(heads, size, 3).permute(2, 0, 1)
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # [B, N, C]
        qkv = functional.linear(tokens, weight.reshape(3 * channels, channels), bias.reshape(-1))
        q, k, v = qkv.view(batch, height * width, 3, heads, size).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)  # [B, heads, N, C / heads], scale by size
        mixed = mixed.transpose(1, 2).reshape(batch, height * width, channels)
        projection = self.proj.weight.to(x.dtype).view(channels, channels)
        mixed = functional.linear(mixed, projection, self.proj.bias.to(x.dtype))
        return mixed.transpose(1, 2).reshape(batch, channels, height, width)


class FourierFeatures(nn.Module):
    """Random frequencies of the noise level, [B] -> [B, 2 * len(freqs)]; NCSN++ stores them as a buffer."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, noise: Tensor) -> Tensor:
        angles = torch.outer(noise, 2 * math.pi * self.freqs.to(noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def noise_angles(noise: Tensor, channels: int, *, reaches_end: bool) -> Tensor:
    """noise [B] times frequencies from 1 down to 1/10000, [B, channels / 2]; DDPM++ reaches the last one."""
    half = channels // 2
    steps = torch.arange(half, dtype=noise.dtype, device=noise.device) / (half - reaches_end)
    return torch.outer(noise, 1e-4**steps)


class EDMBody(nn.Module):
    """What the bodies share: the encoder, the decoder, and the walk through both."""

    def __init__(self, config: EDMConfig, style: BlockStyle) -> None:
        super().__init__()
        self.config = config
        self.map_label: Linear | None = None
        self.map_augment: Linear | None = None
        self.style = style

    def embed(self, noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """noise [B], labels [B, label_dim], augment_labels [B, augment_dim], all float32 -> [B, E]."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """The decoder's last activations -> [B, image_channels, H, W]."""
        raise NotImplementedError

    def encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x [B, image_channels, H, W] -> (bottleneck [B, F, h, w], what each layer gives the decoder)."""
        skips: list[Tensor] = []
        residual = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = residual = (x + layer(residual)) * math.sqrt(0.5)
                skips[-1] = x
                continue
            x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        return x, skips

    def decode(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """What `encode` returned -> [B, image_channels, H, W]."""
        remaining = list(skips)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                x = layer(torch.cat([x, remaining.pop()], dim=1) if layer.takes_skip else x, embedding)
        return self.head(x)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters as EDM does before training (arXiv 2206.00364, appendix F.3)."""
        for module in self.modules():
            if isinstance(module, (Linear, Conv2d)) and module.weight is not None:
                module.init.fill(module.weight, module.bias, generator)
            elif isinstance(module, FourierFeatures):
                module.freqs.normal_(0, 16, generator=generator)

    def _build(self, first_width: int) -> None:
        """Make `enc` and `dec`; the order of their entries is the order in which they run."""
        config, style = self.config, self.style
        is_adm = config.body == "adm"
        levels = [
            (config.resolution >> level, config.model_channels * mult)
            for level, mult in enumerate(config.channel_mult)
        ]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = first_width
        skip_widths = [width]
        self.enc[f"{config.resolution}x{config.resolution}_conv"] = Conv2d(
            config.image_channels, width, 3, style.init
        )
        residual_width = config.image_channels
        for level, (side, level_width) in enumerate(levels):
            name = f"{side}x{side}"
            if level > 0:
                self.enc[f"{name}_down"] = Block(width, width, style, resample="down")
                skip_widths.append(width)
                if config.body == "ncsn++":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        residual_width,
                        width,
                        3,
                        style.init,
                        resample="down",
                        taps=style.taps,
                        filters_last=True,
                    )
                    residual_width = width
            attends = side in config.attention_resolutions
            for index in range(config.num_blocks):
                block = Block(width, level_width, style, has_attention=attends)
                self.enc[f"{name}_block{index}"] = block
                width = level_width
                skip_widths.append(width)
        for level, (side, level_width) in reversed(list(enumerate(levels))):
            name = f"{side}x{side}"
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = Block(width, width, style, has_attention=True)
                self.dec[f"{name}_in1"] = Block(width, width, style)
            else:
                self.dec[f"{name}_up"] = Block(width, width, style, resample="up")
            for index in range(config.num_blocks + 1):
                attends = side in config.attention_resolutions and (is_adm or index == config.num_blocks)
                self.dec[f"{name}_block{index}"] = Block(
                    width, level_width, style, skip_channels=skip_widths.pop(), has_attention=attends
                )
                width = level_width

    def _dropped(self, labels: Tensor) -> Tensor:
        """Class labels [B, label_dim], a share of the rows zeroed when training with label dropout."""
        probability = self.config.label_dropout
        if not self.training or probability == 0:
            return labels
        keep = torch.rand(labels.shape[0], 1, device=labels.device) >= probability
        return labels * keep.to(labels.dtype)


class SongBody(EDMBody):
    """DDPM++ and NCSN++: shift-only blocks of constant variance, one attention head."""

    def __init__(self, config: EDMConfig) -> None:
        init = Init("xavier_uniform")
        last = Init("xavier_uniform", 1e-5)
        style = BlockStyle(
            embedding_channels=config.embedding_channels,
            dropout=config.dropout,
            eps=1e-6,
            gain=math.sqrt(0.5),
            has_scale=False,
            always_projects=True,
            head_channels=None,
            taps=config.resample_taps,
            init=init,
            init_last=last,
            init_attention=Init("xavier_uniform", math.sqrt(0.2)),
        )
        super().__init__(config, style)
        noise, embedding = config.noise_channels, config.embedding_channels
        self.map_noise = FourierFeatures(noise) if config.body == "ncsn++" else None
        if config.label_dim:
            self.map_label = Linear(config.label_dim, noise, init)
        if config.augment_dim:
            self.map_augment = Linear(config.augment_dim, noise, init, has_bias=False)
        self.map_layer0 = Linear(noise, embedding, init)
        self.map_layer1 = Linear(embedding, embedding, init)
        self._build(config.model_channels)
        width = config.model_channels * config.channel_mult[0]
        self._head = f"{config.resolution}x{config.resolution}_aux"
        self.dec[f"{self._head}_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{self._head}_conv"] = Conv2d(width, config.image_channels, 3, last)

    def embed(self, noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        if self.map_noise is None:
            angles = noise_angles(noise, self.config.noise_channels, reaches_end=True)
            embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        else:
            embedding = self.map_noise(noise)
        if self.map_label is not None and labels is not None:
            # A one-hot row has the root mean square 1 / sqrt(label_dim).
            embedding = embedding + self.map_label(self._dropped(labels) * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(embedding))))

    def head(self, x: Tensor) -> Tensor:
        return self.dec[f"{self._head}_conv"](silu(self.dec[f"{self._head}_norm"](x)))


class ADMBody(EDMBody):
    """ADM: blocks that scale and shift, attention heads of 64 channels."""

    def __init__(self, config: EDMConfig) -> None:
        init = Init("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))
        zero = Init("kaiming_uniform", 0.0)
        style = BlockStyle(
            embedding_channels=config.embedding_channels,
            dropout=config.dropout,
            eps=1e-5,
            gain=1.0,
            has_scale=True,
            always_projects=False,
            head_channels=ADM_HEAD_CHANNELS,
            taps=config.resample_taps,
            init=init,
            init_last=zero,
            init_attention=init,
        )
        super().__init__(config, style)
        noise, embedding = config.noise_channels, config.embedding_channels
        if config.augment_dim:
            self.map_augment = Linear(config.augment_dim, noise, zero, has_bias=False)
        self.map_layer0 = Linear(noise, embedding, init)
        self.map_layer1 = Linear(embedding, embedding, init)
        if config.label_dim:
            label_init = Init("kaiming_normal", math.sqrt(config.label_dim))
            self.map_label = Linear(config.label_dim, embedding, label_init, has_bias=False)
        width = config.model_channels * config.channel_mult[0]
        self._build(width)
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, config.image_channels, 3, zero)

    def embed(self, noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        angles = noise_angles(noise, self.config.noise_channels, reaches_end=False)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(silu(self.map_layer0(embedding)))
        if self.map_label is not None and labels is not None:
            embedding = embedding + self.map_label(self._dropped(labels))
        return silu(embedding)

    def head(self, x: Tensor) -> Tensor:
        return self.out_conv(silu(self.out_norm(x)))


def build_body(config: EDMConfig) -> EDMBody:
    """The body of `config` with undrawn parameters; `initialise` draws them, `load_state_dict` fills them."""
    build: Callable[[EDMConfig], EDMBody] = ADMBody if config.body == "adm" else SongBody
    return build(config)
