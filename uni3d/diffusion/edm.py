"""EDM networks as denoisers: `net(x, sigma, class_labels)` predicts x0 from x = x0 + sigma * eps.

The preconditioning of Karras et al. (arXiv 2206.00364, Eq. 7 and Table 1, column "Ours") around a body of
`edm_unet`, and the folder that such a network is kept in: `model.safetensors` beside `config.json`. A
teacher, a one-step student (its x is sigma * noise, at one fixed sigma) and a fake score are all this module.
Legend: B batch, C image channels, H W pixels, F feature channels, h w pixels of the encoder's output.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from uni3d.diffusion.edm_config import PRESETS, EDMConfig, preset
from uni3d.diffusion.edm_unet import build_body
from uni3d.errors import ConfigError, MissingWeightsError, UsageError
from uni3d.training.checkpoint import atomic_write_json, read_checked, sync_folder, write_checked

__all__ = [
    "PRESETS",
    "EDMConfig",
    "EDMDenoiser",
    "load",
    "preset",
    "read_description",
    "save",
    "save_tensors",
]

FORMAT = "uni3d-edm-1"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
Output = Literal["x0", "features", "both"]


class EDMDenoiser(nn.Module):
    """D(x, sigma, labels) = c_skip x + c_out F(c_in x, c_noise, labels), with the body F as `model`.

    The parameters are float32 and are best left so; `body_dtype` is what the body computes in (bfloat16 on a
    recent GPU). The embedding of noise level and labels, each block's projection of it and the
    preconditioning stay float32 in any case; so leave out torch.autocast, which would lower them as well.

    `model.map_augment`, where the configuration has one, takes part only when augment_labels are given;
    DistributedDataParallel wants to be told: `net.model.map_augment.requires_grad_(False)`.

    Shapes are static and nothing waits for the device, so `torch.compile(net)` needs no graph breaks; pass
    sigma as a tensor then, since each new number would be compiled anew. In training mode dropout is active
    and drawn from torch's global generators.
    """

    def __init__(
        self,
        config: EDMConfig,
        *,
        body_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        """An untrained network; `generator` (on the CPU) draws its parameters.

        Built under `torch.device("meta")` it has shapes but no values. Raises ConfigError for widths that
        groups or attention heads do not divide.
        """
        super().__init__()
        self.config = config
        self.body_dtype = body_dtype
        self.model = build_body(config)
        if not next(self.model.parameters()).is_meta:
            self.model.initialise(generator)

    @overload
    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        output: Literal["x0", "features"] = "x0",
        num_decoded: int | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        output: Literal["both"],
        detach_x0: bool = False,
        num_decoded: int | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        output: Output = "x0",
        detach_x0: bool = False,
        num_decoded: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The x0-prediction, the encoder's output, or both from one pass.

        Args:
            x: noisy images [B, C, H, W] in the scale of x0 + sigma * eps, x0 in [-1, 1].
            sigma: noise levels >= 0, a number or [B] or [1]; at 0 the prediction is x.
            class_labels: one-hot rows [B, label_dim] (or [1, label_dim]), or class indices, integer [B].
                None is an all-zero row, which means something only to networks trained with label dropout.
            augment_labels: what was done to the images, [B, augment_dim]; None, for none, when sampling.
            output: "x0" for [B, C, H, W]; "features" for [B, F, h, w], the encoder's output, without running
                the decoder; "both" for (x0, features).
            detach_x0: run the decoder without gradients, so that only the features carry some.
            num_decoded: run the decoder on the first so many samples only.

        Returns:
            float32, differentiable in x, sigma, labels and parameters. Fused attention kernels have no second
            derivative; run inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` where one is needed.

        Raises:
            ValueError: shapes that do not fit the configuration, or labels for an unconditional network.
        """
        config = self.config
        if x.ndim != 4 or x.shape[1:] != (config.image_channels, config.resolution, config.resolution):
            raise ValueError(
                f"x has the shape {tuple(x.shape)}; expected [B, {config.image_channels}, "
                f"{config.resolution}, {config.resolution}]"
            )
        batch = x.shape[0]
        x = x.float()
        labels = self._class_rows(class_labels, x)
        if augment_labels is not None:
            if config.augment_dim == 0:
                raise ValueError("augment_labels were given to a network without; leave them out")
            augment_labels = augment_labels.float().expand(batch, config.augment_dim)
        # Filling on the device: a number that is copied there would have to wait for it.
        level = sigma.float() if isinstance(sigma, Tensor) else x.new_full((1,), sigma)
        level = level.reshape(-1).expand(batch)
        # Table 1, "Network and preconditioning". ln 0 is kept finite, so that D(x, 0) = x.
        data = config.sigma_data
        c_noise = level.clamp_min(torch.finfo(torch.float32).tiny).log() / 4
        level = level[:, None, None, None]
        scale = (level.square() + data**2).sqrt()
        c_in, c_skip, c_out = 1 / scale, (data / scale).square(), level * data / scale

        embedding = self.model.embed(c_noise, labels, augment_labels)
        hidden, skips = self.model.encode((c_in * x).to(self.body_dtype), embedding)
        features = hidden.float()
        if output == "features":
            return features
        if num_decoded is not None:
            hidden, embedding = hidden[:num_decoded], embedding[:num_decoded]
            skips = [skip[:num_decoded] for skip in skips]
            x, c_skip, c_out = x[:num_decoded], c_skip[:num_decoded], c_out[:num_decoded]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_x0):
            x0 = c_skip * x + c_out * self.model.decode(hidden, skips, embedding).float()
        return x0 if output == "x0" else (x0, features)

    def features(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """The encoder's output, float32 [B, F, h, w], at about a third of a full pass; see `forward`."""
        return self(x, sigma, class_labels, output="features")

    def x0_and_features(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0-prediction [B, C, H, W], encoder's output [B, F, h, w]), float32, from one pass."""
        return self(x, sigma, class_labels, output="both")

    def _class_rows(self, class_labels: Tensor | None, x: Tensor) -> Tensor | None:
        """Any accepted form of class labels as float32 [B, label_dim]; None for an unconditional network."""
        batch, num_classes = x.shape[0], self.config.label_dim
        if num_classes == 0:
            if class_labels is not None:
                raise ValueError("class_labels were given to an unconditional network; leave them out")
            return None
        if class_labels is None:
            return x.new_zeros(batch, num_classes)
        if class_labels.ndim == 1 and not class_labels.is_floating_point():
            class_labels = nn.functional.one_hot(class_labels.long(), num_classes)
        if class_labels.ndim != 2 or class_labels.shape[1] != num_classes:
            raise ValueError(
                f"class_labels have the shape {tuple(class_labels.shape)}; expected [{batch}, {num_classes}] "
                f"or integer [{batch}]"
            )
        return class_labels.float().expand(batch, num_classes)


# ---- the folder of a network


def save(
    net: EDMDenoiser,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write a network to a folder; see `save_tensors`."""
    return save_tensors(net.config, net.state_dict(), directory, overwrite=overwrite, source=source)


def save_tensors(
    config: EDMConfig,
    tensors: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write the state dict of a network of `config` as `model.safetensors` and `config.json` in `directory`.

    The new folder is complete before it takes its place. `source` is JSON that says where the weights come
    from. Returns the folder. Raises UsageError as `check_output` does, and OSError from the file system.
    """
    target = check_output(directory, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        fresh.mkdir()
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_checked(fresh / WEIGHTS_NAME, stored)
        description = {"format": FORMAT, "network": config.as_dict(), "source": dict(source or {})}
        atomic_write_json(fresh / CONFIG_NAME, description)
        _replace_folder(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync_folder(target.parent)
    return target


def check_output(directory: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """`directory` as an absolute Path, if a network may be written there; nothing is created or changed.

    Raises UsageError if it is a file, if it holds a network and `overwrite` is false, or if it holds anything
    else, which is never removed.
    """
    target = Path(os.path.realpath(directory))
    if not target.exists():
        return target
    if not target.is_dir():
        raise UsageError(f"output '{directory}' is a file; choose a name for a folder")
    names = {path.name for path in target.iterdir()}
    strangers = sorted(names - {CONFIG_NAME, WEIGHTS_NAME})
    if strangers:
        raise UsageError(
            f"output '{directory}' holds other files, such as '{strangers[0][:80]}'; choose a new folder"
        )
    if names and not overwrite:
        raise UsageError(f"output '{directory}' exists; choose another name or pass --overwrite")
    return target


def _replace_folder(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`; what was there comes back if that fails."""
    if not target.exists():
        os.rename(fresh, target)
        return
    stale = fresh.with_suffix(".old")
    os.rename(target, stale)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(stale, target)
        raise
    shutil.rmtree(stale, ignore_errors=True)


def read_description(directory: str | os.PathLike[str]) -> tuple[EDMConfig, dict[str, Any]]:
    """(configuration, source) of a saved network, without its weights.

    Raises MissingWeightsError if there is none and ConfigError if its `config.json` is damaged.
    """
    file = Path(directory) / CONFIG_NAME
    if not file.is_file():
        raise MissingWeightsError(
            f"'{directory}' holds no {CONFIG_NAME}; pass a folder that `uni3d import-edm` wrote"
        )
    try:
        with file.open("rb") as stream:
            content = json.loads(stream.read(2**20))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"'{file}' is damaged ({reason}); import the network again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"'{file}' does not describe an EDM network of format {FORMAT}; import it again")
    network, source = content.get("network"), content.get("source")
    if not isinstance(network, dict) or not isinstance(source, dict):
        raise ConfigError(f"'{file}' lacks its 'network' or 'source'; import the network again")
    try:
        return EDMConfig.from_dict(network), source
    except ConfigError as error:
        raise ConfigError(f"'{file}': {error}") from error


def load(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    body_dtype: torch.dtype = torch.float32,
) -> EDMDenoiser:
    """The network of a folder that `save` or `uni3d import-edm` wrote, in eval mode.

    Raises MissingWeightsError for files that are not there, ConfigError for a damaged configuration, and
    UsageError for weights that are damaged or do not fit it.
    """
    config, _ = read_description(directory)
    file = Path(directory) / WEIGHTS_NAME
    tensors, _ = read_checked(file)
    net = skeleton(config, body_dtype=body_dtype)
    problem = mismatch(net, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    wrong = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
    if problem is None and wrong is not None:
        problem = f"{wrong} holds no floating-point numbers"
    if problem is not None:
        raise UsageError(f"'{file}' does not fit its {CONFIG_NAME}: {problem}; import the network again")
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return net.to(device).eval()


def skeleton(config: EDMConfig, *, body_dtype: torch.dtype = torch.float32) -> EDMDenoiser:
    """A network on the meta device, which has names and shapes but no values."""
    with torch.device("meta"):
        return EDMDenoiser(config, body_dtype=body_dtype)


def mismatch(net: EDMDenoiser, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What keeps tensors of these names and shapes from being the state of `net`; None if nothing does."""
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    for problem, names in (
        ("lacks", expected.keys() - shapes.keys()),
        ("has the unexpected", shapes.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(sorted(name[:80] for name in names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"it {problem} {shown}{more}"
    for name, shape in expected.items():
        if shapes[name] != shape:
            return f"{name} has the shape {list(shapes[name])} where {list(shape)} is expected"
    return None
