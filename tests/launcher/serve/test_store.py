"""The store, the keys and the limits, without a server."""

from __future__ import annotations

import io
import sqlite3

import pytest

pytest.importorskip("fastapi")

from click.testing import CliRunner

from xdit_core.errors import UsageError
from xdit_launcher.cli import cli
from xdit_launcher.serve.auth import Keys, check_host
from xdit_launcher.serve.limits import ApiError, take_settings
from xdit_launcher.serve.operations import Log, Metrics
from xdit_launcher.serve.records import NewFile, NewJob, Outcome
from xdit_launcher.serve.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "data"))
    yield store
    store.close()


def job(**more):
    return NewJob(more.pop("key", "k"), "job", {"prompt": "x"}, **more)


def result(data: bytes, number: int = 0) -> NewFile:
    return NewFile("result", number, ".png", "image/png", data, seed=9)


def test_what_was_accepted_is_there_after_any_end(tmp_path):
    """The second connection sees what is on the disk; the first never says goodbye."""
    store = Store(str(tmp_path / "data"))
    mask = NewFile("input", 0, ".png", "image/png", b"mask")
    ids = [store.accept(job(attached=attached), (mask,))[0].id for attached in (False, False, False, True)]
    store.start(ids[0])
    store.start(ids[1])
    store.finish(ids[1], Outcome("done", files=(result(b"picture"),)))
    with pytest.raises(UsageError, match="in use by another server"):
        Store(str(tmp_path / "data"))
    store._mark.close()  # as when the process is killed
    (tmp_path / "data" / "results" / "stray").mkdir()

    after = Store(str(tmp_path / "data"))
    assert after.recover() == 2
    assert [after.find(id).status for id in ids] == ["queued", "done", "queued", "cancelled"]
    assert after.find(ids[1]).results[0].path.read_bytes() == b"picture" and after.find(ids[1]).results[0].seed == 9
    assert after.find(ids[2]).file("input").path.read_bytes() == b"mask"
    assert not (tmp_path / "data" / "results" / "stray").exists()
    assert after.secret() == store.secret()
    after.close()


def test_accepting_waits_for_the_disk(store):
    id = store.accept(job())[0].id
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    store.start(id)
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 1  # NORMAL


def test_a_name_belongs_to_one_job_of_a_key(store):
    first, new = store.accept(job(idempotency="a"))
    again, newer = store.accept(job(idempotency="a"))
    other, other_new = store.accept(job(idempotency="a", key="another"))
    assert (first.id, new, newer, other_new) == (again.id, True, False, True) and other.id != first.id
    store.hide(first.id)
    assert store.accept(job(idempotency="a"))[1] and store.find(first.id) is None and store.hidden(first.id)


def test_old_and_large_results_go(store):
    ids = [store.accept(job())[0].id for _ in range(4)]
    for id in ids[:3]:
        store.finish(id, Outcome("done", files=(result(b"x" * 100),)))
    assert store.prune(1000, 1000) == []
    assert store.prune(250, 1000) == ids[:1] and store.find(ids[0]) is None
    assert not (store.folder / "results" / ids[0]).exists()
    assert store.prune(1, -1) == ids[1:2]  # the last one stays, and so does what has not ended
    assert store.find(ids[3]).status == "queued" and store.counts()["done"] == 1


def test_pages(store):
    ids = [store.accept(job(key=key))[0].id for key in "kkok"]
    mine = [ids[0], ids[1], ids[3]]
    assert [item.id for item in store.page("k", ("job",), limit=2)] == mine[:0:-1]
    assert [item.id for item in store.page("k", ("job",), after=mine[1])] == mine[:1]
    assert [item.id for item in store.page("k", ("job",), after=mine[0], oldest_first=True)] == mine[1:]
    assert store.page("k", ("video",)) == [] == store.page("k", ("job",), status="done")


def test_half_a_transaction_is_none(store):
    with pytest.raises(sqlite3.IntegrityError), store._transaction() as db:
        db.execute("UPDATE jobs SET status='done'")
        db.execute("INSERT INTO files(job) VALUES('x')")
    assert store.accept(job())[0].status == "queued"


KEY = "a key of twenty chars"


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# one\n\n  {KEY}  \n")
    environment = {"XDIT_API_KEYS": "another-key-of-the-tests, third-key-of-the-tests"}
    keys = Keys(str(file), environment)
    assert environment == {} and keys.needed and KEY not in str(vars(keys))
    names = {keys.name_of(f"Bearer {key}") for key in (KEY, "another-key-of-the-tests", "third-key-of-the-tests")}
    assert len(names) == 3 and keys.name_of(f"bearer {KEY}") in names
    for header in (None, "", KEY, "Basic x", "Bearer ", "Bearer wrong", "Bearer \udcff"):
        with pytest.raises(ApiError) as caught:
            keys.name_of(header)
        assert caught.value.status == 401
    file.write_text("short\n")
    with pytest.raises(UsageError, match="at least 16"):
        keys.reload()
    assert keys.name_of(f"Bearer {KEY}") in names
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="holds no key"):
        Keys(str(file), {})
    assert Keys(None, {}).name_of(None) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_other_machines_need_a_key(host):
    with pytest.raises(UsageError, match="there is no key"):
        check_host(host, Keys(None, {}))
    check_host(host, Keys(None, {"XDIT_API_KEYS": KEY}))
    for inner in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_host(inner, Keys(None, {}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0", "model=emoji"], "there is no key"),
        (["model=emoji", "serve.quue=3"], "did you mean serve.queue?"),
        (["model=emoji", "serve.queue=0"], "too small"),
        (["model=emoji", "serve.steps=many"], "not a whole number"),
        (["model=emoji", "red heart"], "clients send theirs"),
        (["model=emoji", "--keys", "nothing"], "cannot be read"),
    ],
)
def test_what_the_command_refuses_before_anything_starts(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDIT_API_KEYS", raising=False)
    done = CliRunner().invoke(cli, ["serve", *words])
    assert done.exit_code == 2 and says in done.output and list(tmp_path.iterdir()) == []


def test_settings_of_the_server_are_taken_out():
    limits, rest = take_settings({"serve.queue": "7", "serve.call": "mu, clip_skip", "model": "emoji"})
    assert (limits.queue, limits.call_names, rest) == (7, {"mu", "clip_skip"}, {"model": "emoji"})


def test_metrics_and_logs_are_one_line_each():
    metrics, stream = Metrics(), io.StringIO()
    metrics.counter("a_total", "things")
    metrics.histogram("b_seconds", "times")
    metrics.gauge("c", "level", lambda: 2.5)
    metrics.count("a_total", route='x"\n\\')
    metrics.observe("b_seconds", 0.07)
    lines = metrics.text().splitlines()
    assert 'a_total{route="x\\"\\n\\\\"} 1' in lines and "c 2.5" in lines and "b_seconds_count 1" in lines
    assert 'b_seconds_bucket{le="0.05"} 0' in lines and 'b_seconds_bucket{le="0.1"} 1' in lines
    assert 'b_seconds_bucket{le="+Inf"} 1' in lines
    Log(stream).write("x", prompt="a\n\x1b[2J\u202e", none=None)
    assert stream.getvalue().count("\n") == 1 and "\x1b" not in stream.getvalue() and "none" not in stream.getvalue()
