"""ImageReward: how much people like a picture for a prompt (Xu et al. 2023), from weights of the user's.

A BLIP text encoder that looks at the picture, and five linear layers on its first token. The folder holds
what `BlipForImageTextRetrieval.save_pretrained` and its tokenizer write, and `reward_head.safetensors` with
the layers as 0.weight, 0.bias, ... 4.bias, from input to output.
Legend: B images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from uni3d.errors import MissingWeightsError, UsageError

HEAD_FILE = "reward_head.safetensors"
_HEAD_WIDTHS = (1024, 128, 64, 16, 1)
_MAX_TOKENS = 35
# The published model's scores are made to have mean zero and deviation one over its training data.
_SCORE_MEAN, _SCORE_STD = 0.16717362830052426, 1.0333394966054072
_PIXEL_MEAN, _PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32


def reward_head(width: int) -> nn.Sequential:
    """The layers on the first token, [B, width] to [B, 1]; none of them is followed by a nonlinearity."""
    widths = (width, *_HEAD_WIDTHS)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)))


class ImageReward:
    """Scores pictures; the more the better, 0 on average and rarely beyond -2.5 and 2.5.

    Raises MissingWeightsError if the folder lacks a part, UsageError if the head does not fit.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        folder = Path(folder)
        if not (folder / HEAD_FILE).is_file():
            raise MissingWeightsError(
                f"'{folder}' has no {HEAD_FILE}; pass a folder with ImageReward as "
                f"uni3d.evaluation.image_reward describes it"
            )
        try:
            blip = BlipForImageTextRetrieval.from_pretrained(str(folder), use_safetensors=True)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise MissingWeightsError(f"no BLIP could be loaded from '{folder}': {error}") from error
        self._blip: Any = blip.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self._head = reward_head(self._blip.config.text_config.hidden_size).to(device).requires_grad_(False)
        try:
            self._head.load_state_dict(load_file(folder / HEAD_FILE))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"'{folder / HEAD_FILE}' does not fit its BLIP ({reason}); take both from one model"
            ) from error

    @torch.no_grad()
    def score(self, images: Tensor, prompt: str) -> Tensor:
        """Rewards float32 [B], on the CPU, of images [B, 3, H, W] in [0, 1] for one prompt."""
        tokens = self._tokenizer(
            prompt, padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(self._blip.device)
        parts = [
            self._score(images[start : start + _BATCH], tokens) for start in range(0, len(images), _BATCH)
        ]
        return torch.cat(parts)

    def _score(self, images: Tensor, tokens: Any) -> Tensor:
        size = int(self._blip.config.vision_config.image_size)
        pixels = functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(
            0, 1
        )
        mean, std = (torch.tensor(values)[:, None, None] for values in (_PIXEL_MEAN, _PIXEL_STD))
        seen = self._blip.vision_model(((pixels - mean) / std).to(self._blip.device)).last_hidden_state
        text = self._blip.text_encoder(
            input_ids=tokens.input_ids.expand(len(images), -1),
            attention_mask=tokens.attention_mask.expand(len(images), -1),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state
        return ((self._head(text[:, 0].float())[:, 0] - _SCORE_MEAN) / _SCORE_STD).cpu()
