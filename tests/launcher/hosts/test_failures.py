"""Two hosts over ssh, and everything that breaks there: the right rank and host, in a few lines, soon, and nothing is
left running."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.launcher import FAULTY
from helpers.launcher.cluster import Cluster, cluster, missing
from helpers.launcher.failures import BEGIN, CASES, DOC, END, Case, attempt

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("hosts"), [FAULTY]) as made:
        yield made


# without the one in which nothing breaks: `test_backends.py` runs two jobs at once on the same hosts, and compares them
@pytest.mark.parametrize("case", [case for case in CASES if case.code], ids=lambda case: case.name)
def test_a_failure(hosts: Cluster, tmp_path: Path, case: Case) -> None:
    found = attempt(hosts, case, tmp_path)
    assert found.code == case.code, found.text
    assert "Traceback" not in found.text
    assert len(found.lines) <= 5
    if case.who:
        assert found.lines and found.lines[0].startswith(case.who), found.text
    for part in case.parts:
        assert any(part in line for line in found.lines), found.text
    assert not found.left


def test_the_table_is_of_these_cases() -> None:
    table = DOC.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    ][1:]
    assert [(row[0], row[2]) for row in rows] == [(case.name, str(case.code)) for case in CASES]
    for row, case in zip(rows, CASES, strict=True):
        assert case.who.strip() in row[3] and all(part[:60] in row[3] for part in case.parts[:1] if case.who)
