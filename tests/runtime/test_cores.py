"""Cores: of the machine, of this process and of its container."""

import math
import os

import pytest

from aigc_tf.runtime import cores
from aigc_tf.runtime.cores import usable_cores


def test_cores_are_counted_by_what_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cores, "_container_cores", lambda: math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.setattr(cores, "_container_cores", lambda: 1.5)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files of a system's /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(cores, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "cgroup")

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    return write


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
def test_a_container_s_limit_is_read(system, files, allowed):
    system({f"cgroup/{name}": content for name, content in files.items()})
    assert cores._container_cores() == allowed


def test_limits_of_the_groups_around_it_count_too(system):
    system({"proc/self/cgroup": "0::/pod/a:b\n", "cgroup/pod/cpu.max": "150000 100000\n"})
    assert cores._container_cores() == 1.5
    system({"cgroup/pod/a:b/cpu.max": "50000 100000\n"})
    assert cores._container_cores() == 0.5


def test_in_version_1_groups_are_those_of_the_controller(system):
    system({"proc/self/cgroup": "4:memory:/other\n3:cpu,cpuacct:/pod/a\n"})
    for group, quota in (("other", 50_000), ("pod", 150_000)):
        system({f"cgroup/cpu/{group}/cpu.cfs_{n}_us": str(us) for n, us in (("quota", quota), ("period", 100_000))})
    assert cores._container_cores() == 1.5
