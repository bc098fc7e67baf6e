"""The command `benchmark`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uni3d.benchmark.settings import BenchmarkConfig
from uni3d.cli import be_quiet, results_only
from uni3d.commands.parsing import option_value, parse_flags
from uni3d.config.loader import load_config
from uni3d.outputs import check_output_folder


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(BenchmarkConfig):
    """Compare methods over prompts, seeds and budgets.

    Run the same command again to go on, and several times at once to share the work. Flags win over the file
    of --config; the settings under --run are those of `generate` that all methods share.
    """

    config: Path | None = None
    """YAML file of settings, such as configs/benchmark.yaml."""


def benchmark(arguments: Sequence[str]) -> int:
    """`uni3d benchmark`."""
    file = option_value(arguments, "config")
    base = load_config(file, BenchmarkConfig()) if file else BenchmarkConfig()
    fields = {item.name: getattr(base, item.name) for item in dataclasses.fields(base)}
    options = parse_flags(
        BenchmarkOptions, arguments, command="benchmark", default=BenchmarkOptions(**fields)
    )
    if options.quiet:
        be_quiet()
    check_output_folder(options.output)
    from uni3d.benchmark.pages import summary_markdown
    from uni3d.benchmark.program import benchmark as run

    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(BenchmarkConfig)}
    with results_only() as stdout:
        summary = run(BenchmarkConfig(**values))
        if summary is not None:
            text = json.dumps(summary) if options.json else summary_markdown(summary)
            stdout.write(f"{text.rstrip()}\n")
    return 0
