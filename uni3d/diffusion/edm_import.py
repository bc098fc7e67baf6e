"""EDM, SiD and Uni-Instruct pickles to the folder of a network, without running what they hold.

`edm_pickle` reads the file as records; here the outer record's class and constructor arguments choose the
configuration, its tensors are compared with the network of that configuration, and both are written by `edm`.
The argument names and defaults are those of EDM's constructors (its files state only what differs).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uni3d.diffusion.edm import check_output, mismatch, save_tensors, skeleton
from uni3d.diffusion.edm_config import Body, EDMConfig
from uni3d.diffusion.edm_pickle import ModuleRecord, TensorRecord, read_objects, state_tensors
from uni3d.diffusion.edm_unet import box_or_fir
from uni3d.errors import ConfigError, UsageError
from uni3d.pickle_reader import DamagedPickle, RefusedPickle, describe, printable

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 * 2**30

_MAGICS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes; pass the .pkl that EDM's own code wrote",
    b"\x1f\x8b": "compressed; unpack it first",
    b"version https://git-lfs": "the pointer of a Git LFS file; fetch the file itself",
    b"<": "a web page, so the download failed; download the file again",
}

# Wrapper class -> its default body class. The second is SiDA's and Uni-Instruct's copy, which can stop after
# the encoder; the tensors are the same.
_WRAPPERS = {"EDMPrecond": "DhariwalUNet", "EDMPrecond_EncoderDecoder": "SongUNet_EncoderDecoder"}
_OTHER_WRAPPERS = {
    "VPPrecond": "VP preconditioning",
    "VEPrecond": "VE preconditioning",
    "iDDPMPrecond": "iDDPM preconditioning",
    "Precond": "the EDM2 network",
}
_SONG_BODIES = ("SongUNet", "SongUNet_EncoderDecoder")
_ADM_BODIES = ("DhariwalUNet", "DhariwalUNet_EncoderDecoder")

_POSITIONAL = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
)
_COMMON_DEFAULTS = {
    "label_dim": 0,
    "use_fp16": False,
    "sigma_min": 0,
    "sigma_max": math.inf,
    "sigma_data": 0.5,
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "dropout": 0.10,
    "label_dropout": 0,
}
_SONG_DEFAULTS = {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_ADM_DEFAULTS = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
}
# (embedding, width of the noise embedding, encoder, decoder, filter) of the two published forms of SongUNet.
_SONG_FORMS: dict[tuple[Any, ...], Body] = {
    ("positional", 1, "standard", "standard", (1, 1)): "ddpm++",
    ("fourier", 2, "residual", "standard", (1, 3, 3, 1)): "ncsn++",
}


@dataclass(frozen=True)
class ImportedNetwork:
    """What `import_edm` wrote."""

    directory: Path
    config: EDMConfig
    class_name: str
    model_type: str
    num_tensors: int
    num_parameters: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "directory": str(self.directory),
            "class_name": self.class_name,
            "model_type": self.model_type,
            "num_tensors": self.num_tensors,
            "num_parameters": self.num_parameters,
            "sha256": self.sha256,
            "network": self.config.as_dict(),
        }


def import_edm(
    file: str | os.PathLike[str], directory: str | os.PathLike[str], *, overwrite: bool = False
) -> ImportedNetwork:
    """Convert a network pickle to a folder that `uni3d.diffusion.edm.load` reads.

    Args:
        file: a pickle of EDM (its "ema" is taken) or of a SiD, SiDA or Uni-Instruct generator, at most 4 GiB.
        directory: where `model.safetensors` and `config.json` go; it appears complete or not at all.
        overwrite: replace a network that is there.

    Nothing in the file is executed and no source text in it is read. It is held in memory, and its tensors a
    second time.

    Raises:
        UsageError: the file is no such pickle, is damaged, names or contains what such a pickle does not
            need, or holds a network of another kind; or the output may not be written. Nothing is written.
    """
    source = Path(file)
    check_output(directory, overwrite=overwrite)
    data = _read_bytes(source)
    digest = hashlib.sha256(data).hexdigest()
    try:
        network = _network_record(read_objects(memoryview(data)))
        config, arguments, model_type = _read_config(network)
        tensors = _read_tensors(network, config)
    except DamagedPickle as error:
        raise UsageError(f"'{source}' is damaged: {error}; download it again") from error
    except RefusedPickle as error:
        raise UsageError(
            f"'{source}' was refused, and nothing in it was run: {error}; take the file from its publisher"
        ) from error
    except (ConfigError, _Unsupported) as error:
        raise UsageError(f"'{source}' cannot be imported: {error}") from error
    description = {
        "file": source.name,
        "sha256": digest,
        "class_name": network.class_name,
        "model_type": model_type,
        "arguments": arguments,
    }
    written = save_tensors(config, tensors, directory, overwrite=overwrite, source=description)
    buffers = {name for name, _ in skeleton(config).named_buffers()}
    num_parameters = sum(tensor.numel() for name, tensor in tensors.items() if name not in buffers)
    logger.info(
        "%s: %s around %s (%s), %.3f M parameters; the weights keep the licence of their publisher",
        source.name,
        network.class_name,
        model_type,
        config.body,
        num_parameters / 1e6,
    )
    return ImportedNetwork(
        written, config, network.class_name, model_type, len(tensors), num_parameters, digest
    )


class _Unsupported(UsageError):
    """A network that is read well but is of a kind that this package does not have."""


def _read_bytes(file: Path) -> bytearray:
    """The bytes of a regular file that begins as a pickle."""
    try:
        if not file.is_file():
            raise UsageError(
                f"'{file}' does not exist or is not a file; pass a .pkl of EDM or of a generator"
            )
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UsageError(
                    f"'{file}' has {size / 2**30:.1f} GiB; networks of this kind have at most "
                    f"{MAX_FILE_BYTES / 2**30:.0f}, so check that it is the right file"
                )
            data = bytearray(size)
            num_read = stream.readinto(data)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"'{str(file)[:200]}' cannot be read ({reason}); check the path") from error
    if num_read != size:
        raise UsageError(f"'{file}' changed while it was read; try again when it is complete")
    if not data:
        raise UsageError(f"'{file}' is empty; download it again")
    for magic, what in _MAGICS.items():
        if data.startswith(magic):
            raise UsageError(f"'{file}' is {what}")
    if data[0] != 0x80 and data[8:9] == b"{":
        raise UsageError(f"'{file}' looks like safetensors; only pickles need importing, so load it instead")
    if data[0] != 0x80:
        raise UsageError(f"'{file}' is no pickle; pass a .pkl of EDM or of a SiD or Uni-Instruct generator")
    return data


def _network_record(content: Any) -> ModuleRecord:
    """The network of a pickle: its "ema", or the object itself."""
    if type(content) is dict:
        if "ema" not in content:
            names = ", ".join(printable(str(name))[:40] for name in list(content)[:5]) or "nothing"
            raise _Unsupported(f"it holds {names} but no 'ema'; pass a network snapshot of EDM")
        content = content["ema"]
    if not isinstance(content, ModuleRecord):
        raise _Unsupported(f"it holds {describe(content)} in the place of a network; pass a network snapshot")
    name = content.class_name
    if name in _OTHER_WRAPPERS:
        raise _Unsupported(
            f"it holds a {name}, which is {_OTHER_WRAPPERS[name]}; pass a network with EDM preconditioning "
            f"(NVIDIA's files outside of baseline/)"
        )
    if name not in _WRAPPERS:
        raise _Unsupported(
            f"it holds a '{name}'; expected one of {', '.join(_WRAPPERS)}, so pass a network snapshot"
        )
    return content


def _read_config(network: ModuleRecord) -> tuple[EDMConfig, dict[str, Any], str]:
    """(configuration, constructor arguments as JSON, class of the body) of a wrapper's record."""
    given = _constructor_arguments(network)
    model_type = given.pop("model_type", _WRAPPERS[network.class_name])
    is_song = model_type in _SONG_BODIES
    if not is_song and model_type not in _ADM_BODIES:
        raise _Unsupported(
            f"its body is {_shown(model_type)}; pass a network with one of "
            f"{', '.join((*_SONG_BODIES, *_ADM_BODIES))}"
        )
    defaults = {**_COMMON_DEFAULTS, **(_SONG_DEFAULTS if is_song else _ADM_DEFAULTS)}
    unknown = sorted(printable(name) for name in given if name not in {*defaults, *_POSITIONAL})
    if unknown:
        raise _Unsupported(
            f"'{unknown[0][:80]}' is no argument of {network.class_name} and {model_type}; it may belong to "
            f"another version of the network, so pass a published file"
        )
    missing = [name for name in ("img_resolution", "img_channels") if name not in given]
    if missing:
        raise _Unsupported(f"its {network.class_name} was made without {missing[0]}; pass another file")
    values = {**defaults, **given}
    config = EDMConfig(
        body=_song_form(values) if is_song else "adm",
        resolution=values["img_resolution"],
        image_channels=values["img_channels"],
        label_dim=values["label_dim"],
        augment_dim=values["augment_dim"],
        model_channels=values["model_channels"],
        channel_mult=values["channel_mult"],
        embedding_mult=values["channel_mult_emb"],
        num_blocks=values["num_blocks"],
        attention_resolutions=values["attn_resolutions"],
        dropout=values["dropout"],
        label_dropout=values["label_dropout"],
        sigma_data=values["sigma_data"],
    )
    arguments = {name: _as_json(name, value) for name, value in {**given, "model_type": model_type}.items()}
    return config, arguments, model_type


def _constructor_arguments(network: ModuleRecord) -> dict[str, Any]:
    """The arguments of the constructor by name, those given by position included."""
    positional, named = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if type(positional) is not tuple or type(named) is not dict or len(positional) > len(_POSITIONAL):
        raise _Unsupported("its network was stored without its constructor arguments; pass another file")
    if any(type(name) is not str for name in named):
        raise DamagedPickle("its network has a constructor argument without a name")
    return {**dict(zip(_POSITIONAL, positional, strict=False)), **named}


def _song_form(values: dict[str, Any]) -> Body:
    names = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
    taps = values["resample_filter"]
    if type(taps) not in (list, tuple) or any(type(tap) is not int for tap in taps[:8]):
        raise _Unsupported(f"its resample_filter is {_shown(taps)}; expected [1, 1] or [1, 3, 3, 1]")
    form = tuple(tuple(taps) if name == "resample_filter" else values[name] for name in names)
    body: Body | None = next((known for key, known in _SONG_FORMS.items() if key == form), None)
    if body is None:
        shown = ", ".join(f"{name} {_shown(values[name])}" for name in names)
        raise _Unsupported(
            f"its SongUNet is neither DDPM++ nor NCSN++: it has {shown}; pass a network of one of these"
        )
    return body


def _shown(value: Any) -> str:
    """A value from a file for a message; nested ones only by their kind."""
    if type(value) in (int, float, bool, type(None)):
        return repr(value)[:40]
    if type(value) is str:
        return f"'{printable(value)[:40]}'"
    if type(value) in (list, tuple) and all(type(item) in (int, float) for item in value[:9]):
        return repr(list(value[:9]))[:80]
    return describe(value)


def _as_json(name: str, value: Any) -> Any:
    """A constructor argument for `config.json`; infinity, which JSON lacks, becomes text."""
    if type(value) in (list, tuple) and len(value) <= 16:
        return [_as_json(name, item) if type(item) not in (list, tuple) else describe(item) for item in value]
    if type(value) is float and not math.isfinite(value):
        return str(value)
    if type(value) in (str, int, float, bool, type(None)) and len(str(value)) <= 200:
        return value
    raise _Unsupported(
        f"its constructor argument {printable(name)} is {describe(value)}; expected plain data"
    )


def _read_tensors(network: ModuleRecord, config: EDMConfig) -> dict[str, Tensor]:
    """The state of the network, checked against `config`: float32, contiguous, finite."""
    records = state_tensors(network)
    net = skeleton(config)
    problem = mismatch(net, {name: record.shape for name, record in records.items()})
    if problem is not None:
        raise DamagedPickle(f"its tensors do not fit its constructor arguments: {problem}")
    storages = {id(record.storage): record.storage for record in records.values()}
    if sum(record.num_bytes for record in records.values()) > sum(len(s.data) for s in storages.values()):
        raise RefusedPickle("its tensors overlap")
    return {name: _read_tensor(name, record, config) for name, record in records.items()}


def _read_tensor(name: str, record: TensorRecord, config: EDMConfig) -> Tensor:
    if record.storage.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DamagedPickle(f"{name} holds {record.storage.dtype}; expected torch.float32")
    tensor = record.materialise().float()
    if not bool(torch.isfinite(tensor).all()):
        raise DamagedPickle(f"{name} holds numbers that are not finite")
    if name.endswith(".resample_filter"):
        # The box filter is never read: pooling and repetition stand for it.
        if not torch.allclose(tensor, box_or_fir(config.resample_taps), rtol=1e-3, atol=1e-5):
            raise DamagedPickle(f"{name} is not the filter that its constructor arguments name")
    return tensor
