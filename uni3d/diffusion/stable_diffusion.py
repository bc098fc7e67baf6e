"""A text-to-image latent diffusion teacher in the diffusers layout, as an x0-predicting denoiser.

`LatentDiffusionTeacher.from_pretrained` takes a hub id or a local directory (Stable Diffusion, or the
embedded
teacher, which uses the same classes) and offers what score distillation needs: text contexts, image encoding,
and D(x, sigma, context) -> x0 for x = x0 + sigma * eps. Networks that predict eps or v on a
variance-preserving
process are converted here, so the losses never see them.
Legend: B batch, L context tokens, E context channels, C latent channels, H W latent pixels.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from uni3d.diffusion.camera_token import CameraToken
from uni3d.errors import MissingWeightsError, UsageError
from uni3d.losses.noise_schedule import DiscreteVPSchedule, vp_from_ve, x0_from_prediction
from uni3d.random_streams import Streams, normal

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
HUB_TIMEOUT_S = 5.0


@dataclass
class LatentDiffusionTeacher:
    """A frozen latent diffusion model. All networks are in eval mode and hold no trainable parameter."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: DiscreteVPSchedule
    prediction_type: str
    camera_token: CameraToken | None
    name: str

    # ------------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
    ) -> LatentDiffusionTeacher:
        """Load a teacher from a hub id or a directory; safetensors only.

        Raises:
            MissingWeightsError: the id or directory cannot be loaded (exit code 3).
            UsageError: the files are damaged, pickled, or of a class this teacher cannot use (exit code 2).
        """
        source = Path(name_or_path)
        is_local = _check_source(str(name_or_path))
        components = _load_components(
            str(name_or_path), dtype=dtype, revision=revision, variant=variant, is_local=is_local
        )
        unet, vae, text_encoder, tokenizer, scheduler = components
        prediction_type = str(scheduler.config.prediction_type)
        if prediction_type not in PREDICTION_TYPES:
            raise UsageError(
                f"teacher '{name_or_path}' predicts '{prediction_type}'; this loader knows "
                f"{PREDICTION_TYPES}: "
                "choose a Stable Diffusion 1.x or 2.x checkpoint"
            )
        camera_folder = source / "camera_token"
        camera_token = CameraToken.from_pretrained(camera_folder) if camera_folder.is_dir() else None
        for network in (unet, vae, text_encoder, camera_token):
            if network is not None:
                # Module.to itself: diffusers' own warns of modules that want float32, even of none.
                nn.Module.to(network, device=device, dtype=dtype).eval().requires_grad_(False)
        unet.to(memory_format=torch.channels_last)
        schedule = DiscreteVPSchedule(scheduler.alphas_cumprod.to(device=device, dtype=torch.float32))
        return cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            schedule=schedule,
            prediction_type=prediction_type,
            camera_token=camera_token,
            name=str(name_or_path),
        )

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        """Where the networks live."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the networks; predictions are returned in float32."""
        return self.unet.dtype

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images the teacher was trained on."""
        return int(self.unet.config.sample_size) * self.downscale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent."""
        size = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), size, size

    @property
    def feature_channels(self) -> int:
        """Channels of the middle block, what a discriminator head reads."""
        return int(self.unet.config.block_out_channels[-1])

    # ------------------------------------------------------------------ text and cameras

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text contexts, float [N, L, E]. Longer prompts are cut to the tokenizer's length, with a
        warning."""
        limit = self.tokenizer.model_max_length
        for prompt in prompts:
            length = len(self.tokenizer(prompt).input_ids)
            if length > limit:
                logger.warning(
                    "the teacher reads %d tokens; the end of a prompt of %d is ignored: %r",
                    limit,
                    length,
                    prompt,
                )
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        # The text encoder may stay on the CPU to save memory.
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0].to(self.device)

    def with_camera(self, context: Tensor, conditioning: Tensor) -> Tensor:
        """Put the camera token into the last slot of `context` [B, L, E]; a teacher without one returns it
        unchanged.

        Args:
            conditioning: `Cameras.conditioning()`, float32 [B, 5].
        """
        if self.camera_token is None:
            return context
        token = self.camera_token(conditioning.to(device=self.device, dtype=self.dtype))
        return torch.cat([context[:, :-1], token], dim=1)

    # ------------------------------------------------------------------ images

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents float32 [B, C, H, W] (the posterior's mean) of images in [0, 1], [B, 3, h, w];
        differentiable.

        Images of another size than the teacher's are resized bilinearly first.
        """
        size = self.image_size
        if images.shape[-2:] != (size, size):
            images = nn.functional.interpolate(
                images, size=(size, size), mode="bilinear", align_corners=False
            )
        posterior = self.vae.encode((images * 2 - 1).to(self.dtype)).latent_dist
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images float32 [B, 3, h, w] in [0, 1] of latents [B, C, H, W]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        decoded = self.vae.decode((latents / self.vae.config.scaling_factor + shift).to(self.dtype)).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------ denoising

    def predict_x0(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """D(x, sigma, context): the x0-prediction, float32 [B, C, H, W].

        Args:
            x: noisy latents x0 + sigma * eps, [B, C, H, W].
            sigma: noise level of each sample, [B].
            context: [B, L, E].
        """
        timestep = self.schedule.timestep(sigma)
        output = self.unet(
            self.network_input(x, sigma), timestep, encoder_hidden_states=context.to(self.dtype)
        ).sample.float()
        return x0_from_prediction(output, x.float(), sigma.float(), self.prediction_type)

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x in the variance-preserving form and precision that the network takes, [B, C, H, W]."""
        x_vp = vp_from_ve(x.float(), sigma.float())
        return x_vp.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def predict_guided_x0(
        self, x: Tensor, sigma: Tensor, context: Tensor, negative_context: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Classifier-free guidance in one batch: (guided x0, conditional x0), each [B, C, H, W].

        guided = negative + guidance_scale * (conditional - negative); a scale of 1 runs one pass only.
        """
        if guidance_scale == 1.0:
            conditional = self.predict_x0(x, sigma, context)
            return conditional, conditional
        both = self.predict_x0(
            torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, negative_context])
        )
        conditional, negative = both.chunk(2)
        return negative + guidance_scale * (conditional - negative), conditional

    @contextmanager
    def recorded_middle(self) -> Iterator[list[Tensor]]:
        """Within the block, each pass appends its middle block's output [B, F, h, w]: a discriminator
        reads it free."""
        recorded: list[Tensor] = []
        handle = self.unet.mid_block.register_forward_hook(
            lambda _module, _inputs, output: recorded.append(output.float())
        )
        try:
            yield recorded
        finally:
            handle.remove()

    def middle_features(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """Output of the network's middle block, float32 [B, F, h, w]: the encoder half of one pass."""
        x_vp = self.network_input(x, sigma)
        return unet_middle_features(
            self.unet, x_vp, self.schedule.timestep(sigma), context.to(self.dtype)
        ).float()

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        negative_context: Tensor,
        *,
        guidance_scale: float,
        num_steps: int,
        generator: Streams | None = None,
        before_step: Callable[[], object] | None = None,
    ) -> Tensor:
        """Draw latents [B, C, H, W] for `context` [B, L, E] by deterministic DDIM steps in sigma (Song et
        al. 2021). `before_step` is called before each of them and may raise, to leave in between."""
        shape = (context.shape[0], *self.latent_shape)
        last = self.schedule.num_timesteps - 1
        timesteps = torch.linspace(last, 0, num_steps + 1)[:-1].to(self.device)
        sigmas = torch.cat([self.schedule.sigma(timesteps), torch.zeros(1, device=self.device)])
        noise = normal(shape, generator).to(self.device)
        x = noise * torch.sqrt(1 + sigmas[0] ** 2)
        for current, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            if before_step is not None:
                before_step()
            sigma = current.expand(shape[0])
            x0, _ = self.predict_guided_x0(x, sigma, context, negative_context, guidance_scale)
            x = x0 + (following / current) * (x - x0)
        return x


def unet_middle_features(unet: Any, x_vp: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """Run the down and middle blocks of a `UNet2DConditionModel` only. Shapes as in its `forward`."""
    embedding = unet.time_embedding(unet.time_proj(timestep).to(x_vp.dtype))
    hidden = unet.conv_in(x_vp)
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            hidden, _ = block(hidden, embedding, encoder_hidden_states=context)
        else:
            hidden, _ = block(hidden, embedding)
    return unet.mid_block(hidden, embedding, encoder_hidden_states=context)


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
        json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(
            f"'{index}' is damaged ({error}); write the teacher again or pass another one"
        ) from error
    for part in ("unet", "vae", "text_encoder"):
        folder = source / part
        if not folder.is_dir():
            raise MissingWeightsError(
                f"teacher directory '{source}' lacks '{part}/'; copy the whole model again"
            )
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            _check_safetensors(file)
        if files:
            continue
        if list(folder.glob("*.bin")) or list(folder.glob("*.ckpt")):
            raise UsageError(
                f"'{folder}' holds pickled weights, which can run code and are refused; save the model with "
                "`save_pretrained(..., safe_serialization=True)`"
            )
        raise MissingWeightsError(f"'{folder}' holds no .safetensors weights; copy the whole model again")


def _check_safetensors(file: Path) -> None:
    """Read the header, which says how long the file must be; UsageError if it is not a whole one."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"'{file}' is cut off, damaged or no safetensors file ({_first_line(error)}), and pickled "
            f"weights are refused; copy the teacher again"
        ) from error


def _load_components(
    name: str, *, dtype: torch.dtype, revision: str | None, variant: str | None, is_local: bool
) -> tuple[Any, ...]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    options: dict[str, Any] = {"local_files_only": is_local}
    if revision:
        options["revision"] = revision
    weights = {"torch_dtype": dtype, "use_safetensors": True, "output_loading_info": True, **options}
    if variant:
        weights["variant"] = variant
    text_weights = {key: value for key, value in weights.items() if key != "torch_dtype"}
    try:
        with quiet_libraries():
            components = (
                _complete("unet", UNet2DConditionModel.from_pretrained(name, subfolder="unet", **weights)),
                _complete("vae", AutoencoderKL.from_pretrained(name, subfolder="vae", **weights)),
                _complete(
                    "text_encoder",
                    CLIPTextModel.from_pretrained(
                        name, subfolder="text_encoder", dtype=dtype, **text_weights
                    ),
                ),
                CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **options),
                DDIMScheduler.from_pretrained(name, subfolder="scheduler", **options),
            )
        _, _, text_encoder, tokenizer, _ = components
        if tokenizer.model_max_length > text_encoder.config.max_position_embeddings:
            # transformers makes an empty tokenizer, without a limit, of a folder without its files.
            raise ValueError("its tokenizer does not belong to its text encoder, or files of it are missing")
        return components
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
            f"{constants.ENDPOINT} cannot be reached or is turned off" if is_local else _first_line(error)
        )
        raise MissingWeightsError(_hub_message(name, reason)) from error


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
    return (
        f"teacher '{name[:200]}' is no directory here and could not be loaded from the hub ({reason}; the "
        f"cache {constants.HF_HUB_CACHE} was looked in): pass --teacher DIRECTORY with a local copy; or go "
        f"online, with HF_TOKEN set if the model is gated; or use --teacher embedded, which needs no download"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
