"""uni3d: text to textured 3D meshes by distilling diffusion models with the Uni-Instruct family of losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from uni3d.text_to_3d.pipeline import TextTo3DPipeline

__all__ = ["TextTo3DPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for, so that `import uni3d` stays light."""
    if name == "TextTo3DPipeline":
        from uni3d.text_to_3d.pipeline import TextTo3DPipeline

        return TextTo3DPipeline
    raise AttributeError(f"module 'uni3d' has no attribute {name!r}")
