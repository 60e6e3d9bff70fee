"""Jobs in SQLite and their files in a folder: what was accepted is there after any end of the server. Without torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from xdit_core.errors import UsageError
from xdit_core.filesystem import user_path
from xdit_launcher.serve.records import (
    CANCELLED,
    ENDED,
    QUEUED,
    RUNNING,
    STATUSES,
    DueWebhook,
    NewFile,
    NewJob,
    Outcome,
    StoredFile,
    StoredJob,
)

LEFT_ALONE = "the server was restarted, and the client that waited for this job had gone."
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, kind TEXT NOT NULL,
    request TEXT NOT NULL, about TEXT NOT NULL, status TEXT NOT NULL, priority INTEGER NOT NULL, deadline REAL,
    attached INTEGER NOT NULL, created REAL NOT NULL, started REAL, ended REAL, tries INTEGER NOT NULL DEFAULT 0,
    error TEXT, refused INTEGER NOT NULL DEFAULT 0, seconds TEXT NOT NULL DEFAULT '{}', idempotency TEXT,
    digest TEXT NOT NULL, removed INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX IF NOT EXISTS once ON jobs(key, idempotency);
CREATE INDEX IF NOT EXISTS by_status ON jobs(status, number);
CREATE TABLE IF NOT EXISTS files(
    job TEXT NOT NULL, role TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL, media TEXT NOT NULL,
    bytes INTEGER NOT NULL, seed INTEGER NOT NULL, PRIMARY KEY(job, role, number));
CREATE TABLE IF NOT EXISTS webhooks(
    job TEXT PRIMARY KEY, url TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0);
"""


class Store:
    """The jobs of a server. Every method may be called from any thread.

    Args:
        folder: as of ``--data``; it is made if need be.

    Raises:
        UsageError: the folder cannot be used, or another server uses it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = user_path(folder, "--data ").absolute()
        self._lock = threading.RLock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in ("results", "inputs"):
                (self.folder / name).mkdir(exist_ok=True)
            self._mark = open(self.folder / "lock", "w")  # noqa: SIM115  it is held while the server lives
            fcntl.flock(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._db = sqlite3.connect(self.folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA cache_size=-256")  # KiB; the system keeps the file in memory anyway
            self._db.executescript(SCHEMA)
        except BlockingIOError as error:
            raise UsageError(f"--data {folder} is in use by another server; choose another folder.") from error
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"--data {folder} cannot be used ({error}); choose another folder.") from error

    def close(self) -> None:
        """Give the folder back."""
        with self._lock:
            self._db.close()
            self._mark.close()

    @contextlib.contextmanager
    def _transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Everything in the block is stored, or nothing.

        Args:
            durable: wait for the disk. Where it may be lost with the machine, the job is drawn again.
        """
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def secret(self) -> bytes:
        """A random number of this folder, with which addresses of results are signed."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES('secret', ?)", (secrets.token_hex(32),))
            return bytes.fromhex(db.execute("SELECT value FROM meta WHERE name='secret'").fetchone()["value"])

    def accept(self, job: NewJob, inputs: Sequence[NewFile] = ()) -> tuple[StoredJob, bool]:
        """Store a job; when this returns, it is on the disk.

        Returns:
            The job, and whether it is new: one with the same ``key`` and ``idempotency`` is stored once.
        """
        if job.idempotency is not None and (earlier := self.named(job.key, job.idempotency)):
            return earlier, False
        id = secrets.token_hex(12)
        stored = self._write(id, "inputs", inputs)
        try:
            with self._transaction() as db:
                db.execute(
                    "INSERT INTO jobs(id, key, kind, request, about, status, priority, deadline, attached, created,"
                    " idempotency, digest) VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        *(id, job.key, job.kind, json.dumps(job.request), json.dumps(job.about), QUEUED),
                        *(job.priority, job.deadline, job.attached, time.time(), job.idempotency, job.digest),
                    ),
                )
                self._note_files(id, stored)
                if job.webhook is not None:
                    db.execute("INSERT INTO webhooks(job, url) VALUES(?,?)", (id, job.webhook))
        except sqlite3.IntegrityError:  # another thread has stored one of this name meanwhile
            shutil.rmtree(self.folder / "inputs" / id, ignore_errors=True)
            if job.idempotency is not None and (earlier := self.named(job.key, job.idempotency)):
                return earlier, False
            raise
        accepted = self.find(id)
        if accepted is None:
            raise sqlite3.DatabaseError(f"job {id} was stored and cannot be read")
        return accepted, True

    def find(self, id: str) -> StoredJob | None:
        """A job by its id."""
        jobs = self._select("id=? AND removed=0", (id,))
        return jobs[0] if jobs else None

    def named(self, key: str, idempotency: str) -> StoredJob | None:
        """A job by the name that its client gave it."""
        jobs = self._select("key=? AND idempotency=? AND removed=0", (key, idempotency))
        return jobs[0] if jobs else None

    def waiting(self) -> list[StoredJob]:
        """All queued jobs, the oldest first."""
        return self._select("status=? AND removed=0 ORDER BY number", (QUEUED,))

    def page(
        self,
        key: str,
        kinds: Sequence[str],
        status: str | None = None,
        after: str | None = None,
        limit: int = 20,
        oldest_first: bool = False,
    ) -> list[StoredJob]:
        """Some jobs of a key.

        Args:
            after: id of the last job of the page before.
            limit: most jobs of the page.
        """
        condition, values = f"key=? AND removed=0 AND kind IN ({','.join('?' * len(kinds))})", [key, *kinds]
        if status is not None:
            condition, values = condition + " AND status=?", [*values, status]
        if after is not None:
            sign = ">" if oldest_first else "<"
            condition += f" AND number {sign} (SELECT number FROM jobs WHERE id=?)"
            values = [*values, after]
        direction = "ASC" if oldest_first else "DESC"
        return self._select(f"{condition} ORDER BY number {direction} LIMIT {int(limit)}", values)

    def _select(self, condition: str, values: Sequence[Any]) -> list[StoredJob]:
        with self._lock:
            rows = self._db.execute(f"SELECT * FROM jobs WHERE {condition}", tuple(values)).fetchall()
            ids = [row["id"] for row in rows]
            marks = ",".join("?" * len(ids))
            files = self._db.execute(f"SELECT * FROM files WHERE job IN ({marks}) ORDER BY number", ids).fetchall()
        return [self._job(row, [file for file in files if file["job"] == row["id"]]) for row in rows]

    def _job(self, row: sqlite3.Row, files: Sequence[sqlite3.Row]) -> StoredJob:
        values = {name: row[name] for name in row.keys() if name != "removed"}  # noqa: SIM118  a Row is no mapping
        values |= {name: json.loads(row[name]) for name in ("request", "about", "seconds")}
        values |= {name: bool(row[name]) for name in ("attached", "refused")}
        return StoredJob(**values, files=tuple(self._file(file) for file in files))

    def _file(self, row: sqlite3.Row) -> StoredFile:
        kind = "inputs" if row["role"] == "input" else "results"
        path = self.folder / kind / row["job"] / row["name"]
        return StoredFile(row["role"], row["number"], row["media"], path, row["bytes"], row["seed"])

    def start(self, id: str) -> None:
        """A job begins to run."""
        with self._transaction(durable=False) as db:
            db.execute("UPDATE jobs SET status=?, started=? WHERE id=?", (RUNNING, time.time(), id))

    def requeue(self, id: str, blamed: bool) -> None:
        """A running job waits again, since the gang has ended.

        Args:
            blamed: it was drawn when that happened.
        """
        with self._transaction(durable=False) as db:
            db.execute("UPDATE jobs SET status=?, tries=tries+? WHERE id=?", (QUEUED, int(blamed), id))

    def finish(self, id: str, outcome: Outcome) -> None:
        """A job has ended; its files are on the disk before the store says so."""
        stored = self._write(id, "results", outcome.files)
        seconds = json.dumps(dict(outcome.seconds))
        with self._transaction(durable=False) as db:
            db.execute(
                "UPDATE jobs SET status=?, ended=?, error=?, refused=?, seconds=? WHERE id=?",
                (outcome.status, time.time(), outcome.error, outcome.refused, seconds, id),
            )
            self._note_files(id, stored)

    def remove(self, id: str) -> None:
        """Forget a job and its files."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE id=?", (id,))
            db.execute("DELETE FROM files WHERE job=?", (id,))
            db.execute("DELETE FROM webhooks WHERE job=?", (id,))
        for kind in ("results", "inputs"):
            shutil.rmtree(self.folder / kind / id, ignore_errors=True)

    def due_webhooks(self, now: float, limit: int) -> list[DueWebhook]:
        """Addresses that are to be called now because their jobs have ended, the longest due first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT w.job, w.url, w.tries, j.status, j.error, j.ended FROM webhooks w JOIN jobs j ON j.id=w.job"
                f" WHERE j.status IN {ENDED} AND j.removed=0 AND w.due<=? ORDER BY w.due LIMIT ?",
                (now, limit),
            ).fetchall()
        return [DueWebhook(*row) for row in rows]

    def webhook_postponed(self, id: str, due: float) -> None:
        """An address could not be called; try again then."""
        with self._transaction() as db:
            db.execute("UPDATE webhooks SET tries=tries+1, due=? WHERE job=?", (due, id))

    def webhook_settled(self, id: str) -> None:
        """An address was called, or is given up."""
        with self._transaction() as db:
            db.execute("DELETE FROM webhooks WHERE job=?", (id,))

    def hide(self, id: str) -> None:
        """Let nobody see a job any more that still runs; it is removed when it has ended."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET removed=1, idempotency=NULL WHERE id=?", (id,))

    def hidden(self, id: str) -> bool:
        """Whether a job was hidden."""
        with self._lock:
            row = self._db.execute("SELECT removed FROM jobs WHERE id=?", (id,)).fetchone()
        return row is not None and bool(row["removed"])

    def recover(self) -> int:
        """Put the store in order after a server has ended: what it drew waits again.

        A job whose client waited on its connection is cancelled, because that client is gone.

        Returns:
            How many jobs wait.
        """
        with self._transaction() as db:
            db.execute("UPDATE jobs SET status=? WHERE status=?", (QUEUED, RUNNING))
            db.execute(
                "UPDATE jobs SET status=?, ended=?, error=? WHERE status=? AND attached=1",
                (CANCELLED, time.time(), LEFT_ALONE, QUEUED),
            )
            hidden = [row["id"] for row in db.execute("SELECT id FROM jobs WHERE removed=1")]
            known = {row["id"] for row in db.execute("SELECT id FROM jobs WHERE removed=0")}
        for id in hidden:
            self.remove(id)
        for kind in ("results", "inputs"):
            for folder in (self.folder / kind).iterdir():
                if folder.name not in known:
                    shutil.rmtree(folder, ignore_errors=True)
        return len(self.waiting())

    def prune(self, most_bytes: float, most_seconds: float) -> list[str]:
        """Forget ended jobs that are too old, and the oldest while all files together are too large.

        The job that ended last stays.

        Returns:
            The ids of the jobs that are gone.
        """
        with self._lock:
            rows = self._db.execute(
                "SELECT id, ended, (SELECT COALESCE(SUM(bytes), 0) FROM files WHERE job=id) AS size FROM jobs"
                f" WHERE status IN {ENDED} ORDER BY ended, number"
            ).fetchall()
        total, gone = sum(row["size"] for row in rows), []
        for row in rows[:-1]:
            if total > most_bytes or time.time() - row["ended"] > most_seconds:
                total -= row["size"]
                gone.append(str(row["id"]))
                self.remove(row["id"])
        return gone

    def counts(self) -> dict[str, int]:
        """How many jobs there are of each status."""
        with self._lock:
            rows = self._db.execute("SELECT status, COUNT(*) AS n FROM jobs GROUP BY status").fetchall()
        return dict.fromkeys(STATUSES, 0) | {row["status"]: row["n"] for row in rows}

    def _write(self, id: str, kind: str, files: Sequence[NewFile]) -> list[tuple[NewFile, str]]:
        """Write files and wait until they are on the disk."""
        if not files:
            return []
        folder = self.folder / kind / id
        folder.mkdir(exist_ok=True)
        names = []
        for file in files:
            name = f"{file.role}-{file.number}{file.suffix}"
            with open(folder / name, "wb") as stream:  # nobody reads it before the store knows of it
                stream.write(file.data)
                stream.flush()
                os.fsync(stream.fileno())
            names.append((file, name))
        descriptor = os.open(folder, os.O_RDONLY)  # the names of the files must be on the disk as well
        os.fsync(descriptor)
        os.close(descriptor)
        return names

    def _note_files(self, id: str, stored: Sequence[tuple[NewFile, str]]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO files VALUES(?,?,?,?,?,?,?)",
            [(id, f.role, f.number, name, f.media, len(f.data), f.seed) for f, name in stored],
        )
