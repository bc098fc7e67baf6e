"""Networks whose features say how alike images are: Inception-v3, which makes FID, and EfficientNet-Lite0.

A figure means nothing without its network, so a network carries its name and the SHA-256 of its weights file,
and references of another one are refused. Weights come from the user's disk; nothing is downloaded.
Legend: B batch, H W pixels, F features, K classes.
"""

from __future__ import annotations

import hashlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from uni3d.errors import MissingPackageError, UsageError
from uni3d.evaluation.image_tower import LITE_SHAPES, EfficientNetTower, start_from

INCEPTION = "inception_v3"
EFFICIENTNET_LITE0 = "efficientnet_lite0"
# weights-inception-2015-12-05-6726825d.pth of torch-fidelity, the same bytes as pytorch-fid's
# pt_inception-2015-12-05-6726825d.pth: the network of the TensorFlow graph that FID was defined with.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_MAX_INCEPTION_BYTES = 2**30
_LITE0_SIZE = 224


@dataclass(frozen=True)
class NetOutput:
    """What a network says of B images, float32 on its device."""

    features: Tensor
    """[B, F]."""
    logits: Tensor | None = None
    """[B, K] of a classifier, where the network has one."""


class FeatureNet(Protocol):
    """Colour images float32 [B, 3, H, W] of any size, with values in `value_range`, to features."""

    @property
    def name(self) -> str: ...

    @property
    def checksum(self) -> str:
        """SHA-256 of its weights file, 64 hexadecimal digits."""
        ...

    @property
    def input_size(self) -> int:
        """Side in pixels to which it resamples its images."""
        ...

    @property
    def value_range(self) -> tuple[float, float]:
        """What black and white are."""
        ...

    @property
    def num_features(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where images are wanted."""
        ...

    def __call__(self, images: Tensor) -> NetOutput: ...


@torch.no_grad()
def network_output(net: FeatureNet, images: Tensor | np.ndarray) -> NetOutput:
    """What `net` says of uint8 [B, C, H, W] images; grey ones (C = 1) are shown as colour.

    Figures are of 8-bit images, as they would be saved. Raises UsageError for another dtype or shape.
    """
    # A copy of an array: torch reads no mirrored views and warns of read-only ones.
    batch = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
    if batch.dtype != torch.uint8:
        raise UsageError(
            f"images have the type {str(batch.dtype).removeprefix('torch.')}; make them uint8 first, from "
            f"[-1, 1] by x * 127.5 + 128 cut to 0 and 255"
        )
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or 0 in batch.shape[2:]:
        raise UsageError(f"images have the shape {tuple(batch.shape)}; expected uint8 [B, 1 or 3, H, W]")
    low, high = net.value_range
    values = batch.to(net.device).expand(-1, 3, -1, -1).float() * ((high - low) / 255) + low
    return net(values)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; UsageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error.strerror}); pass an existing file") from None


class EfficientNetLite0:
    """Pooled features [B, 1280] of EfficientNet-Lite0 (Tan and Le 2019) trained on ImageNet; no logits.

    Images in [0, 1] are resampled to 224 pixels, bilinearly and smoothed where they shrink. Its figures are
    not FIDs, and rank models only against a reference measured by the same file.

    Args:
        path: the .safetensors file that the commands in configs/evaluator.yaml make.
        device: where it runs.

    Raises UsageError for a missing, damaged or other file.
    """

    name = EFFICIENTNET_LITE0
    input_size = _LITE0_SIZE
    value_range = (0.0, 1.0)

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        tower = EfficientNetTower(LITE_SHAPES[0], input_size=None)
        start_from(tower, Path(path), title="feature network")
        self.checksum = file_checksum(Path(path))
        self.num_features = tower.num_features
        self.device = torch.device(device)
        self._tower = tower.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> NetOutput:
        size = (self.input_size, self.input_size)
        if images.shape[-2:] != size:
            images = functional.interpolate(
                images, size, mode="bilinear", antialias=True, align_corners=False
            )
        return NetOutput(self._tower.feature_map(images).mean(dim=(2, 3)))


class InceptionV3:
    """Pooled features [B, 2048] and logits [B, 1008] of the Inception-v3 that FID was defined with.

    The architecture and its TensorFlow-1 resampling to 299 pixels are those of torch-fidelity. As there, and
    in the original Inception Score, the logits leave out the bias. Images are in [0, 255].

    Args:
        path: weights-inception-2015-12-05-6726825d.pth or pt_inception-2015-12-05-6726825d.pth.
        sha256: what the file must hash to; another one than the default's is named `inception_v3_custom`, and
            its distance is not called FID.
        device: where it runs.

    Raises MissingPackageError without torch-fidelity, UsageError for a file that is missing, has another
    checksum, or holds more than tensors.
    """

    input_size = 299
    value_range = (0.0, 255.0)
    num_features = 2048

    def __init__(
        self, path: str | Path, *, sha256: str = INCEPTION_SHA256, device: torch.device | str = "cpu"
    ) -> None:
        self.checksum = sha256.lower()
        self.name = INCEPTION if self.checksum == INCEPTION_SHA256 else f"{INCEPTION}_custom"
        self.device = torch.device(device)
        network = _inception_module(_checked_bytes(Path(path), self.checksum), Path(path))
        self._network = network.to(self.device).eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> NetOutput:
        features, logits = self._network(images.round().clamp(0, 255).to(torch.uint8))
        return NetOutput(features, logits)


def _checked_bytes(path: Path, sha256: str) -> bytes:
    """The content of the weights file, hashed, and found to hold nothing but tensors."""
    try:
        if path.stat().st_size > _MAX_INCEPTION_BYTES:
            raise UsageError(f"Inception weights '{path}' are larger than 1 GiB; pass the file of 91 MiB")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"Inception weights '{path}' cannot be read ({error.strerror}); pass "
            f"weights-inception-2015-12-05-6726825d.pth of torch-fidelity or pytorch-fid"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UsageError(
            f"Inception weights '{path}' have the SHA-256 {found}, expected {sha256}; copy the file again, "
            f"or pass its checksum as sha256 to use other weights under another name"
        )
    # torch-fidelity unpickles without limits, so the same bytes are first read with them.
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"Inception weights '{path}' are no plain tensors ({reason}); pass others") from None
    return data


def _inception_module(data: bytes, path: Path) -> nn.Module:
    try:
        library = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError, AttributeError) as error:
        # A torchvision built for another torch, which torch-fidelity imports, raises RuntimeError.
        reason = " ".join(str(error).split())[:200]
        raise MissingPackageError(
            f"Inception-v3 needs the package torch-fidelity ({reason}); install it with: pip install "
            f'"uni3d[eval]", and torchvision from where torch came from'
        ) from None
    try:
        return library.FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=io.BytesIO(data)
        )
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"'{path}' does not hold the weights of the Inception-v3 of FID ({reason}); pass "
            f"weights-inception-2015-12-05-6726825d.pth"
        ) from None
