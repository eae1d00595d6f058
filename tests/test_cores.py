"""Cores: of the machine, of this process and of its container."""

import math
import os

import pytest

from aigc_tf import cores
from aigc_tf.cores import usable_cores


def test_cores_are_counted_by_what_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cores, "_container_cores", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.setattr(cores, "_container_cores", lambda: 1.5)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "allowed"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_a_container_s_limit_is_read(tmp_path, files, allowed):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores._container_cores(tmp_path) == allowed
