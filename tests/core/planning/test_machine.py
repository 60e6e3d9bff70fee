"""How many cores and threads: what the user and the container say counts."""

from __future__ import annotations

import os

import pytest

from xdit_core import machine


def container(root, version, quotas):
    """A file system with control groups: quotas from the outermost group inwards, as (quota, period)."""
    path = "/".join(f"g{i}" for i in range(len(quotas)))
    (root / "proc/self").mkdir(parents=True)
    line = f"0::/{path}" if version == 2 else f"4:cpu,cpuacct:/{path}\n3:memory:/elsewhere"
    (root / "proc/self/cgroup").write_text(line + "\n")
    folder = root / "sys/fs/cgroup" / ("cpu" if version == 1 else "")
    for i, (quota, period) in enumerate(quotas):
        folder = folder / f"g{i}"
        folder.mkdir(parents=True)
        if version == 2:
            (folder / "cpu.max").write_text(f"{'max' if quota is None else quota} {period}\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
            (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ([(200000, 100000)], 2),
        ([(150000, 100000)], 2),
        ([(50000, 100000)], 1),
        ([(None, 100000)], 8),
        ([(300000, 100000), (None, 100000)], 3),
    ],
)
def test_the_limit_of_a_container(tmp_path, monkeypatch, version, quotas, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.cores(container(tmp_path, version, quotas)) == cores


def test_no_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    assert machine.cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "6,2"}, 6),
        ({"OMP_NUM_THREADS": "many"}, 4),
        ({"OMP_NUM_THREADS": "0"}, 4),
        ({}, 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2),
    ],
)
def test_threads_of_each_process(monkeypatch, environment, threads):
    """torchrun sets one thread where the user set none."""
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.threads(2, environment) == threads
