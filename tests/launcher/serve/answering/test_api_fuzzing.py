"""Random requests, right and wrong, made from the document of the API: every answer is one that the document names.

``XDIT_API_REQUESTS=5000`` sends so many.
"""

from __future__ import annotations

import contextlib
import os

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error, status_code_conformance
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from helpers.launcher.answering import answering

REQUESTS = int(os.environ.get("XDIT_API_REQUESTS", "150"))
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


def test_no_request_finds_a_mistake_of_the_server(tmp_path, capsys):
    with answering(tmp_path, serve_queue=10_000) as (url, _):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=10)
        ids = [httpx.post(f"{url}/v1/jobs", json={"prompt": "x"}).json()["id"] for _ in range(3)]
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation in operations:
            for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
                send(operation, mode, url, ids, max(1, REQUESTS // (2 * len(operations))))
    log = capsys.readouterr().err
    assert "Traceback" not in log and '"level": "error"' not in log, log[-5000:]


def send(operation, mode, url, ids, count):
    """Send random requests of an operation, half of them about jobs that exist."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), id=st.sampled_from(ids) | st.none())
    def sent(case, id):
        if id is not None and "id" in case.path_parameters:
            case.path_parameters["id"] = id
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)

    with contextlib.suppress(Unsatisfiable):  # nothing of it can be wrong
        sent()
