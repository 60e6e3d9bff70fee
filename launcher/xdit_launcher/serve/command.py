"""``xdit-launch serve``: put the parts together, listen, and end well."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from xdit_core import machine
from xdit_core.errors import UsageError
from xdit_core.plan import Plan
from xdit_core.planning.planner import make_plan
from xdit_launcher.backends.base import Backend
from xdit_launcher.gang.loras import LoraFile
from xdit_launcher.printing import print_lines
from xdit_launcher.serve.api.app import Guard, make_app
from xdit_launcher.serve.api.common import Server
from xdit_launcher.serve.auth import Keys, check_host
from xdit_launcher.serve.dispatcher import Dispatcher
from xdit_launcher.serve.gangs.replicas import Gangs, Replicas
from xdit_launcher.serve.gangs.start import gangs
from xdit_launcher.serve.housekeeping import Housekeeping
from xdit_launcher.serve.limits import RequestCheck, ServeSettings, take_settings
from xdit_launcher.serve.operations import Log, Metrics
from xdit_launcher.serve.store import Store
from xdit_launcher.serve.webhooks.addresses import Webhooks
from xdit_launcher.serve.webhooks.sender import WebhookSender

CONNECTIONS_END = 5  # seconds for answers that are being sent when the server ends
BACKLOG = 2048


def serve(
    plugins: Sequence[str],
    values: Mapping[str, Any],
    on: Backend,
    host: str,
    port: int,
    data: str,
    keys_file: str | None,
    replicas: str = "1",
    loras_file: str | None = None,
) -> int:
    """Serve a model until a signal ends the server.

    Args:
        plugins: names of strategies.
        values: flat settings, those of the server (``serve.*``) too.
        on: starts the ranks.
        host, port: where to listen; port 0 takes a free one.
        data: folder of jobs and results.
        keys_file: file with keys of clients, None if there is none.
        replicas: how many gangs answer, as ``2`` or ``1..4``.
        loras_file: file with LoRAs that clients may ask for, None if there is none.

    Returns:
        The exit code.

    Raises:
        XditError: nothing was started; says why.
    """
    limits, values = take_settings(values)
    count = Replicas.parse(replicas)
    keys = Keys(keys_file)
    check_host(host, keys)
    values.setdefault("runs", str(Path(data).absolute() / "runs"))
    devices = on.devices()
    if count.most > 1:
        devices = max(1, (devices or machine.cuda_devices() or machine.cores()) // count.most)
    plan = make_plan(plugins, values, devices=devices)
    loras = LoraFile(loras_file, plan)
    name = f"xdit-{hashlib.sha256(str(Path(data).absolute()).encode()).hexdigest()[:8]}"
    with listening(host, port) as end, gangs(plan, on, count, limits, name, loras) as source:
        answer(plan, source, limits, keys, loras, data, host, end)
    return 0


def answer(
    plan: Plan,
    source: Gangs,
    limits: ServeSettings,
    keys: Keys,
    loras: LoraFile,
    data: str,
    host: str,
    end: socket.socket,
    stop: threading.Event | None = None,
) -> None:
    """Answer requests.

    Args:
        source: where the gangs come from.
        loras: that clients may ask for.
        end: a socket that is bound to ``host``.
        stop: ends the server; without it signals do.
    """
    log, metrics, webhooks = Log(), Metrics(), Webhooks.of(limits)
    with contextlib.closing(Store(data)) as store:
        dispatcher = Dispatcher(store, source, limits, log, metrics)
        check = RequestCheck(plan, limits, loras)
        server = Server(dispatcher, check, keys, store.secret(), time.time(), webhooks)
        logging.getLogger("uvicorn.error").addHandler(Passed(log))
        config = uvicorn.Config(
            Guard(make_app(server), server, host),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CONNECTIONS_END,
            backlog=BACKLOG,
        )
        with Housekeeping(dispatcher), WebhookSender(store, webhooks, log):
            asyncio.run(Http(config, server).run(end, stop))
        log.write("the server has ended", waiting=store.counts()["queued"])


class Http(uvicorn.Server):
    """The HTTP server: the signals are ours.

    Args:
        config: of uvicorn.
        server: what it serves.
    """

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._served = server

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone; `run` handles them."""
        yield

    async def run(self, end: socket.socket, stop: threading.Event | None = None) -> None:  # type: ignore[override]
        """Serve until a signal has come and the running jobs have ended.

        Args:
            end: a socket that is bound.
            stop: takes the place of the signals.
        """
        ending = asyncio.Event()
        if stop is None:
            self._take_signals(ending)
        self._served.dispatcher.start()
        serving = asyncio.create_task(self.serve(sockets=[end]))
        while not self.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            print_lines([f"listening on http://{address_of(end)}"])
            self._served.dispatcher.log.write("listening", address=address_of(end), model=self._served.model)
        await (ending.wait() if stop is None else asyncio.to_thread(stop.wait))
        dispatcher = self._served.dispatcher
        dispatcher.drain()
        await asyncio.to_thread(dispatcher.wait, dispatcher.limits.grace)
        self.should_exit = True
        await serving

    def _take_signals(self, ending: asyncio.Event) -> None:
        """Let signals end the server, renew its gangs, and read the files of keys and LoRAs again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end(ending))
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR1, self._renew)

    def _on_end(self, ending: asyncio.Event) -> Callable[[], None]:
        """What a signal to end does: the first one drains, another ends at once."""

        def end() -> None:
            if ending.is_set():
                self._served.dispatcher.hurry()
            self._served.dispatcher.log.write("the server ends")
            ending.set()

        return end

    def _renew(self) -> None:
        threading.Thread(target=self._served.dispatcher.renew, name="xdit-renewal", daemon=True).start()

    def _reload(self) -> None:
        threading.Thread(target=self._served.reload, name="xdit-reload", daemon=True).start()


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address, closed after the block.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # with its protocol, since asyncio sends small answers at once only where it knows that this is TCP
        end = socket.socket(found[0][0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(found[0][4])
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--host {host} --port {port} cannot be used ({why}); choose another port.") from error
    with end:
        yield end


def address_of(end: socket.socket) -> str:
    """Host and port of a socket, as in an address."""
    host, port = end.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Passed(logging.Handler):
    """Writes what uvicorn logs as lines of JSON.

    Args:
        log: where to.
    """

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._log.write("uvicorn", record.levelname.lower(), message=record.getMessage())
