"""Errors a user can act on: one sentence, a remedy, and the exit code of the command line."""

from __future__ import annotations


class Uni3DError(Exception):
    """Base of every error whose message is written for the user; `exit_code` is what the CLI returns."""

    exit_code = 1


class UsageError(Uni3DError, ValueError):
    """Bad input: prompt, option, path, damaged file. The message says what was got and what to do."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or flag that cannot be accepted."""


class MissingWeightsError(Uni3DError):
    """Weights that are not on this machine and could not be loaded from the hub."""

    exit_code = 3


class MissingPackageError(Uni3DError, ImportError):
    """An optional package that this call needs is not installed."""

    exit_code = 3


class TrainingDiverged(Uni3DError):
    """The optimisation produced non-finite numbers and rolling back did not help."""


class OutOfMemory(Uni3DError):
    """Memory ran out, and there is nothing left to give up."""


class ScenesFailed(Uni3DError):
    """Some of many scenes could not be made; the others are there."""


class Interrupted(Uni3DError):
    """Stopped by a signal after the state was saved; the message holds the line that resumes."""

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        return 128 + self.signal_number
