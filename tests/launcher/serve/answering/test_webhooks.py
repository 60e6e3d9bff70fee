"""Messages to clients whose jobs have ended, against a receiver of the test."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import io
import json
import threading

import pytest

pytest.importorskip("fastapi")

from helpers.launcher.fake_gangs import until
from xdit_core.errors import UsageError
from xdit_launcher.serve.limits import ApiError, ServeSettings
from xdit_launcher.serve.operations import Log
from xdit_launcher.serve.records import NewJob, Outcome
from xdit_launcher.serve.store import Store
from xdit_launcher.serve.webhooks.addresses import SECRET, Webhooks
from xdit_launcher.serve.webhooks.sender import WebhookSender

KEY = b"0123456789abcdef0123"
WORD = "whsec_" + base64.b64encode(KEY).decode()


class Receiver(http.server.ThreadingHTTPServer):
    """Answers with the next of some statuses, and keeps what came."""

    daemon_threads = True

    def __init__(self, *statuses):
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.got = list(statuses), []
        self.url = f"http://127.0.0.1:{self.server_port}/hooks/"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("Location", f"{self.server.url}elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *details):
        pass


@pytest.fixture
def receive():
    made = []

    def make(*statuses):
        made.append(Receiver(*statuses))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()
        each.server_close()


@pytest.fixture
def store(tmp_path):
    made = Store(str(tmp_path / "data"))
    yield made
    made.close()


def ended(store, url, status="done"):
    job, _ = store.accept(NewJob("", "job", {"prompt": "x"}, webhook=url))
    store.finish(job.id, Outcome(status, None if status == "done" else "no room."))
    return job.id


def sender(store, receiver, pauses=(0.0, 0.0)):
    log = io.StringIO()
    return WebhookSender(store, Webhooks((receiver.url,), KEY), Log(log), pauses), log


def test_the_end_of_a_job_is_sent_once_and_signed(store, receive):
    receiver = receive()
    waiting, _ = store.accept(NewJob("", "job", {"prompt": "x"}, webhook=receiver.url))
    id = ended(store, f"{receiver.url}fox?a=1", "failed")
    with sender(store, receiver)[0]:
        until(lambda: receiver.got and not store.due_webhooks(2e9, 9))
    ((path, headers, body),) = receiver.got
    assert path == "/hooks/fox?a=1" and headers["webhook-id"] == f"job_{id}"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{digest}"
    said = json.loads(body)
    assert said["type"] == "job.failed" and said["data"] == {"id": id, "status": "failed", "error": "no room."}
    assert store.find(waiting.id).status == "queued"


def test_what_fails_is_tried_again_by_the_next_server_too(tmp_path, receive):
    receiver = receive(500, 302)
    first = Store(str(tmp_path / "data"))
    id = ended(first, receiver.url)
    with sender(first, receiver, (1.0, 0.0))[0]:
        until(lambda: first.due_webhooks(2e9, 9)[0].tries == 1)
    first.close()
    second = Store(str(tmp_path / "data"))
    second.recover()
    with sender(second, receiver, (1.0, 0.0))[0]:
        until(lambda: not second.due_webhooks(2e9, 9))
    second.close()
    assert [path for path, _, _ in receiver.got] == ["/hooks/"] * 3  # the redirect was not followed
    assert {headers["webhook-id"] for _, headers, _ in receiver.got} == {f"job_{id}"}


def test_some_are_given_up(store, receive):
    receiver = receive(500, 500, 500, 410)
    ended(store, receiver.url)
    made, log = sender(store, receiver)
    with made:
        until(lambda: not store.due_webhooks(2e9, 9))
        ended(store, receiver.url)
        until(lambda: not store.due_webhooks(2e9, 9))
    assert len(receiver.got) == 4 and log.getvalue().count("webhook given up") == 2


def test_a_job_that_is_removed_is_not_told_of(store, receive):
    receiver = receive()
    store.remove(ended(store, receiver.url))
    assert not store.due_webhooks(2e9, 9)


def test_only_what_the_operator_names_is_called(monkeypatch):
    monkeypatch.setenv(SECRET, WORD)
    allowed = Webhooks.of(ServeSettings(webhooks="https://a.example/hooks/, https://b.example/one"))
    for url in ("https://a.example/hooks/x?y=1", "https://b.example/one"):
        allowed.check(url)
    for url in (
        *("https://a.example/other", "http://a.example/hooks/x", "https://b.example/one/two", "https://evil.example/"),
        *("https://a.example/hooks/../x", "https://a.example/hooks/\n", "https://a.example/hooks/\\x", "file:///etc"),
        *("https://a.example@evil.example/hooks/", "https://a.example/hooks/#x", "http://169.254.169.254/", ""),
        *("https://a.example/hooks/" + "x" * 3000, "https://a.example/hooks/ä"),
    ):
        with pytest.raises(ApiError, match="none of the addresses"):
            allowed.check(url)
    with pytest.raises(ApiError, match="calls no address"):
        Webhooks.of(ServeSettings()).check("https://a.example/hooks/x")


@pytest.mark.parametrize(
    ("urls", "secret", "sentence"),
    [
        ("https://a.example/", "", "openssl rand"),
        ("https://a.example/", "whsec_c2hvcnQ=", "openssl rand"),
        ("a.example/hooks", WORD, "no address"),
        ("https://a.example", WORD, "no address"),
        ("ftp://a.example/", WORD, "no address"),
    ],
)
def test_a_wrong_setting_is_refused(monkeypatch, urls, secret, sentence):
    monkeypatch.setenv(SECRET, secret)
    with pytest.raises(UsageError, match=sentence):
        Webhooks.of(ServeSettings(webhooks=urls))


def test_a_client_asks_for_it_over_http(tmp_path, monkeypatch, receive):
    httpx = pytest.importorskip("httpx")
    from helpers.launcher.answering import answering

    receiver = receive()
    monkeypatch.setenv(SECRET, WORD)
    with answering(tmp_path, serve_webhooks=receiver.url) as (url, _):
        body = {"prompt": "x", "webhook": f"{receiver.url}fox"}
        id = httpx.post(f"{url}/v1/jobs", json=body).json()["id"]
        until(lambda: receiver.got)
        refused = httpx.post(f"{url}/v1/jobs", json={"prompt": "x", "webhook": f"{url}/v1/jobs"})
    assert receiver.got[0][0] == "/hooks/fox" and json.loads(receiver.got[0][2])["data"]["id"] == id
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "webhook"
