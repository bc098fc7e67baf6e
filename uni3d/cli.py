"""The command line: which command, what it returns, and how errors become one sentence and an exit code.

Nothing heavy is imported here, so that `uni3d --help` is instant; each command imports its program when it
runs. Exit codes: 0 done, 1 the run failed, 2 bad input, 3 missing weights or package, 130 and 143 stopped by
a signal after saving. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

import uni3d
from uni3d.config.values import suggestion
from uni3d.errors import Interrupted, MissingPackageError, Uni3DError, UsageError


@dataclass(frozen=True)
class Command:
    """One command: its words, its line in the help, and where its function is."""

    words: str
    summary: str
    function: str


COMMANDS = (
    Command("generate", "make a textured mesh from a prompt", "uni3d.commands.generate:generate"),
    Command("refine", "retexture or reshape a mesh by a prompt", "uni3d.commands.refine:refine"),
    Command("inspect", "figures of a mesh file and how it was made", "uni3d.commands.information:inspect"),
    Command(
        "evaluate",
        "score meshes or images",
        "uni3d.commands.evaluation:evaluate",
    ),
    Command("benchmark", "compare methods over prompts and seeds", "uni3d.commands.benchmark:benchmark"),
    Command("methods", "list the guidance methods and what they cost", "uni3d.commands.information:methods"),
    Command("doctor", "versions, devices, weights, optional packages", "uni3d.commands.information:doctor"),
    Command("dataset", "check a set of images, or write it as an EDM zip", "uni3d.commands.dataset:dataset"),
    Command("import-edm", "convert a network pickle of EDM, safely", "uni3d.commands.edm:import_edm"),
    Command("train-teacher", "train an EDM image teacher", "uni3d.commands.images:train_teacher"),
    Command("distill", "distil a one-step image generator from it", "uni3d.commands.images:distill"),
    Command("sample", "make images with a network of EDM or a student", "uni3d.commands.sample:sample"),
    Command("reference", "measure real images for `evaluate`", "uni3d.commands.image_evaluation:reference"),
    Command("teacher render", "render a folder of 3D assets for training", "uni3d.commands.teacher:render"),
    Command("teacher train", "train a teacher on such renders", "uni3d.commands.teacher:train"),
    Command("teacher sample", "draw a grid of a teacher's samples", "uni3d.commands.teacher:sample"),
    Command("teacher vocabulary", "list the words a teacher knows", "uni3d.commands.teacher:vocabulary"),
    Command("teacher evaluate", "measure a teacher's samples", "uni3d.commands.evaluation:evaluate_teacher"),
    Command("evaluator train", "train the model that measures", "uni3d.commands.evaluation:train_evaluator"),
)

HELP = """\
usage: uni3d COMMAND [options]

Text to textured 3D meshes, for example:
  uni3d generate "a red wooden chair" --output chair.glb

commands:
{commands}

options:
  -h, --help            this text, or after a command the options of it
  --version             the version of uni3d
  --debug               show the traceback of an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    words, is_debug = _take_debug(list(sys.argv[1:] if arguments is None else arguments))
    with _log_to_stderr():
        try:
            return _run(words)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt:
            _complain("interrupted", is_debug)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # Whoever read stdout has gone; Python would complain once more when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Uni3DError as error:
            prefix = "" if isinstance(error, Interrupted) else "error: "
            _complain(f"{prefix}{error}", is_debug)
            return error.exit_code
        except ModuleNotFoundError as error:
            package = (error.name or str(error)).partition(".")[0]
            if package == uni3d.__name__:
                raise
            _complain(
                f"error: the package '{package}' is not installed; install uni3d again with what it needs: "
                f"pip install -e . in its checkout",
                is_debug,
            )
            return MissingPackageError.exit_code
        except MemoryError:
            _complain("error: out of memory; lower --mesh.resolution, --field.* or --renderer.*", is_debug)
            return 1
        except OSError as error:
            _complain(f"error: {_describe_os_error(error)}", is_debug)
            return 1
        except Exception as error:  # the last net: whatever it is, a user sees a sentence
            reason = " ".join(str(error).split())[:500] or "no message"
            hint = "" if is_debug else "; this is a fault of uni3d: pass --debug for the traceback"
            _complain(f"error: {type(error).__name__}: {reason}{hint}", is_debug)
            return 1


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0 if words else UsageError.exit_code
    if words[0] == "--version":
        sys.stdout.write(f"uni3d {uni3d.__version__}\n")
        return 0
    command, rest = _find(words)
    if command is None:
        sys.stdout.write(help_text(words[0]))
        return 0
    module_name, _, function_name = command.function.partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    return function(rest) or 0


def _find(words: list[str]) -> tuple[Command | None, list[str]]:
    """The command that `words` begin with and what follows it; None for the help of a group of commands."""
    by_words = {command.words: command for command in COMMANDS}
    if words[0] in by_words:
        return by_words[words[0]], words[1:]
    groups = {name.split()[0] for name in by_words if " " in name}
    if words[0] not in groups:
        known = [name for name in by_words if " " not in name] + sorted(groups)
        raise UsageError(f"unknown command {words[0][:80]!r}; {suggestion(words[0], known)}")
    if len(words) == 1 or words[1] in ("-h", "--help"):
        if len(words) == 1:
            raise UsageError(f"'{words[0]}' needs a second word; see uni3d {words[0]} --help")
        return None, []
    full = f"{words[0]} {words[1]}"
    if full not in by_words:
        known = [name.split()[1] for name in by_words if name.startswith(f"{words[0]} ")]
        raise UsageError(f"unknown command '{words[0]} {words[1][:80]}'; {suggestion(words[1], known)}")
    return by_words[full], words[2:]


def help_text(group: str | None = None) -> str:
    """The help of uni3d, or of the commands that begin with the word `group`."""
    shown = [command for command in COMMANDS if group is None or command.words.startswith(f"{group} ")]
    lines = [f"  {command.words:<20}  {command.summary}" for command in shown]
    return HELP.format(commands="\n".join(lines))


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the words before a lone `--`."""
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != "--debug"]
    return options + words[end:], len(options) < end


def _complain(message: str, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exc(file=sys.stderr)
    sys.stderr.write(f"uni3d: {message}\n")


def _describe_os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    place = f"'{error.filename}': " if error.filename else ""
    return f"{place}{reason}"


class _StderrHandler(logging.Handler):
    """Log lines on stderr, written above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        line = f"uni3d: {level}{record.getMessage()}"
        try:
            tqdm = sys.modules.get("tqdm")
            if tqdm is not None:
                tqdm.tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(f"{line}\n")
        except (OSError, ValueError):
            self.handleError(record)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show what the package logs while a command runs."""
    logger = logging.getLogger("uni3d")
    level = logger.level
    handler = _StderrHandler(logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def results_only() -> Iterator[TextIO]:
    """Inside, `print` of any library goes to stderr; the stream that is yielded is the real stdout."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout
    stdout.flush()


def be_quiet() -> None:
    """Show warnings only, as `--quiet` asks."""
    for handler in logging.getLogger("uni3d").handlers:
        if isinstance(handler, _StderrHandler):
            handler.setLevel(logging.WARNING)
