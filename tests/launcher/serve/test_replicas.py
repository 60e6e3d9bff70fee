"""Several gangs behind one queue."""

from __future__ import annotations

import importlib.util
import random
import re
import signal
import statistics
import sys
import threading
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi")

from helpers.launcher.fake_gangs import until
from helpers.launcher.served import Served, ended, wait_for
from xdit_core.errors import UsageError
from xdit_launcher.serve.gangs.replicas import Replicas


def gangs(all, state):
    """How many gangs are in a state, from the metrics."""
    return int(re.search(rf'xdit_gangs{{state="{state}"}} (\d+)', all.dispatcher.metrics.text())[1])


def test_numbers_of_gangs():
    assert Replicas.parse("3") == Replicas(3, 3) and Replicas.parse("1..4") == Replicas(1, 4)
    for text in ("0", "4..1", "0..2", "a", "1...3", "", "-1", "1..", "99999999"):
        with pytest.raises(UsageError, match="is not a number of gangs"):
            Replicas.parse(text)


def test_two_gangs_draw_at_once_and_positions_count_what_waits(setting):
    all = setting("2")
    until(lambda: gangs(all, "idle") == 2)
    ids = [all.accept("a") for _ in range(2)]
    until(lambda: gangs(all, "busy") == 2)
    ids += [all.accept(key) for key in "aabb"]

    def standings():
        return [all.dispatcher.standing(all.store.find(id))["position"] for id in ids]

    assert standings() == [0, 0, 1, 3, 2, 4]
    all.dispatcher.cancel(ids[0])
    assert all.ended(ids[0]).status == "cancelled"
    until(lambda: standings() == [None, 0, 0, 2, 1, 3])
    while (position := standings()) != [None] * 6:
        for gang in all.gangs:
            if gang.jobs and not gang.jobs[-1].ended:
                gang.done(-1)
        until(lambda position=position: standings() != position)
    assert [all.ended(id).status for id in ids] == ["cancelled", *["done"] * 5]


def test_the_job_of_a_dead_gang_goes_to_one_that_lives(setting):
    all = setting("2")
    until(lambda: gangs(all, "idle") == 2)
    id = all.accept()
    until(lambda: gangs(all, "busy") == 1)
    all.refusals = 1000  # no other gang can be started
    first = next(gang for gang in all.gangs if gang.jobs)
    other = next(gang for gang in all.gangs if gang is not first)
    first.die()
    until(lambda: other.jobs)
    assert all.dispatcher.ready
    other.done(0)
    assert all.ended(id).status == "done" and all.store.find(id).tries == 1


def test_spare_gangs_start_when_jobs_wait_and_end_when_none_come(setting):
    all = setting("1..3", idle=0.05)
    until(lambda: gangs(all, "idle") == 1)
    ids = [all.accept() for _ in range(2)]
    until(lambda: gangs(all, "busy") == 2)
    assert len(all.gangs) == 2 and gangs(all, "resting") == 1
    for gang in list(all.gangs):
        gang.done(0)
    assert [all.ended(id).status for id in ids] == ["done"] * 2
    until(lambda: (gangs(all, "idle"), gangs(all, "resting")) == (1, 2))
    assert '"the ranks were not needed any more"' in all.log.getvalue() and all.gangs[0].alive
    assert not all.gangs[1].alive and "\nxdit_gang_ends_total " not in all.dispatcher.metrics.text()


def test_gangs_are_renewed_one_after_the_other_and_finish_their_jobs(setting):
    all = setting("2")
    until(lambda: gangs(all, "idle") == 2)
    id = all.accept()
    until(lambda: gangs(all, "busy") == 1)
    first, second = list(all.gangs)
    renewal = threading.Thread(target=all.dispatcher.renew)
    renewal.start()
    drawing, other = (first, second) if first.jobs else (second, first)
    until(lambda: not other.alive or not drawing.jobs[0].ended)
    drawing.done(0)
    renewal.join(30)
    until(lambda: gangs(all, "idle") == 2)
    assert all.ended(id).status == "done" and all.store.find(id).tries == 0
    assert len(all.gangs) == 4 and not first.alive and not second.alive
    assert "\nxdit_gang_ends_total " not in all.dispatcher.metrics.text()


def test_a_server_with_two_gangs_of_which_one_is_killed(tmp_path, words):
    served = Served(tmp_path / "work", *words, "--replicas", "2", "serve.steps=2000")
    try:
        wait_for(lambda: len(served.events("the ranks are ready")) == 2, served.log)
        with served.http() as client:
            body = {"prompt": "a red fox", "steps": 150, "seed": 5}
            ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(4)]
            wait_for(lambda: "xdit_running_jobs 2" in client.get("/metrics").text, served.log)
            below = psutil.Process(served.process.pid).children(recursive=True)
            next(process for process in below if "xdit_core.worker" in process.cmdline()).send_signal(signal.SIGKILL)
            jobs = [ended(client, id) for id in ids]
            assert [job["status"] for job in jobs] == ["done"] * 4, served.log()
            assert len({client.get(job["results"][0]["url"]).content for job in jobs}) == 1
        assert served.end() == 0
    finally:
        served.close()


def test_a_backend_with_one_gang_says_so(say):
    done = say("serve", "--replicas", "2", "--on", "ssh", "--hosts", "a", "model=emoji")
    assert done.exit_code == 2 and "the backend ssh starts one gang; leave out --replicas" in done.stderr


def test_the_simulation_waits_as_theory_says():
    path = Path(__file__).parents[3] / "benchmarks" / "serving" / "simulation.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    simulation = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = simulation
    spec.loader.exec_module(simulation)
    measured, draw = simulation.Measured((1.0,), 0.0, 0.0), random.Random(1)

    def mean(way, gangs):
        jobs = simulation.through_front(simulation.arrivals(0.8 * gangs, 50_000, draw), 0.0)
        return statistics.mean(way(jobs, gangs, measured, draw))

    one, shorter, chance = (mean(way, 1) for _, way in simulation.WAYS)
    theory = 0.8 / (2 * (1 - 0.8))  # Pollaczek and Khinchine, for jobs of one second
    assert max(abs(value - theory) for value in (one, shorter, chance)) < 0.15 * theory
    one, shorter, chance = (mean(way, 50) for _, way in simulation.WAYS)
    assert one < 0.1 * shorter < 0.1 * chance and abs(chance - theory) < 0.15 * theory
