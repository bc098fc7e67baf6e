"""Load and faults, with figures: the page under many visitors, and under SIGKILL at random moments.

    python tests/web/soak.py load --visitors 20 --jobs 100
    python tests/web/soak.py faults --kills 20 --jobs 30

`--real` makes meshes with the embedded teacher in `--steps` steps; otherwise a stub takes its place. One
JSON object goes to stdout; the exit code is 1 if a job was lost or seen by another visitor, or a page action
failed. `load_average` tells how busy the machine was: beyond its cores, times are longer than they need be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from web_server import Served, Visitor  # noqa: E402

# A visitor watches a job once a second, and opens page and gallery anew every so many looks.
POLLS_PER_RELOAD = 10
LIMITS = ("--max-queue", "1000", "--max-per-visitor", "1000", "--max-per-hour", "100000")


def resident_megabytes(process: int | None) -> float:
    """Memory of a process that is in use; 0 where it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    match = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(match[1]) / 1024 if match else 0.0


def load(folder: Path, *, visitors: int, jobs: int, steps: int, stub: bool, wait_s: float) -> dict[str, Any]:
    """`visitors` order `jobs` at once and watch them; figures about loss, privacy, time and memory."""
    seconds: list[float] = []
    memory: list[tuple[float, float]] = []
    orders: dict[str, tuple[Visitor, str]] = {}
    errors: list[str] = []
    guard, is_over = threading.Lock(), threading.Event()

    def timed(action: Any, *values: Any) -> Any:
        started = time.monotonic()
        result = action(*values)
        with guard:
            seconds.append(time.monotonic() - started)
        return result

    with Served(folder, "--max-steps", str(steps), *LIMITS, stub=stub) as served:
        people = [Visitor(served).open() for _ in range(visitors)]

        def behave(number: int) -> None:
            visitor, mine = people[number], []
            try:
                for index in range(number, jobs, visitors):
                    word = f"thing {index} of visitor {number} end"
                    mine.append(timed(visitor.submit, word))
                    with guard:
                        orders[mine[-1]] = (visitor, word)
                for poll in itertools.count():
                    if is_over.is_set() or timed(visitor.is_finished, mine[-1]):
                        return
                    if poll % POLLS_PER_RELOAD == 0:
                        timed(visitor.get, "/")
                        timed(visitor.call, "gallery")
                    time.sleep(1.0)  # as the page's own timer
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])

        threads = [threading.Thread(target=behave, args=(number,)) for number in range(visitors)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + wait_s
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            assert served.process is not None
            memory.append((resident_megabytes(served.process.pid), resident_megabytes(served.worker())))
            time.sleep(0.5)
        is_over.set()
        for thread in threads:
            thread.join()
        states = {job: visitor.status(job).split(" ")[0] for job, (visitor, _) in orders.items()}
        seen_by_others = sum(
            people[(people.index(visitor) + 1) % visitors].get(f"/jobs/{job}/mesh.glb")[0] == 200
            or f"{word}<" in people[(people.index(visitor) + 1) % visitors].call("gallery")[0]
            for job, (visitor, word) in orders.items()
        )
    half = memory[len(memory) // 2 :]
    earlier, later = half[: len(half) // 2], half[len(half) // 2 :]
    server, worker = (
        [median(sample[which] for sample in part) for part in (earlier, later)] for which in (0, 1)
    )
    return {
        "visitors": visitors,
        "jobs": len(orders),
        "done": sum(state == "Done" for state in states.values()),
        "lost": jobs - sum(state == "Done" for state in states.values()),
        "made_twice": _made_twice(folder) if stub else None,
        "seen_by_others": seen_by_others,
        "errors": errors,
        "first_screen_s": round(served.first_screen_s, 2),
        "page_ready_s": round(served.page_ready_s, 2),
        "actions": len(seconds),
        "action_ms_median": round(1000 * median(seconds), 1),
        "action_ms_95": round(1000 * quantiles(seconds, n=20)[-1], 1),
        # Medians of the third and of the last quarter: a worker's memory moves with the stage of its job.
        "server_mb": [round(value, 1) for value in server],
        "server_growth_last_half": round(server[1] / max(server[0], 1) - 1, 4),
        "worker_mb": [round(value, 1) for value in worker],
        "worker_growth_last_half": round(worker[1] / max(worker[0], 1) - 1, 4),
    }


def faults(
    folder: Path, *, kills: int, jobs: int, steps: int, stub: bool, seed: int, wait_s: float
) -> dict[str, Any]:
    """Kill the server or the worker at `kills` random moments while `jobs` are ordered and made."""
    chance = random.Random(seed)
    killed = {"server": 0, "worker": 0}
    ordered: list[str] = []
    served = Served(folder, "--max-steps", str(steps), *LIMITS, stub=stub)
    with served:
        visitor = Visitor(served).open()
        while sum(killed.values()) < kills or len(ordered) < jobs:
            if len(ordered) < jobs:
                ordered.append(visitor.submit(f"a slow job {len(ordered)}"))
            time.sleep(chance.uniform(0.0, 2.0))
            if sum(killed.values()) >= kills:
                continue
            worker = served.worker()
            if worker is not None and chance.random() < 0.5:
                os.kill(worker, signal.SIGKILL)
                killed["worker"] += 1
            else:
                served.stop(signal.SIGKILL)
                killed["server"] += 1
                served.start()
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not all(visitor.is_finished(job) for job in ordered):
            time.sleep(1.0)
        states = [visitor.status(job).split(" ")[0] for job in ordered]
        listed = visitor.call("gallery")[0].count('class="u3-card"')
    return {
        "killed": killed,
        "jobs": jobs,
        "done": states.count("Done"),
        "lost": jobs - states.count("Done"),
        "states": dict(Counter(states)),
        "listed": listed,
        "made_twice": _made_twice(folder) if stub else None,
    }


def _made_twice(folder: Path) -> int:
    """Jobs that came to their end more than once: a kill between the last file and the store's note."""
    made = (folder / "made.txt").read_text().split()
    return len(made) - len(set(made))


def main() -> int:
    """Run one of the two from the command line."""
    parser = argparse.ArgumentParser(description="Load and fault tests of the web page.")
    parser.add_argument("what", choices=("load", "faults"))
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wait-s", type=float, default=7200.0)
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    common: dict[str, Any] = {"jobs": options.jobs, "steps": options.steps, "stub": not options.real}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "data"
        if options.what == "load":
            figures = load(folder, visitors=options.visitors, wait_s=options.wait_s, **common)
        else:
            figures = faults(folder, kills=options.kills, seed=options.seed, wait_s=options.wait_s, **common)
    figures |= {"real": options.real, "cores": os.cpu_count(), "load_average": round(os.getloadavg()[1], 1)}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["lost"] or figures.get("seen_by_others") or figures.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
