"""What generated images are compared with: the moments of real images' features, and perhaps the features.

Two kinds of .npz are read. EDM's holds `mu` [F] and `sigma` [F, F] of Inception-v3 and says no more. uni3d's
holds the same two and `record`, a JSON text with the network, its checksum, the number of images and their
source, and may hold `features` [M, F], which KID, precision and recall need.
Legend: M real images, F features.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.fidelity_nets import INCEPTION, FeatureNet, file_checksum
from uni3d.training.checkpoint import atomic_write

FORMAT = "uni3d-reference-1"
_MAX_BYTES = 16 * 2**30
_MAX_ASYMMETRY = 1e-6


@dataclass(frozen=True)
class FeatureReference:
    """Moments of the features of real images."""

    mean: Tensor
    """float64 [F]."""
    covariance: Tensor
    """float64 [F, F], unbiased."""
    feature_net: str
    checksum: str | None
    """SHA-256 of the network's weights; None for EDM's files, which do not say."""
    num_images: int | None
    """None for EDM's files, which do not say."""
    source: str
    """The data set, or the file."""
    features: Tensor | None = None
    """float32 [M, F], of all images or of as many as were kept."""
    file_sha256: str | None = None
    """Of the file that it was read from."""

    def check_fits(self, net: FeatureNet) -> None:
        """UsageError if this reference was measured by another network than `net`."""
        if self.feature_net != net.name:
            raise UsageError(
                f"the reference of '{self.source}' was measured by {self.feature_net} and the images by "
                f"{net.name}; use one network for both"
            )
        if self.checksum is not None and self.checksum != net.checksum:
            raise UsageError(
                f"the reference of '{self.source}' was measured by {self.feature_net} with the weights "
                f"{self.checksum[:12]} and the images with {net.checksum[:12]}; use one file for both"
            )
        if len(self.mean) != net.num_features:
            raise UsageError(
                f"the reference of '{self.source}' has {len(self.mean)} features and {net.name} "
                f"{net.num_features}; use one network for both"
            )

    def record(self) -> dict[str, Any]:
        """For reports: everything but the numbers themselves."""
        return {
            "source": self.source,
            "feature_net": self.feature_net,
            "checksum": self.checksum,
            "num_images": self.num_images,
            "num_features_kept": 0 if self.features is None else len(self.features),
            "file_sha256": self.file_sha256,
        }


def write_reference(reference: FeatureReference, path: str | Path) -> Path:
    """Write a reference as .npz, atomically; whoever reads EDM's files can read `mu` and `sigma` of it."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UsageError(f"'{path}' must end in .npz; choose such a name")
    record = {
        "format": FORMAT,
        "feature_net": reference.feature_net,
        "checksum": reference.checksum,
        "num_images": reference.num_images,
        "source": reference.source,
    }
    arrays = {
        "mu": reference.mean.cpu().numpy(),
        "sigma": reference.covariance.cpu().numpy(),
        "record": np.frombuffer(json.dumps(record).encode(), np.uint8),
    }
    if reference.features is not None:
        arrays["features"] = reference.features.cpu().float().numpy()

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, **arrays)

    return atomic_write(path, write)


def read_reference(path: str | Path) -> FeatureReference:
    """A reference of either kind; UsageError for a missing, damaged or foreign file. Nothing is unpickled."""
    path = Path(path)
    if path.suffix == ".pkl":
        raise UsageError(f"reference '{path}' is a pickle, which is not read; save its mu and sigma as .npz")
    digest = file_checksum(path)
    arrays = _read_arrays(path)
    for key in ("mu", "sigma"):
        if key not in arrays:
            raise UsageError(f"reference '{path}' holds no '{key}'; pass a .npz with mu and sigma")
    mean, covariance = arrays["mu"], arrays["sigma"]
    _check_moments(mean, covariance, path)
    reference = FeatureReference(
        mean=torch.from_numpy(mean.astype(np.float64)),
        covariance=torch.from_numpy(covariance.astype(np.float64)),
        feature_net=INCEPTION,
        checksum=None,
        num_images=None,
        source=path.name,
        file_sha256=digest,
    )
    return _with_record(reference, arrays, path) if "record" in arrays else reference


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(info.file_size for info in archive.infolist())
        if num_bytes > _MAX_BYTES:
            raise UsageError(f"reference '{path}' unpacks to {num_bytes / 2**30:.0f} GiB; pass a smaller one")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in ("mu", "sigma", "record", "features") if key in arrays.files}
    except UsageError:
        raise
    except (
        zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError,
        SyntaxError, MemoryError, zlib.error,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"reference '{path}' cannot be read as a .npz ({reason}); copy it again") from None


def _check_moments(mean: np.ndarray, covariance: np.ndarray, path: Path) -> None:
    is_real = all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance))
    if not is_real or mean.ndim != 1 or len(mean) < 1 or covariance.shape != (len(mean), len(mean)):
        raise UsageError(
            f"reference '{path}' has mu {list(mean.shape)} and sigma {list(covariance.shape)}; expected [F] "
            f"and [F, F] of real numbers"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"reference '{path}' holds NaN or infinity; measure it again")
    if np.abs(covariance - covariance.T).max() > _MAX_ASYMMETRY * max(np.abs(covariance).max(), 1e-300):
        raise UsageError(f"sigma of reference '{path}' is not symmetric; measure it again")


def _with_record(reference: FeatureReference, arrays: dict[str, np.ndarray], path: Path) -> FeatureReference:
    try:
        record = json.loads(arrays["record"].tobytes())
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {str(record['format'])[:40]}, this version reads {FORMAT}")
        kinds = {"feature_net": (str,), "checksum": (str, type(None)), "source": (str,)}
        kinds["num_images"] = (int, type(None))
        for key, allowed in kinds.items():
            if type(record[key]) not in allowed:
                raise ValueError(f"its {key} is {str(record[key])[:40]}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the record of reference '{path}' cannot be read ({reason}); measure it again"
        ) from None
    features = arrays.get("features")
    if features is not None:
        is_table = features.ndim == 2 and features.shape[1:] == tuple(reference.mean.shape)
        if not is_table or features.dtype != np.float32 or not np.isfinite(features).all():
            raise UsageError(f"the features of reference '{path}' do not fit its mu; measure it again")
    return replace(
        reference,
        features=None if features is None else torch.from_numpy(features),
        **{key: record[key] for key in ("feature_net", "checksum", "num_images", "source")},
    )
