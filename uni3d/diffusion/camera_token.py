"""One extra context token that tells a text-conditioned denoiser where the camera stands.

The token takes the last position of the text context, so that its length never changes and a pipeline that
knows nothing of cameras still works: without a camera the position keeps what the text encoder put there.
Legend: B batch, L context length, E context width.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uni3d.errors import MissingWeightsError, UsageError

CONDITIONING_DIM = 5
_CONFIG_NAME = "config.json"
_WEIGHTS_NAME = "model.safetensors"


class CameraToken(nn.Module):
    """Camera conditioning [B, 5] (see `Cameras.conditioning`) -> context token [B, 1, E].

    Args:
        embedding_dim: width E of the text context that the token joins.
        hidden_dim: width of the two hidden layers.
    """

    def __init__(self, embedding_dim: int = 256, hidden_dim: int = 256) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        # The second harmonic of the azimuth (two features) tells front and back from the sides at once.
        self.network = nn.Sequential(
            nn.Linear(CONDITIONING_DIM + 2, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, embedding_dim),
            # Text tokens leave their encoder through a layer norm; the camera's speaks at the same loudness.
            nn.LayerNorm(embedding_dim),
        )

    def forward(self, conditioning: Tensor) -> Tensor:
        """Token [B, 1, E] in the dtype of the weights."""
        camera = conditioning.to(next(self.parameters()))
        sin_azimuth, cos_azimuth = camera[:, 0:1], camera[:, 1:2]
        second = torch.cat(
            [2 * sin_azimuth * cos_azimuth, cos_azimuth.square() - sin_azimuth.square()],
            dim=1,
        )
        return self.network(torch.cat([camera, second], dim=1))[:, None]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made when it is missing."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        config = {"embedding_dim": self.embedding_dim, "hidden_dim": self.hidden_dim}
        (target / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, target / _WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CameraToken:
        """Read what `save_pretrained` wrote, in float32 and evaluation mode.

        Raises:
            MissingWeightsError: a file is missing (exit code 3).
            UsageError: a file is damaged or does not fit the configuration (exit code 2).
        """
        source = Path(folder)
        for name in (_CONFIG_NAME, _WEIGHTS_NAME):
            if not (source / name).is_file():
                raise MissingWeightsError(
                    f"camera token {source} has no {name}; copy the whole teacher folder again or retrain it"
                )
        try:
            config = json.loads((source / _CONFIG_NAME).read_text(encoding="utf-8"))
            token = cls(int(config["embedding_dim"]), int(config["hidden_dim"]))
            token.load_state_dict({name: t.float() for name, t in load_file(source / _WEIGHTS_NAME).items()})
        except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UsageError(
                f"camera token {source} is damaged ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "copy the teacher folder again or retrain it"
            ) from error
        return token.eval()


def insert_camera_token(context: Tensor, token: Tensor, *, is_kept: Tensor | None = None) -> Tensor:
    """Replace the last position of `context` [B, L, E] by `token` [B, 1, E]; the length stays L.

    `is_kept` bool [B]: samples where it is False keep the text encoder's own last position (no camera known).
    """
    token = token.to(context.dtype)
    if is_kept is not None:
        token = torch.where(is_kept[:, None, None], token, context[:, -1:])
    return torch.cat([context[:, :-1], token], dim=1)
