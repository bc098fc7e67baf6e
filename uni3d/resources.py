"""Where the files that come with uni3d are: in the checkout, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

from uni3d.errors import MissingWeightsError, UsageError

_PACKAGE = Path(__file__).resolve().parent


def resource_roots(package: Path = _PACKAGE) -> list[Path]:
    """Folders that may hold `assets/` and `configs/`, the checkout before the copy a wheel carries."""
    checkout = package.parent
    roots = [checkout] if (checkout / "pyproject.toml").is_file() else []
    return [*roots, package / "_checkout"]


def resource_path(relative: str, *, package: Path = _PACKAGE) -> Path:
    """The file or folder `relative`, such as "configs/text_to_3d.yaml"; UsageError where it is missing."""
    for root in resource_roots(package):
        if (root / relative).exists():
            return root / relative
    places = " and ".join(str(root / relative) for root in resource_roots(package))
    raise UsageError(f"{relative} is missing from this installation (looked at {places}); reinstall uni3d")


def weights_folder(name: str, *, package: Path = _PACKAGE) -> Path:
    """The folder `assets/<name>` of weights that come with uni3d, for example "teacher".

    Raises MissingWeightsError with the ways on if this installation has none.
    """
    for root in resource_roots(package):
        folder = root / "assets" / name
        if folder.is_dir() and any(folder.rglob("*.safetensors")):
            return folder
    places = " and ".join(str(root / "assets" / name) for root in resource_roots(package))
    raise MissingWeightsError(
        f"the weights of {name!r} are not in this installation (looked at {places}); "
        f"reinstall uni3d from a complete checkout, or pass a directory"
    )
