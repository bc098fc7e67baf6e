"""Starting from an existing teacher: its weights fitted to networks that may have grown since.

A teacher that exists knows objects, views and colours already. Training a better one, or one on more assets,
starts from there: tensors of the same shape are taken over, larger ones are filled in so that the network at
first computes what the old one did, and only what is new starts at random.
Legend: C latent channels.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.resources import weights_folder
from uni3d.teacher.publish import TRAINING_NAME
from uni3d.teacher.sampling import load_teacher
from uni3d.teacher.trainable import parameter_names

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
# Tensors whose axes hold means and log variances one after the other, each with C channels.
_HALVED_AXES = {
    "vae.encoder.conv_out.weight": (0,),
    "vae.encoder.conv_out.bias": (0,),
    "vae.quant_conv.weight": (0, 1),
    "vae.quant_conv.bias": (0,),
}
_EMBEDDING = "text_encoder.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class InitialTeacher:
    """The weights of a teacher by the names that training uses, its tokens, and how it was trained."""

    name: str
    weights: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    training: Mapping[str, Any] | None


def read_initial_teacher(source: str | os.PathLike[str]) -> InitialTeacher:
    """Read a published teacher: a folder, or "embedded" for the one that comes with uni3d.

    Raises MissingWeightsError when it is missing and UsageError when a file of it is damaged.
    """
    folder = weights_folder("teacher") if str(source) == EMBEDDED else Path(source)
    modules = load_teacher(folder)
    networks = {
        "vae": modules.autoencoder,
        "unet": modules.unet,
        "text_encoder": modules.text_encoder,
        "camera_token": modules.camera_token,
    }
    weights = {
        name: parameter.detach()
        for prefix, network in networks.items()
        for name, parameter in zip(parameter_names(network, prefix), network.parameters(), strict=True)
    }
    return InitialTeacher(str(source), weights, modules.tokenizer.get_vocab(), _read_training(folder))


def _read_training(folder: Path) -> dict[str, Any] | None:
    path = folder / TRAINING_NAME
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UsageError(f"'{path}' is damaged ({error}); delete it or take another teacher") from error


def fit_weights(
    own: Mapping[str, Tensor], teacher: InitialTeacher, tokenizer: CLIPTokenizer
) -> dict[str, Tensor]:
    """`own` freshly initialised weights by name, with everything that `teacher` has to give.

    Raises UsageError when hardly any tensor of the old teacher fits: its networks are of another kind.
    """
    fitted: dict[str, Tensor] = {}
    num_taken = num_grown = 0
    for name, fresh in own.items():
        old = teacher.weights.get(name)
        if name == _EMBEDDING and old is not None and old.shape[1] == fresh.shape[1]:
            fitted[name] = _matched_rows(fresh, old.to(fresh), tokenizer.get_vocab(), teacher.tokens)
            num_taken += 1
        elif old is None or old.ndim != fresh.ndim:
            fitted[name] = fresh.clone()
        elif old.shape == fresh.shape:
            fitted[name] = old.to(fresh).clone()
            num_taken += 1
        else:
            fitted[name] = grow(fresh, old.to(fresh), halved_axes=_HALVED_AXES.get(name, ()))
            num_grown += 1
    if num_taken < len(own) / 2:
        raise UsageError(
            f"initial_teacher '{teacher.name}' has other networks than the settings ask for: {num_taken} of "
            f"{len(own)} tensors fit; set block_out_channels and the like as it was trained"
        )
    logger.info(
        "from teacher '%s': %d of %d tensors as they are, %d grown",
        teacher.name, num_taken, len(own), num_grown,
    )  # fmt: skip
    return fitted


def grow(fresh: Tensor, old: Tensor, *, halved_axes: tuple[int, ...] = ()) -> Tensor:
    """`fresh` with the values of `old` where both reach, so that old outputs come out as before.

    Axis 0 is the output of a layer, the others its input (as in convolutions and linear layers). Old outputs
    get zero weights from new inputs; new outputs keep their fresh weights. `halved_axes` hold two blocks one
    after the other (mean and log variance), each of which grows by itself.
    """
    shape = fresh.shape
    result, source = _split(fresh.clone(), halved_axes), _split(old, halved_axes)
    reach = [min(large, small) for large, small in zip(result.shape, source.shape, strict=True)]
    num_output_axes = 2 if 0 in halved_axes else 1
    overlap = tuple(slice(0, stop) for stop in reach)
    if result.ndim > num_output_axes:
        result[overlap[:num_output_axes]] = 0
    result[overlap] = source[overlap]
    return result.reshape(shape)


def _split(tensor: Tensor, halved_axes: tuple[int, ...]) -> Tensor:
    """Every axis of `halved_axes` [2 C] as two, [2, C]."""
    for axis in sorted(halved_axes, reverse=True):
        tensor = tensor.unflatten(axis, (2, tensor.shape[axis] // 2))
    return tensor


def _matched_rows(
    fresh: Tensor, old: Tensor, tokens: Mapping[str, int], old_tokens: Mapping[str, int]
) -> Tensor:
    """Embeddings [tokens, width] with the old rows of all tokens that both vocabularies have."""
    shared = sorted(tokens.keys() & old_tokens.keys())
    result = fresh.clone()
    if shared:
        rows = torch.tensor([tokens[token] for token in shared])
        result[rows] = old[torch.tensor([old_tokens[token] for token in shared])]
    return result
