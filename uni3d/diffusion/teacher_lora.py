"""A LoRA style merged into a teacher: `uni3d generate --teacher-lora FILE`.

diffusers converts what its own trainers, peft and the kohya scripts write. The update is merged into the
weights and the adapter taken off again, so that nothing after this knows of it: not the fake score, whose own
adapters are switched on and off, and not a compiled network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.rectified_flow import RectifiedFlowTeacher
from uni3d.diffusion.stable_diffusion import StableDiffusionXLTeacher
from uni3d.diffusion.teacher_files import check_safetensors, quiet_libraries
from uni3d.errors import MissingWeightsError, UsageError

ADAPTER_NAME = "style"


def merge_lora(teacher: LatentDiffusionTeacher, file: Path, *, scale: float = 1.0) -> None:
    """Add `scale` times the LoRA in `file` to the weights of the teacher's network and text encoders.

    Raises:
        MissingWeightsError: there is no such file (exit code 3).
        UsageError: it is no safetensors file, holds no LoRA, or one of another model (exit code 2). The
            teacher may be half changed then and must not be used.
    """
    _check_file(file)
    try:
        with quiet_libraries():
            state, options = _converted(teacher, file)
            _load(teacher, state, options)
            _check_loaded(teacher, state)
            for network in _networks(teacher).values():
                if ADAPTER_NAME in getattr(network, "peft_config", {}):
                    _merge(network, scale)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        if "size mismatch" in str(error):
            line = "its matrices have other sizes"
        raise UsageError(
            f"'{file}' is no LoRA of teacher '{teacher.name}' ({line}); pass one trained on this model"
        ) from error


def _check_file(file: Path) -> None:
    if not file.is_file():
        raise MissingWeightsError(f"there is no LoRA file '{file}'; check the path given to --teacher-lora")
    if file.suffix != ".safetensors":
        raise UsageError(
            f"'{file}' does not end in .safetensors; other formats can run code and are refused: convert it"
        )
    check_safetensors(file)


def _mixin(teacher: LatentDiffusionTeacher) -> Any:
    """The class of diffusers that knows the layouts of this kind of model."""
    from diffusers.loaders.lora_pipeline import (
        SD3LoraLoaderMixin,
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )

    if isinstance(teacher, RectifiedFlowTeacher):
        return SD3LoraLoaderMixin
    is_xl = isinstance(teacher, StableDiffusionXLTeacher)
    return StableDiffusionXLLoraLoaderMixin if is_xl else StableDiffusionLoraLoaderMixin


def _networks(teacher: LatentDiffusionTeacher) -> dict[str, Any]:
    """The networks that a LoRA may change, by the prefix of their keys."""
    name = "transformer" if isinstance(teacher, RectifiedFlowTeacher) else "unet"
    encoders = ("text_encoder", "text_encoder_2")
    return {name: teacher.network, **dict(zip(encoders, teacher.text_encoders, strict=False))}


def _converted(teacher: LatentDiffusionTeacher, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under the keys of diffusers, and what its loaders want beside them."""
    mixin = _mixin(teacher)
    options: dict[str, Any] = {
        "use_safetensors": True,
        "local_files_only": True,
        "return_lora_metadata": True,
    }
    if isinstance(teacher, RectifiedFlowTeacher):
        state, metadata = mixin.lora_state_dict(str(file), **options)
        return state, {"metadata": metadata}
    if isinstance(teacher, StableDiffusionXLTeacher):
        options["unet_config"] = teacher.network.config
    state, alphas, metadata = mixin.lora_state_dict(str(file), **options)
    return state, {"network_alphas": alphas, "metadata": metadata}


def _check_loaded(teacher: LatentDiffusionTeacher, state: dict[str, Tensor]) -> None:
    """Every adapter must have found its layer: the libraries drop the others without a word."""
    from peft.tuners.lora import LoraLayer

    wanted = sum(key.endswith((".lora_A.weight", "lora.down.weight", "layer.down.weight")) for key in state)
    found = sum(
        isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A
        for network in _networks(teacher).values()
        if network is not None
        for module in network.modules()
    )
    if wanted == 0:
        raise ValueError("it holds no adapter of a known layout")
    if found != wanted:
        raise ValueError(f"{found} of its {wanted} layers are here")


def _load(teacher: LatentDiffusionTeacher, state: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Put the adapters onto the networks; each takes the keys with its prefix."""
    mixin = _mixin(teacher)
    networks = _networks(teacher)
    name = next(iter(networks))
    if any(key.startswith(f"{name}.") for key in state):
        into = getattr(mixin, f"load_lora_into_{name}")
        into(state, **{name: networks[name]}, adapter_name=ADAPTER_NAME, **options)
    for prefix, encoder in list(networks.items())[1:]:
        if any(key.startswith(f"{prefix}.") for key in state):
            mixin.load_lora_into_text_encoder(
                state,
                text_encoder=encoder,
                prefix=prefix,
                adapter_name=ADAPTER_NAME,
                **({"network_alphas": None} | options),
            )


def _merge(network: Any, scale: float) -> None:
    """Merge the adapter into the weights of its layers and put the plain layers back."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers, scale_lora_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    scale_lora_layers(network, scale)
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config
    network._hf_peft_config_loaded = False  # else the libraries look for it when the next adapter comes
