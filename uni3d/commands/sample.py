"""The command `sample`: images of a teacher or a one-step student, one for each seed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import parse_flags, read_numbers
from uni3d.config.values import check_range
from uni3d.errors import UsageError
from uni3d.outputs import check_output_file, check_output_folder

PICTURES = (".png", ".zip")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a network is sampled: shared by `sample` and `evaluate`."""

    steps: int | None = None
    """Heun steps of a teacher, 18 by default: N steps are 2 N - 1 evaluations."""
    one_step: bool = False
    """One evaluation, for an imported student; students that uni3d trained say so themselves."""
    sigma_init: float | None = None
    """Noise level of a student's input; by default what its folder says, or 2.5."""
    class_index: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """The class of all images; by default each seed draws one."""
    churn: float = 0.0
    """Noise that EDM's stochastic sampler adds (S_churn); 0 is the deterministic one."""
    batch_size: int = 64
    """Images at once; does not change them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the body of the network computes in."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    quiet: bool = False
    """No progress on stderr."""
    json: bool = False
    """Print the result as JSON."""

    def check(self) -> None:
        """ConfigError for values out of range."""
        if self.steps is not None:
            check_range("--steps", self.steps, 1, 10_000)
        if self.sigma_init is not None:
            check_range("--sigma-init", self.sigma_init, 1e-3, 1e3)
        check_range("--churn", self.churn, 0, 1e4)
        check_range("--batch-size", self.batch_size, 1, 100_000)


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SamplingOptions):
    """Make images with an EDM network: a teacher in many steps, a student in one.

    A seed makes the same image whatever the batch size. OUTPUT ending in .png is one grid, in .zip a data set
    in EDM's format, anything else a folder with a PNG for each seed.
    """

    network: tyro.conf.Positional[Path]
    """Folder that `uni3d import-edm` or a training run wrote."""
    output: Path
    """Where the images go."""
    seeds: str = "0-63"
    """Seeds, one for each image, such as 7, 0-63 or 0-9,20-29."""
    columns: int | None = None
    """Of the grid; nearly square by default."""
    overwrite: bool = False
    """Replace a file, or write into a folder that holds something."""


def sample(arguments: Sequence[str]) -> int:
    """`uni3d sample NETWORK --seeds 0-63 --output X`."""
    options = parse_flags(SampleOptions, arguments, command="sample")
    if options.quiet:
        be_quiet()
    options.check()
    if options.columns is not None:
        check_range("--columns", options.columns, 1, 4096)
    seeds = read_numbers("--seeds", options.seeds)
    check_images_output(options.output, overwrite=options.overwrite)
    if not options.network.is_dir():
        raise UsageError(f"'{options.network}' is not a folder; pass one that `uni3d import-edm` wrote")
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds names a seed twice; name each once")
    with results_only() as stdout:
        result = _write(options, seeds)
        stdout.write(f"{json.dumps(result) if options.json else options.output}\n")
    return 0


def _write(options: SampleOptions, seeds: Sequence[int]) -> dict[str, Any]:
    from uni3d.distillation.image_files import write_images
    from uni3d.training.run_log import Progress

    network = open_for_sampling(options.network, options)
    with Progress(len(seeds), label="sample", quiet=options.quiet) as progress:
        images = network.images(
            seeds,
            class_index=options.class_index,
            batch_size=options.batch_size,
            progress=progress.update,
        )
        write_images(images, seeds, options.output, num_columns=options.columns)
    return {
        "output": str(options.output),
        "num_images": len(seeds),
        "seeds": options.seeds,
        "class": options.class_index,
        **network.record(),
    }


def open_for_sampling(folder: Path, options: SamplingOptions) -> Any:
    """The `SavedNetwork` of `folder`, to be sampled as the flags say."""
    import torch

    from uni3d.commands.evaluation import checked_device
    from uni3d.distillation.sampling import Churn, check_class, with_churn
    from uni3d.distillation.saved_network import open_network

    network = open_network(
        folder,
        num_steps=options.steps,
        is_one_step=options.one_step,
        sigma_init=options.sigma_init,
        device=checked_device(options.device),
        body_dtype=getattr(torch, options.precision),
    )
    check_class(options.class_index, network.net.config)
    return dataclasses.replace(network, settings=with_churn(network.settings, Churn(amount=options.churn)))


def check_images_output(path: Path, *, overwrite: bool) -> None:
    """UsageError if images cannot be written to `path`, or would replace something unless `overwrite`."""
    if path.suffix.lower() in PICTURES:
        check_output_file(path, overwrite=overwrite, suffixes=PICTURES)
        return
    if path.suffix and not path.is_dir():
        raise UsageError(
            f"output '{path}' has the suffix '{path.suffix}'; use .png, .zip, or a folder's name without one"
        )
    check_output_folder(path)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"the folder '{path}' is not empty; choose another name or pass --overwrite")
