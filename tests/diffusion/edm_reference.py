"""EDM networks a second time, as slow as they are plain: one function over a state dict, nothing shared.

Convolutions with the stored filters, attention by einsum over the interleaved rows, no module and no
configuration beyond what the names and shapes of the tensors say. `test_edm_networks` compares the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def reference_denoise(
    state: dict[str, Tensor],
    x: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """D(x, sigma, labels) in the dtype of the tensors given (float64 for a comparison)."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    total = sigma**2 + sigma_data**2
    inner = reference_body(state, x / total.sqrt(), (sigma.log() / 4).flatten(), labels, augment_labels)
    return sigma_data**2 / total * x + sigma * sigma_data / total.sqrt() * inner


def reference_body(
    state: dict[str, Tensor],
    x: Tensor,
    noise: Tensor,
    labels: Tensor | None,
    augment_labels: Tensor | None,
) -> Tensor:
    get = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    is_adm = "out_conv.weight" in get
    embedding = _embedding(get, noise, labels, augment_labels, is_adm=is_adm)
    names = [name for name in get if name.startswith("enc.")]
    layers = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    stack: list[Tensor] = []
    auxiliary = x
    for layer in layers:
        if layer.endswith("_aux_residual"):
            kernel = get[f"{layer}.resample_filter"]
            auxiliary = functional.pad(auxiliary, (2, 2, 2, 2))
            auxiliary = functional.conv2d(auxiliary, get[f"{layer}.weight"])
            auxiliary = _each_channel(auxiliary, kernel)[:, :, ::2, ::2]
            auxiliary = auxiliary + get[f"{layer}.bias"].reshape(1, -1, 1, 1)
            x = auxiliary = (x + auxiliary) / math.sqrt(2)
            stack[-1] = x
            continue
        if layer.endswith("_conv"):
            x = functional.conv2d(x, get[f"{layer}.weight"], get[f"{layer}.bias"], padding=1)
        else:
            x = _block(get, layer, x, embedding, is_adm=is_adm)
        stack.append(x)
    names = [name for name in get if name.startswith("dec.") and "_aux" not in name]
    for layer in dict.fromkeys(".".join(name.split(".")[:2]) for name in names):
        if get[f"{layer}.norm0.weight"].numel() != x.shape[1]:
            x = torch.cat([x, stack.pop()], dim=1)
        x = _block(get, layer, x, embedding, is_adm=is_adm)
    assert not stack
    side = x.shape[-1]
    norm, conv = (
        ("out_norm", "out_conv") if is_adm else (f"dec.{side}x{side}_aux_norm", f"dec.{side}x{side}_aux_conv")
    )
    x = _silu(_norm(get, norm, x, 1e-5 if is_adm else 1e-6))
    return functional.conv2d(x, get[f"{conv}.weight"], get[f"{conv}.bias"], padding=1)


def _embedding(
    get: dict[str, Tensor],
    noise: Tensor,
    labels: Tensor | None,
    augment_labels: Tensor | None,
    *,
    is_adm: bool,
) -> Tensor:
    width = get["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in get:
        angles = noise[:, None] * 2 * math.pi * get["map_noise.freqs"][None, :]
    else:
        last = width // 2 - (0 if is_adm else 1)
        rates = [10_000 ** (-index / last) for index in range(width // 2)]
        angles = noise[:, None] * torch.tensor(rates, dtype=noise.dtype)[None, :]
    parts = [angles.cos(), angles.sin()]
    embedding = torch.cat(parts if is_adm else parts[::-1], dim=1)
    if labels is not None and not is_adm:
        scaled = labels * labels.shape[1] ** 0.5
        embedding = embedding + scaled @ get["map_label.weight"].T + get["map_label.bias"]
    if augment_labels is not None:
        embedding = embedding + augment_labels @ get["map_augment.weight"].T
    embedding = _silu(embedding @ get["map_layer0.weight"].T + get["map_layer0.bias"])
    embedding = embedding @ get["map_layer1.weight"].T + get["map_layer1.bias"]
    if labels is not None and is_adm:
        embedding = embedding + labels @ get["map_label.weight"].T
    return _silu(embedding)


def _block(get: dict[str, Tensor], layer: str, x: Tensor, embedding: Tensor, *, is_adm: bool) -> Tensor:
    eps, gain = (1e-5, 1.0) if is_adm else (1e-6, math.sqrt(0.5))
    change = layer.rsplit("_", 1)[1]
    skip = x
    if change in ("up", "down"):
        skip = _resample(x, get[f"{layer}.skip.resample_filter"], change)
    if f"{layer}.skip.weight" in get:
        skip = functional.conv2d(skip, get[f"{layer}.skip.weight"], get[f"{layer}.skip.bias"])
    x = _silu(_norm(get, f"{layer}.norm0", x, eps))
    if change in ("up", "down"):
        x = _resample(x, get[f"{layer}.conv0.resample_filter"], change)
    x = functional.conv2d(x, get[f"{layer}.conv0.weight"], get[f"{layer}.conv0.bias"], padding=1)
    modulation = embedding @ get[f"{layer}.affine.weight"].T + get[f"{layer}.affine.bias"]
    modulation = modulation[:, :, None, None]
    if is_adm:
        scale, shift = modulation[:, : x.shape[1]], modulation[:, x.shape[1] :]
        x = _norm(get, f"{layer}.norm1", x, eps) * (1 + scale) + shift
    else:
        x = _norm(get, f"{layer}.norm1", x + modulation, eps)
    x = functional.conv2d(_silu(x), get[f"{layer}.conv1.weight"], get[f"{layer}.conv1.bias"], padding=1)
    x = (x + skip) * gain
    if f"{layer}.qkv.weight" in get:
        x = (x + _attention(get, layer, _norm(get, f"{layer}.norm2", x, eps), is_adm=is_adm)) * gain
    return x


def _attention(get: dict[str, Tensor], layer: str, x: Tensor, *, is_adm: bool) -> Tensor:
    batch, channels, height, width = x.shape
    heads = channels // 64 if is_adm else 1
    rows = functional.conv2d(x, get[f"{layer}.qkv.weight"], get[f"{layer}.qkv.bias"]).flatten(2)
    q, k, v = (rows[:, offset::3].reshape(batch, heads, -1, height * width) for offset in range(3))
    weight = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=-1)
    mixed = torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(batch, channels, height, width)
    return functional.conv2d(mixed, get[f"{layer}.proj.weight"], get[f"{layer}.proj.bias"])


def _resample(x: Tensor, kernel: Tensor, change: str) -> Tensor:
    """Zero insertion or decimation around a full convolution with the filter."""
    size = kernel.shape[-1]
    if change == "up":
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        spread[:, :, ::2, ::2] = x
        before = size - 1 - (size - 1) // 2
        after = size - 1 - before
        return _each_channel(functional.pad(spread, (before, after) * 2), 4 * kernel.flip(-1, -2))
    before = (size - 1) // 2
    return _each_channel(functional.pad(x, (before,) * 4), kernel)[:, :, ::2, ::2]


def _each_channel(x: Tensor, kernel: Tensor) -> Tensor:
    merged = x.reshape(-1, 1, *x.shape[2:])
    filtered = functional.conv2d(merged, kernel)
    return filtered.reshape(*x.shape[:2], *filtered.shape[2:])


def _norm(get: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    channels = x.shape[1]
    groups = min(32, channels // 4)
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    unit = (centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    return unit * get[f"{name}.weight"].reshape(1, -1, 1, 1) + get[f"{name}.bias"].reshape(1, -1, 1, 1)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())
