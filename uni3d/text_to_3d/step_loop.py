"""The steps of a run, one after the other: what is skipped, what is kept, and where a run goes back to."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from uni3d.text_to_3d.memory import MemoryLadder
from uni3d.text_to_3d.scene_optimiser import SceneOptimiser
from uni3d.text_to_3d.stages import StagedOptimiser
from uni3d.training.run_log import NonFiniteGuard

RunOptimiser = SceneOptimiser | StagedOptimiser


class _SavedState(Protocol):
    @property
    def state(self) -> Any: ...


class StateStore(Protocol):
    """Where `take_steps` keeps states to go back to: a `CheckpointStore`, or memory."""

    def save(self, step: int, state: Any) -> object:
        """Keep `state`, nested dicts of tensors and plain data, as it is now."""
        ...

    def load_latest(self) -> _SavedState | None:
        """The state that was kept last."""
        ...


@dataclass
class MemoryStore:
    """Keeps one state. Copies both ways: optimisers write in place into the tensors they are handed."""

    state: Any = None

    def save(self, step: int, state: Any) -> None:
        self.state = copy.deepcopy(state)

    def load_latest(self) -> MemoryStore:
        return MemoryStore(copy.deepcopy(self.state))


def take_steps(
    optimiser: RunOptimiser,
    store: StateStore,
    *,
    on_step: Callable[[int, Mapping[str, float]], object] | None = None,
    on_rollback: Callable[[int], object] | None = None,
    agree: Callable[[bool], bool] = bool,
) -> None:
    """Take the steps that are left, keeping the state every `config.checkpoints.interval_s` seconds.

    The store must hold a state already. A step that is not finite moves nothing; three in a row go back to
    the state kept last, and `on_rollback` is told its step. `on_step` gets the index and numbers of every
    other step; returning False ends the loop. Out of memory, the settings are bounded (`MemoryLadder`) and
    the loop goes on from the state kept last. Raises TrainingDiverged when going back did not help, and
    OutOfMemory when nothing is left to bound. Several processes `agree` on what hangs on their clocks.
    """
    config = optimiser.config
    guard = NonFiniteGuard()
    ladder = MemoryLadder(config)
    kept_at = time.monotonic()

    def go_back() -> None:
        kept = store.load_latest()
        assert kept is not None, "a state is kept before the first step"
        optimiser.load_state_dict(kept.state)
        if on_rollback is not None:
            on_rollback(optimiser.step_index)

    while optimiser.step_index < optimiser.num_steps:
        report = ladder.step(optimiser)
        if report is None:
            go_back()
            continue
        verdict = guard.check(optimiser.step_index, {"a gradient": None if report.finite else float("nan")})
        if verdict == "rollback":
            go_back()
            # The noise differs the second time, or the same numbers would come again.
            optimiser.generator.manual_seed(config.seed + 1_000_003 * guard.num_rollbacks)
            continue
        if on_step is not None and on_step(optimiser.step_index, report.values) is False:
            return
        # Running averages take part in a step that is skipped, so only the state after a good one is kept.
        if verdict == "ok" and agree(time.monotonic() - kept_at >= config.checkpoints.interval_s):
            store.save(optimiser.step_index, optimiser.state_dict())
            kept_at = time.monotonic()
