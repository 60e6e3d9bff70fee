"""Order of the queue and the dispatcher, over a gang that draws nothing."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("fastapi")

from helpers.launcher.fake_gangs import until
from xdit_launcher.gang.job import RequestFailed
from xdit_launcher.serve.fairness import FairQueue, Pace, Waiting
from xdit_launcher.serve.housekeeping import Housekeeping
from xdit_launcher.serve.limits import ApiError
from xdit_launcher.serve.store import Store


def test_priority_then_shares_then_age():
    queue = FairQueue()
    for number, (key, priority) in enumerate([("a", 0), ("a", 0), ("a", 0), ("b", 0), ("b", 0), ("c", 1)]):
        queue.add(Waiting(f"{key}{number}", number, key, priority))
    assert [job.id for job in queue.order()] == ["c5", "a0", "b3", "a1", "b4", "a2"]
    assert queue.take().id == "c5" and queue.take().id == "a0"
    assert queue.remove("b3") and not queue.remove("b3")
    assert [job.id for job in queue.order()] == ["b4", "a1", "a2"]


def test_shares_are_of_work_and_an_idle_key_saves_nothing_up():
    queue = FairQueue()
    queue.add(Waiting("a0", 0, "a", work=10.0))
    queue.add(Waiting("a1", 1, "a", work=10.0))
    queue.add(Waiting("b2", 2, "b", work=1.0))
    queue.add(Waiting("b3", 3, "b", work=1.0))
    assert [queue.take().id for _ in range(4)] == ["a0", "b2", "b3", "a1"]
    queue.add(Waiting("a4", 4, "a"), running=("a",))
    queue.add(Waiting("c5", 5, "c"), running=("a",))  # c begins where a stands, and not with what a had got
    queue.add(Waiting("a6", 6, "a"), running=("a",))
    queue.add(Waiting("c7", 7, "c"), running=("a",))
    assert [job.id for job in queue.order()] == ["a4", "c5", "a6", "c7"]


def test_estimates_follow_what_was_measured():
    pace = Pace()
    assert pace.seconds(5.0) is None
    pace.measured(10.0, 20.0)
    assert pace.seconds(5.0) == 10.0
    pace.measured(10.0, 40.0)
    assert 10.0 < pace.seconds(5.0) < 20.0


def test_a_gang_that_ends_is_replaced_and_its_job_tried_once_more(setting):
    all = setting()
    id, other = all.accept(), all.accept()
    all.gang(0, 1).die()
    all.gang(1, 1).done(0)
    assert all.ended(id).status == "done" and all.store.find(id).tries == 1
    all.gang(1, 2).done(1)
    assert all.ended(other).status == "done" and all.store.find(other).tries == 0


def test_a_gang_has_a_batch_and_the_next_one_at_the_same_time(setting):
    all = setting(batch=2)
    ids = [all.accept() for _ in range(6)]
    gang = all.gang(0, 4)
    assert [all.store.find(id).status for id in ids[4:]] == ["queued", "queued"]
    gang.done(2)
    assert all.ended(ids[2]).status == "done" and all.gang(0, 5) is gang
    all.dispatcher.cancel(ids[1])
    assert all.ended(ids[1]).status == "cancelled" and all.gang(0, 6) is gang
    assert [all.store.find(ids[i]).status for i in (0, 3, 4, 5)] == ["running"] * 4
    gang.die()
    second = all.gang(1, 4)  # all that it had is tried once more
    for number in range(4):
        second.done(number)
    assert {all.ended(ids[i]).status for i in (0, 3, 4, 5)} == {"done"}


def test_a_job_that_ends_two_gangs_fails_with_the_reason_and_the_others_go_on(setting):
    all = setting()
    id, other = all.accept(), all.accept()
    all.gang(0, 1).die()
    all.gang(1, 1).die()
    all.gang(2, 1).done(0)
    failed = all.ended(id)
    assert failed.status == "failed" and failed.error.endswith("2 times while they drew this job: rank 1 was killed")
    assert all.ended(other).status == "done"


def test_jobs_wait_while_no_gang_can_be_started(setting):
    all = setting()
    all.accept()
    all.gang(0, 1)
    id = all.accept()
    all.refusals = 2
    all.gang(0).die()
    gang = all.gang(1, 1)
    assert all.log.getvalue().count("could not be started") == 2
    gang.done(0)
    all.gang(1, 2).done(1)
    assert all.ended(id).status == "done"


def test_deadlines_end_what_waits_and_what_runs(setting):
    all = setting()
    now = time.time()
    runs, waits, patient = (all.accept(deadline=deadline) for deadline in (now + 0.3, now + 0.3, now + 1000))
    all.gang(0, 1)
    with Housekeeping(all.dispatcher, 0.02):
        assert all.ended(waits).error == "the deadline passed while the job waited."
        assert all.ended(runs).error == "the deadline passed while the job was drawn."
        assert all.store.find(runs).status == "failed"
    all.gang(0, 2).done(1)
    assert all.ended(patient).status == "done"


def test_who_begins_to_watch_just_as_a_job_ends_is_told_the_end(setting, monkeypatch):
    all = setting()
    monkeypatch.setattr(all.dispatcher, "release", lambda current: None)  # which comes a moment later
    id = all.accept()
    all.gang(0, 1).done(0)
    assert all.ended(id).status == "done"
    until(lambda: all.dispatcher._snapshot(id)[-1].last)


def test_what_the_ranks_refuse_is_told(setting):
    all = setting()
    id = all.accept()
    all.gang(0, 1).jobs[0].add("failed", error=RequestFailed("no such class; choose another.", refused=True))
    assert (all.ended(id).error, all.store.find(id).refused) == ("no such class; choose another.", True)
    wrong = all.accept(settings={"wrong": 1})
    ended = all.ended(wrong)
    assert ended.refused and "leave it out" in all.store.find(wrong).error


def test_the_queue_is_bounded_and_a_repetition_is_no_new_job(setting):
    all = setting(queue=2)
    all.accept()
    all.gang(0, 1)
    names = [all.accept(idempotency=str(i)) for i in range(2)]
    with pytest.raises(ApiError) as caught:
        all.accept()
    assert caught.value.status == 429 and int(caught.value.headers()["Retry-After"]) >= 1
    assert all.accept(idempotency="1") == names[1]
    with pytest.raises(ApiError, match="another request"):
        all.accept(idempotency="1", digest="another")


def test_a_full_disk_fails_the_job_and_nothing_else(setting, monkeypatch):
    all = setting()
    id = all.accept()
    gang = all.gang(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            Store, "_write", lambda self, id, kind, files: (_ for _ in ()).throw(OSError(28, "full")) if files else []
        )
        gang.done(0)
        assert "could not be stored" in all.ended(id).error
    after = all.accept()
    all.gang(0, 2).done(1)
    assert all.ended(after).status == "done"


def test_what_waits_is_there_for_the_next_server(setting):
    first = setting()
    first.accept()
    first.gang(0, 1)
    attached, waits = first.accept(attached=True), first.accept()
    threading.Thread(target=first.dispatcher.drain).start()
    until(lambda: first.store.find(attached).status == "cancelled")
    assert "the server is ending" in first.store.find(attached).error
    assert first.store.find(waits).status == "queued"
