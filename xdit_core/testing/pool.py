"""A pool of processes that stay. The libraries are imported once, by a server of which the workers are forks: a worker
starts in some milliseconds, where an interpreter of its own would take ten seconds."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from xdit_core.testing import nccl_rules
from xdit_core.testing.loaded import keep_loaded_models

PRELOADED = (
    "xdit_core.testing.runs",
    "xdit_core.testing.models",
    "torch._dynamo",
    "torch.distributed.tensor.parallel",
    "xdit_core.testing.nccl_rules",
)


class PoolError(RuntimeError):
    """A task failed on a worker; carries the worker's traceback."""


def serve(link: Connection) -> None:
    """Loop of one worker: join a gloo group, run a function, leave, answer."""
    torch.set_num_threads(1)
    keep_loaded_models()
    gc.freeze()  # the libraries: to look through them again and again would take a quarter of the time
    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", "lo"
    )  # here and not in the parent, whose other children may talk to other machines
    store: Any = (
        None  # one connection for all tasks: torch looks up the name of the peer of each, which may take seconds
    )
    while True:
        try:
            function, arguments, rank, world, port, name, seconds, rules = pickle.loads(link.recv_bytes())
        except EOFError:
            return
        try:
            if store is None:
                store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=seconds))  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=seconds))
            if rules:
                nccl_rules.register()
            dist.init_process_group(
                nccl_rules.NAME if rules else "gloo",
                store=dist.PrefixStore(name, store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=seconds),
            )
            own = dist.PrefixStore(f"{name}/rules", store)  # type: ignore[attr-defined]
            with nccl_rules.checked(own, rank, world) if rules else nullcontext():
                answer: tuple[bool, Any] = (True, function(*arguments))
                dist.barrier()
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            link.send_bytes(pickle.dumps(answer))
        except Exception:  # the result cannot be pickled
            link.send_bytes(pickle.dumps((False, traceback.format_exc())))
        if dist.is_initialized():
            dist.destroy_process_group()


def workers_context() -> Any:
    """How workers start: as forks of a process that has imported the libraries and done nothing else, or, where a
    fork is not safe (a GPU, another system than Linux), each as an interpreter of its own."""
    if sys.platform != "linux" or torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Pool:
    """Workers on this machine that run a function as the ranks of a gloo process group.

    Example::

        def task(x):
            t = torch.tensor([x + dist.get_rank()])
            dist.all_reduce(t)
            return t.item()

        assert pool.run(task, 1, world=2) == [3, 3]
    """

    def __init__(self) -> None:
        self._context = workers_context()
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None
        self._tasks = 0

    def _grow(self, world: int) -> None:
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        world: int,
        timeout: float = 120,
        nccl_rules: bool = False,
    ) -> list[Any]:
        """Run ``function(*arguments)`` on ``world`` ranks.

        Args:
            function: importable by name in a fresh process.
            timeout: seconds, for the task and for each of its collectives.
            nccl_rules: fail where NCCL would, see ``xdit_core.testing.nccl_rules``.

        Returns:
            The results by rank.

        Raises:
            PoolError: a rank raised, died or took too long; the workers are then replaced.
        """
        self._grow(world)
        self._tasks += 1
        port = self._store.port if self._store else 0
        chosen = self._workers[:world]
        for rank, (_, link) in enumerate(chosen):
            task = (function, arguments, rank, world, port, f"task{self._tasks}", timeout, nccl_rules)
            link.send_bytes(pickle.dumps(task))
        results: dict[int, Any] = {}
        patience = 10 if nccl_rules else 0  # to say why ranks did not finish
        ranks: dict[Any, int] = {link: rank for rank, (_, link) in enumerate(chosen)}
        while len(results) < world:
            ready = wait([link for link, rank in ranks.items() if rank not in results], timeout + patience)
            if not ready:
                waiting = sorted(set(ranks.values()) - set(results))
                self.close()
                raise PoolError(f"ranks {waiting} did not finish within {timeout} s")
            for found in ready:
                rank = ranks[found]
                try:
                    good, value = pickle.loads(chosen[rank][1].recv_bytes())
                except (EOFError, ConnectionError):
                    self.close()
                    raise PoolError(f"rank {rank} died") from None
                if not good:
                    self.close()
                    raise PoolError(f"rank {rank} of {world}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End the workers."""
        for process, link in self._workers:
            link.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()
