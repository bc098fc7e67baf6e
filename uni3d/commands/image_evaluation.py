"""The command `reference`, and `evaluate` for images: data sets and networks against real images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import parse_flags, read_numbers
from uni3d.config.values import check_range
from uni3d.errors import UsageError
from uni3d.outputs import check_output_file

NetName = Literal["efficientnet_lite0", "inception_v3"]
ImageKind = Literal["network", "images"]
_ARCHIVES = (".zip", ".npz", ".npz.xz", ".tar.gz", ".tgz")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CIFAR_FILES = ("data_batch_1", "data_batch_1.bin", "test_batch", "test_batch.bin")


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """Measure real images once, as the reference that `uni3d evaluate` compares with.

    The .npz holds mu and sigma as EDM's does, and says which network measured which images.
    """

    data: tyro.conf.Positional[Path]
    """A data set: EDM zip, folder of images, CIFAR-10 as distributed, or .npz of images."""
    output: Path
    """Where the .npz goes."""
    net: NetName
    """The network of features: inception_v3, which FID is defined with, or efficientnet_lite0."""
    weights: Path
    """Its weights file; nothing is downloaded."""
    keep: int | None = None
    """Features kept for kernel distance, precision and recall; 0 none, by default those of all images."""
    images: str | None = None
    """Only these images, by their place from 0 on, such as 0-4999."""
    split: Literal["train", "test"] = "train"
    """Which part of CIFAR-10."""
    batch_size: int = 64
    """Images at once."""
    workers: int = 1
    """Threads that decode."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace a file that exists."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print what was measured as JSON."""


def reference(arguments: Sequence[str]) -> int:
    """`uni3d reference DATA --net NET --weights FILE --output REF.npz`."""
    options = parse_flags(ReferenceOptions, arguments, command="reference")
    if options.quiet:
        be_quiet()
    check_range("--batch-size", options.batch_size, 1, 100_000)
    check_range("--workers", options.workers, 1, 256)
    if options.keep is not None:
        check_range("--keep", options.keep, 0, 10_000_000)
    check_output_file(options.output, overwrite=options.overwrite, suffixes=(".npz",))
    _check_not_itself(options.output, options.data)
    with results_only() as stdout:
        record = _measure(options)
        stdout.write(f"{json.dumps(record) if options.json else options.output}\n")
    return 0


def _measure(options: ReferenceOptions) -> dict[str, Any]:
    from uni3d.evaluation.fidelity import measure_reference
    from uni3d.evaluation.fidelity_reference import write_reference
    from uni3d.training.run_log import Progress

    data = open_selection(options.data, options.images, split=options.split)
    net = feature_net(options.net, options.weights, device=options.device)
    with Progress(len(data), label="reference", quiet=options.quiet) as progress:
        found = measure_reference(
            _counted(data.batches(options.batch_size, num_workers=options.workers), progress.update),
            net,
            source=_source_name(data.name, options.images),
            num_kept=options.keep,
        )
    write_reference(found, options.output)
    return {**found.record(), "output": str(options.output)}


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """What the figures depend on besides the images."""

    num_subsets: int = 100
    """Subsets of the kernel distance."""
    subset_size: int = 1000
    """Images of each set in a subset."""
    num_neighbours: int = 3
    """Of precision and recall."""
    num_splits: int = 10
    """Of the Inception Score."""


@dataclass(frozen=True, kw_only=True)
class EvaluateImagesOptions:
    """Compare images with real ones: a data set, or what a network makes of seeds.

    The distance is called fid only for the Inception-v3 that FID is defined with.
    """

    source: tyro.conf.Positional[Path]
    """A data set (zip, folder, npz, CIFAR-10), or the folder of a network."""
    reference: Path
    """.npz that `uni3d reference` wrote, or one of EDM's."""
    weights: Path
    """Weights file of the network of features."""
    net: NetName | None = None
    """The network of features; by default the reference's."""
    output: Path | None = None
    """Where the figures go as JSON."""
    images: str | None = None
    """Only these images of a data set, by their place from 0 on, such as 5000-9999."""
    split: Literal["train", "test"] = "train"
    """Which part of CIFAR-10."""
    workers: int = 1
    """Threads that decode a data set."""
    seeds: str | None = None
    """Seeds of a network's images, one each; 0-49999 by default."""
    steps: int | None = None
    """Heun steps of a teacher, 18 by default."""
    one_step: bool = False
    """One evaluation, for an imported student; students that uni3d trained say so themselves."""
    sigma_init: float | None = None
    """Noise level of a student's input; by default what its folder says, or 2.5."""
    churn: float = 0.0
    """Noise of EDM's stochastic sampler (S_churn)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the body of the sampled network computes in."""
    batch_size: int = 64
    """Images at once."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace an output that exists."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print everything as JSON."""
    settings: SubsetSettings = field(default_factory=SubsetSettings)
    """What the figures depend on besides the images."""


def evaluate_images(arguments: Sequence[str]) -> int:
    """`uni3d evaluate SOURCE --reference REF.npz --weights FILE`."""
    options = parse_flags(EvaluateImagesOptions, arguments, command="evaluate")
    if options.quiet:
        be_quiet()
    kind = image_kind(options.source)
    if kind is None:
        raise UsageError(unknown_source(options.source))
    _check_options(options, kind)
    if options.output is not None:
        check_output_file(options.output, overwrite=options.overwrite, suffixes=(".json",))
    with results_only() as stdout:
        report = _compare(options, kind)
        if options.output is not None:
            from uni3d.training.checkpoint import atomic_write_json

            atomic_write_json(options.output, report)
        stdout.write(f"{json.dumps(report) if options.json else figures_text(report)}\n")
    return 0


def _check_options(options: EvaluateImagesOptions, kind: ImageKind) -> None:
    check_range("--batch-size", options.batch_size, 1, 100_000)
    check_range("--workers", options.workers, 1, 256)
    for name, low in (("num_subsets", 1), ("subset_size", 2), ("num_neighbours", 1), ("num_splits", 1)):
        flag = f"--settings.{name.replace('_', '-')}"
        check_range(flag, getattr(options.settings, name), low, 1_000_000)
    given = {
        "--seeds": options.seeds is not None,
        "--steps": options.steps is not None,
        "--one-step": options.one_step,
        "--sigma-init": options.sigma_init is not None,
        "--churn": options.churn != 0,
    }
    wrong = [flag for flag, is_given in given.items() if is_given] if kind == "images" else []
    if wrong:
        raise UsageError(
            f"'{options.source}' is a data set, and {wrong[0]} is for networks; leave {wrong[0]} out"
        )
    if kind == "network" and options.images is not None:
        raise UsageError(f"'{options.source}' is a network, and --images is for data sets; pass --seeds")


def _compare(options: EvaluateImagesOptions, kind: ImageKind) -> dict[str, Any]:
    from uni3d.evaluation.fidelity import FidelitySettings
    from uni3d.evaluation.fidelity import evaluate_images as run
    from uni3d.evaluation.fidelity_reference import read_reference
    from uni3d.training.run_log import Progress

    known = read_reference(options.reference)
    net = feature_net(options.net or known.feature_net, options.weights, device=options.device)
    known.check_fits(net)
    seeds, ema = None, None
    if kind == "network":
        network, data, seeds = _sampled(options)
        ema, made_by = network.ema, network.record()
    else:
        data = open_selection(options.source, options.images, split=options.split)
        made_by = {"data": str(options.source), "images": options.images}
    started = time.monotonic()
    with Progress(len(data), label="evaluate", quiet=options.quiet) as progress:
        result = run(
            _counted(data.batches(options.batch_size, num_workers=options.workers), progress.update),
            known,
            net,
            settings=FidelitySettings(**vars(options.settings)),
            seeds=seeds,
            ema=ema,
        )
    return {**result.as_dict(), "images": made_by, "seconds": round(time.monotonic() - started, 3)}


def _sampled(options: EvaluateImagesOptions) -> tuple[Any, Any, tuple[int, int]]:
    """(the network, its images as a data set, first and last seed)."""
    from uni3d.commands.sample import SamplingOptions, open_for_sampling

    seeds = read_numbers("--seeds", options.seeds or "0-49999")
    if not isinstance(seeds, range):
        raise UsageError(f"--seeds is '{options.seeds}'; to evaluate pass one run of seeds, such as 0-49999")
    sampling = SamplingOptions(
        steps=options.steps,
        one_step=options.one_step,
        sigma_init=options.sigma_init,
        churn=options.churn,
        batch_size=options.batch_size,
        precision=options.precision,
        device=options.device,
    )
    sampling.check()
    network = open_for_sampling(options.source, sampling)
    data = network.images(seeds, batch_size=options.batch_size)
    return network, data, (seeds[0], seeds[-1])


def figures_text(report: dict[str, Any]) -> str:
    """The figures, one a line, and what they are of."""
    width = max(len(name) for name in report["metrics"])
    lines = [f"{name:<{width}}  {value:.6g}" for name, value in report["metrics"].items()]
    against = f"{report['num_images']} images against {report['reference']['source']}"
    seeds = report["seeds"]
    if seeds is not None:
        evaluations = report["images"]["num_evaluations"]
        against += f", seeds {seeds['first']}-{seeds['last']}, {evaluations} evaluations each"
    return "\n".join([*lines, against])


# ---- what a source is


def wants_images(arguments: Sequence[str]) -> bool:
    """Whether `uni3d evaluate` was asked about images: by --reference, or by a source that holds images."""
    if any(word.partition("=")[0] == "--reference" for word in arguments):
        return True
    sources = [word for word in arguments if not word.startswith("-")]
    return bool(sources) and image_kind(Path(sources[0])) is not None


def image_kind(path: Path) -> ImageKind | None:
    """What of images is at `path`; None for anything else, such as a mesh or the directory of a run."""
    if path.is_file():
        return "images" if path.name.lower().endswith(_ARCHIVES) else None
    if not path.is_dir() or any(path.glob("mesh.*")) or (path / "config.yaml").is_file():
        return None
    if (path / "config.json").is_file() and not (path / "dataset.json").is_file():
        return "network"
    if any((path / name).is_file() for name in _CIFAR_FILES) or (path / "dataset.json").is_file():
        return "images"
    return "images" if _holds_picture(path) else None


def _holds_picture(folder: Path) -> bool:
    """Whether a picture lies in `folder` or in one of its folders."""
    inside = list(folder.iterdir())
    places = [inside, *(place.iterdir() for place in inside if place.is_dir())]
    return any(file.suffix.lower() in _PICTURES for place in places for file in place)


def unknown_source(path: Path) -> str:
    """The sentence for a source that is neither images nor a network."""
    if not path.exists():
        return f"'{path}' does not exist; pass a data set of images or the folder of a network"
    return (
        f"'{path}' is neither a data set of images (zip, folder, npz, CIFAR-10) nor the folder of a network; "
        f"pass one of these, or leave --reference out to score meshes"
    )


def open_selection(path: Path, images: str | None, *, split: Literal["train", "test"] = "train") -> Any:
    """The `ImageDataset` at `path`, or those of its `images`; labels are not read."""
    from uni3d.data.image_readers import open_images

    data = open_images(path, split=split, labels="none")
    if images is None:
        return data
    chosen = read_numbers("--images", images)
    if max(chosen) >= len(data):
        raise UsageError(f"--images is '{images}'; '{path}' has the images 0 to {len(data) - 1}")
    return data.select(list(chosen))


def feature_net(name: str, weights: Path, *, device: str) -> Any:
    """The `FeatureNet` called `name` with the weights of a file."""
    from uni3d.commands.evaluation import checked_device
    from uni3d.evaluation.fidelity_nets import EFFICIENTNET_LITE0, INCEPTION, EfficientNetLite0, InceptionV3

    if not weights.is_file():
        raise UsageError(f"--weights '{weights}' is not a file; pass the weights of {name}")
    place = checked_device(device)
    if name == INCEPTION:
        return InceptionV3(weights, device=place)
    if name == EFFICIENTNET_LITE0:
        return EfficientNetLite0(weights, device=place)
    raise UsageError(
        f"the reference was measured by {name[:80]!r}, which this version does not know; measure it again "
        f"with {INCEPTION} or {EFFICIENTNET_LITE0}"
    )


def _source_name(name: str, images: str | None) -> str:
    return name if images is None else f"{name}, images {images}"


def _counted(batches: Any, count: Callable[[int], object]) -> Any:
    for batch in batches:
        yield batch
        count(len(batch))


def _check_not_itself(output: Path, data: Path) -> None:
    if output.exists() and data.exists() and output.samefile(data):
        raise UsageError(f"output '{output}' is the data set itself; choose another name")
