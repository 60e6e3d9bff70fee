"""Jobs and their files as the store keeps them. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdit_launcher.gang.job import ENDS

DONE, FAILED, CANCELLED = ENDED = ENDS
QUEUED, RUNNING = "queued", "running"
STATUSES = (QUEUED, RUNNING, *ENDED)


@dataclass(frozen=True)
class NewFile:
    """A file to be stored with a job.

    Args:
        role: ``result``, ``thumbnail``, ``spritesheet``, ``trace`` or ``input``.
        number: counts the files of a role from 0.
        suffix: of its name, with the dot.
        media: its media type.
        data: what is in it.
        seed: of the noise that it came from.
    """

    role: str
    number: int
    suffix: str
    media: str
    data: bytes
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a job has ended.

    Args:
        status: one of ``ENDED``.
        error: why there is no result.
        refused: the request asked for what is not possible, rather than something having gone wrong.
        seconds: of the phases of the pipeline.
        files: results.
    """

    status: str
    error: str | None = None
    refused: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: tuple[NewFile, ...] = ()


@dataclass(frozen=True)
class StoredFile:
    """A file of a job; see `NewFile`.

    Args:
        path: where it is.
        bytes: its size.
    """

    role: str
    number: int
    media: str
    path: Path
    bytes: int
    seed: int


@dataclass(frozen=True)
class NewJob:
    """A job that a client asks for.

    Args:
        key: name of the key that it came with, "" where no key is needed.
        kind: ``job`` (our own API), ``image`` or ``video`` (OpenAI's).
        request: what the gang is asked for, and how results are written.
        about: what it comes to: size, steps and so on with the defaults filled in.
        priority: higher ones run first.
        deadline: ``time.time()`` after which nobody wants it.
        attached: its client waits on the open connection and has no id to come back with.
        idempotency: name that the client gave it, so that sending it again makes no second one.
        digest: of what the client wrote, to tell a repetition from another request of the same name.
        webhook: address that is called when it has ended.
    """

    key: str
    kind: str
    request: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    deadline: float | None = None
    attached: bool = False
    idempotency: str | None = None
    digest: str = ""
    webhook: str | None = None


@dataclass(frozen=True)
class StoredJob(NewJob):
    """A job in the store; see `NewJob`.

    Args:
        number: counts all jobs in the order in which they came.
        id: its name, which cannot be guessed.
        status: one of ``STATUSES``.
        created, started, ended: ``time.time()``.
        tries: how often a gang ended while it drew this job.
        error: why there is no result.
        refused: the request asked for what is not possible, rather than something having gone wrong.
        seconds: of the phases of the pipeline.
        files: inputs and results.
    """

    number: int = 0
    id: str = ""
    status: str = QUEUED
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    tries: int = 0
    error: str | None = None
    refused: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()

    @property
    def results(self) -> tuple[StoredFile, ...]:
        """The pictures, videos or latents, in order."""
        return tuple(file for file in self.files if file.role == "result")

    def file(self, role: str, number: int = 0) -> StoredFile | None:
        """One of its files, None if there is no such."""
        return next((file for file in self.files if (file.role, file.number) == (role, number)), None)


@dataclass(frozen=True)
class DueWebhook:
    """An address that is to be called, since a job has ended.

    Args:
        job: its id; ``status``, ``error`` and ``ended`` are as of `StoredJob`.
        tries: how often it was called in vain.
    """

    job: str
    url: str
    tries: int
    status: str
    error: str | None
    ended: float
