"""The jobs of all visitors in one SQLite file: what was ordered, by whom, how far it is, what it became.

Every change is one transaction, so a kill at any moment leaves a job in one definite state. The table is the
truth; the queue of `job_queue` only says which job comes next.

    queued -> running -> done | failed | cancelled
       ^_________| the worker died or was stopped

A visitor is the digest of a secret cookie. All that is asked on behalf of a visitor names the visitor, and
answers nothing about the jobs of others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from uni3d.errors import UsageError
from uni3d.web.orders import Order, num_steps
from uni3d.web.settings import WebSettings, make_private_folder

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("done", "failed", "cancelled")
CANCELLED_BY_VISITOR = "cancelled"
_BUSY_TIMEOUT_S = 30.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    visitor TEXT NOT NULL,
    address TEXT NOT NULL DEFAULT '',
    pair TEXT,
    prompt TEXT NOT NULL,
    negative_prompt TEXT NOT NULL,
    method TEXT NOT NULL,
    divergence TEXT,
    teacher TEXT NOT NULL,
    seed INTEGER NOT NULL,
    quality TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    created_at REAL NOT NULL,
    started_at REAL,
    heard_at REAL,
    finished_at REAL,
    phase TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    num_steps INTEGER NOT NULL,
    loss REAL,
    seconds_left REAL,
    num_previews INTEGER NOT NULL DEFAULT 0,
    message TEXT NOT NULL DEFAULT '',
    is_cancel_requested INTEGER NOT NULL DEFAULT 0,
    num_starts INTEGER NOT NULL DEFAULT 0,
    num_fruitless_starts INTEGER NOT NULL DEFAULT 0,
    best_step INTEGER NOT NULL DEFAULT 0,
    seconds_worked REAL NOT NULL DEFAULT 0,
    num_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_visitor ON jobs (visitor, number);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
"""
_ORDER = "num_fruitless_starts, number"
# Visitors without cookies are new ones every time: an address may have this many times the share of one.
_VISITORS_PER_ADDRESS = 3


@dataclass(frozen=True)
class Job:
    """One row of the store; times are seconds since 1970, `number` counts up in the order of arrival."""

    number: int
    id: str
    visitor: str
    address: str
    pair: str | None
    prompt: str
    negative_prompt: str
    method: str
    divergence: str | None
    teacher: str
    seed: int
    quality: str
    state: State
    created_at: float
    started_at: float | None
    heard_at: float | None
    finished_at: float | None
    phase: str
    step: int
    num_steps: int
    loss: float | None
    seconds_left: float | None
    num_previews: int
    message: str
    is_cancel_requested: int
    num_starts: int
    num_fruitless_starts: int
    best_step: int
    seconds_worked: float
    num_bytes: int

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in FINISHED

    @property
    def order(self) -> Order:
        """What was asked for."""
        return Order(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Order)})


_COLUMNS = ", ".join(item.name for item in dataclasses.fields(Job))


def visitor_of(secret: str) -> str:
    """The visitor who holds the cookie `secret`; the store never sees the secret itself."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class JobStore:
    """All jobs of one folder. Any number of threads and processes may use stores of the same folder."""

    def __init__(self, settings: WebSettings) -> None:
        self.settings = settings
        make_private_folder(settings.folder)
        make_private_folder(settings.jobs_folder)
        self._path = settings.folder / "jobs.sqlite3"
        with self._transaction() as database:
            database.execute("PRAGMA user_version")
        with self._connection() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(_SCHEMA)
        with self._transaction() as database:  # a folder of an earlier version
            if "address" not in {row[1] for row in database.execute("PRAGMA table_info(jobs)")}:
                database.execute("ALTER TABLE jobs ADD COLUMN address TEXT NOT NULL DEFAULT ''")
        self._path.chmod(0o600)

    def folder(self, job_id: str) -> Path:
        """Where the files of a job are; its id comes from the store, never from a request."""
        return self.settings.jobs_folder / job_id

    # ------------------------------------------------------------------ what visitors do

    def submit(self, order: Order, visitor: str, *, pair: str | None = None, address: str = "") -> Job:
        """Put a checked order into the store; UsageError when the queue or the visitor's share is full.

        `address` is where the visitor calls from, empty where that tells nothing.
        """
        limits = self.settings
        now = time.time()
        with self._transaction() as database:
            waiting = _count(database, "state IN ('queued', 'running')")
            if waiting >= limits.max_queue:
                raise UsageError(f"the queue is full ({waiting} jobs are waiting); try again in a while")
            mine = _count(database, "visitor = ? AND state IN ('queued', 'running')", visitor)
            if mine >= limits.max_unfinished_per_visitor:
                raise UsageError(f"{mine} jobs of yours are waiting already; wait for one, or cancel one")
            recent = _count(database, "visitor = ? AND created_at > ?", visitor, now - 3600)
            if recent >= limits.max_per_hour:
                raise UsageError(f"you have ordered {recent} jobs within an hour; try again later")
            _check_address(database, address, limits, now)
            values: dict[str, Any] = {
                **dataclasses.asdict(order),
                "id": secrets.token_urlsafe(24),
                "visitor": visitor,
                "address": address,
                "pair": pair,
                "created_at": now,
                "num_steps": num_steps(order, limits),
            }
            names, marks = ", ".join(values), ", ".join("?" for _ in values)
            database.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", tuple(values.values()))
            row = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (values["id"],)).fetchone()
        return Job(*row)

    def find(self, job_id: str, visitor: str) -> Job | None:
        """The job if it is this visitor's, else None: whether it exists for others cannot be told."""
        return self._one("id = ? AND visitor = ?", job_id, visitor)

    def jobs_of(self, visitor: str, *, limit: int = 100) -> list[Job]:
        """This visitor's jobs, newest first."""
        return self._many("visitor = ? ORDER BY number DESC LIMIT ?", visitor, limit)

    def pair_of(self, pair: str, visitor: str) -> list[Job]:
        """This visitor's jobs that were ordered together, first ordered first."""
        return self._many("pair = ? AND visitor = ? ORDER BY number", pair, visitor)

    def cancel(self, job_id: str, visitor: str) -> bool:
        """Take a waiting job out at once, and ask the worker to leave a running one. False: no such job."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'cancelled', finished_at = ?, message = ? "
                "WHERE id = ? AND visitor = ? AND state = 'queued'",
                (time.time(), CANCELLED_BY_VISITOR, job_id, visitor),
            )
            changed = database.execute(
                "UPDATE jobs SET is_cancel_requested = 1 WHERE id = ? AND visitor = ?", (job_id, visitor)
            )
            return changed.rowcount == 1

    def before(self, job: Job) -> list[Job]:
        """The jobs of whomever that come before this one, first to last."""
        return self._many(
            "state = 'running' OR (state = 'queued' AND (num_fruitless_starts, number) < (?, ?)) "
            f"ORDER BY state = 'queued', {_ORDER}",
            job.num_fruitless_starts,
            job.number,
        )

    def usual_seconds(self, quality: str, num_steps: int, method: str | None = None) -> float | None:
        """Median time of the last jobs of this quality, length (and method) here; None before the first."""
        with self._connection() as database:
            rows = database.execute(
                "SELECT seconds_worked FROM jobs WHERE state = 'done' AND quality = ? AND num_steps = ? "
                "AND (? IS NULL OR method = ?) ORDER BY finished_at DESC LIMIT 9",
                (quality, num_steps, method, method),
            ).fetchall()
        return median(row[0] for row in rows) if rows else None

    # ------------------------------------------------------------------ what the worker does

    def recover(self) -> list[Job]:
        """Put what a dead worker left back into the queue; returns all that waits, as `waiting` does.

        A job that its visitor had cancelled is cancelled, and one that took down worker after worker fails.
        Only a worker that is alone may call this.
        """
        now = time.time()
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'cancelled', finished_at = ?, message = ? "
                "WHERE state = 'running' AND is_cancel_requested = 1",
                (now, CANCELLED_BY_VISITOR),
            )
            database.execute(
                "UPDATE jobs SET num_fruitless_starts = "
                "CASE WHEN step > best_step THEN 0 ELSE num_fruitless_starts + 1 END, "
                "best_step = max(best_step, step) WHERE state = 'running'"
            )
            database.execute(
                "UPDATE jobs SET state = 'failed', finished_at = ?, message = ? "
                "WHERE state = 'running' AND num_fruitless_starts >= ?",
                (
                    now,
                    "the worker process was ended again and again by this job, most likely for want of "
                    "memory; choose the draft quality",
                    self.settings.max_fruitless_starts,
                ),
            )
            database.execute("UPDATE jobs SET state = 'queued', phase = '' WHERE state = 'running'")
        return self.waiting()

    def waiting(self) -> list[Job]:
        """The jobs that wait, oldest first; one that took down a worker lets the others go before it."""
        return self._many(f"state = 'queued' ORDER BY {_ORDER}")

    def claim(self, job_id: str) -> Job | None:
        """Make a waiting job the running one; None if it no longer waits, so no job is run twice."""
        now = time.time()
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET state = 'running', started_at = coalesce(started_at, ?), heard_at = ?, "
                "phase = 'starting', num_starts = num_starts + 1 WHERE id = ? AND state = 'queued'",
                (now, now, job_id),
            )
            if changed.rowcount == 0:
                return None
            row = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return Job(*row)

    def release(self, job_id: str) -> None:
        """Give a running job back to the queue: its worker was stopped, which is no fault of the job."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'queued', phase = '' WHERE id = ? AND state = 'running'", (job_id,)
            )

    def is_cancel_requested(self, job_id: str) -> bool:
        """Whether its visitor wants the running job to end."""
        with self._connection() as database:
            row = database.execute("SELECT is_cancel_requested FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is None or bool(row[0])

    def report(self, job_id: str, *, add_seconds: float = 0.0, **values: Any) -> None:
        """Write how far a running job is: phase, step, loss, seconds_left, num_previews, message."""
        unknown = set(values) - {"phase", "step", "loss", "seconds_left", "num_previews", "message"}
        assert not unknown, unknown
        settings = "".join(f"{name} = ?, " for name in values)
        with self._transaction() as database:
            database.execute(
                f"UPDATE jobs SET {settings}heard_at = ?, seconds_worked = seconds_worked + ? "
                "WHERE id = ? AND state = 'running'",
                (*values.values(), time.time(), add_seconds, job_id),
            )

    def finish(self, job_id: str, state: State, message: str = "") -> None:
        """End a running job; what is ended stays as it ended. Without a message the last one stays."""
        size = folder_size(self.folder(job_id))
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = ?, message = coalesce(nullif(?, ''), message), finished_at = ?, "
                "seconds_left = NULL, phase = '', num_bytes = ? WHERE id = ? AND state = 'running'",
                (state, message, time.time(), size, job_id),
            )

    def running(self) -> Job | None:
        """The job that the worker is at."""
        return self._one("state = 'running'")

    def sweep(self) -> int:
        """Delete finished jobs that are too old, then the oldest until the rest fit; returns how many."""
        limits = self.settings
        oldest = time.time() - 86_400 * limits.keep_days
        gone: list[str] = []
        with self._transaction() as database:
            rows = database.execute(
                "SELECT id, finished_at, num_bytes FROM jobs WHERE finished_at IS NOT NULL "
                "ORDER BY finished_at DESC, number DESC"
            ).fetchall()
            total = 0
            for job_id, finished_at, num_bytes in rows:
                total += num_bytes
                if finished_at < oldest or total > limits.max_gigabytes * 1e9:
                    gone.append(job_id)
            database.executemany("DELETE FROM jobs WHERE id = ?", [(job_id,) for job_id in gone])
            kept = {row[0] for row in database.execute("SELECT id FROM jobs")}
            # Inside the transaction: no job can be added whose folder would look ownerless.
            for folder in limits.jobs_folder.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
        return len(gone)

    # ------------------------------------------------------------------ SQLite

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            yield database
        finally:
            database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def _many(self, condition: str, *values: Any) -> list[Job]:
        with self._connection() as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {condition}", values).fetchall()
        return [Job(*row) for row in rows]

    def _one(self, condition: str, *values: Any) -> Job | None:
        found = self._many(f"{condition} LIMIT 1", *values)
        return found[0] if found else None


def _count(database: sqlite3.Connection, condition: str, *values: Any) -> int:
    return int(database.execute(f"SELECT count(*) FROM jobs WHERE {condition}", values).fetchone()[0])


def _check_address(database: sqlite3.Connection, address: str, limits: WebSettings, now: float) -> None:
    if not address:
        return
    waiting = _count(database, "address = ? AND state IN ('queued', 'running')", address)
    recent = _count(database, "address = ? AND created_at > ?", address, now - 3600)
    if (
        waiting >= _VISITORS_PER_ADDRESS * limits.max_unfinished_per_visitor
        or recent >= _VISITORS_PER_ADDRESS * limits.max_per_hour
    ):
        raise UsageError(
            f"{waiting} jobs from your address are waiting and {recent} were ordered within an hour; "
            "try again later"
        )


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
