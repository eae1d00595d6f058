import os

import pytest

from aigc_tf.runtime import backend, cores, hardware
from aigc_tf.runtime.hardware import _container_bytes, available_bytes, gpu_watts, process_bytes, processor_joules


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """A /proc to write, with no control groups."""
    for module in (hardware, cores):
        monkeypatch.setattr(module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path / "proc"


def test_free_memory_is_read(proc):
    (proc / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:    4000 kB\n")
    (proc / "self" / "status").write_text("VmPeak:  90 kB\nVmRSS:\t  25 kB\n")
    assert available_bytes() == 4000 * 1024
    assert process_bytes() == 25 * 1024


def test_memory_that_is_not_reported_is_none(proc):
    assert available_bytes() is None
    assert process_bytes() is None


def test_power_is_read_where_the_system_tells(tmp_path, monkeypatch):
    for name, microjoules in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 9_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
    assert processor_joules(tmp_path) == 3.5
    assert processor_joules(tmp_path / "none") is None


def test_the_gpu_is_asked_through_its_driver(tmp_path, proc, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in --query-gpu=power.draw) echo 61.5; echo 60;; *memory.total) echo 80; echo 40;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_watts() is None  # none is in use
    monkeypatch.setattr(backend, "uses_gpu", lambda: True)
    monkeypatch.setattr(backend, "gpu_bytes_in_use", lambda: 2**20)
    assert gpu_watts() == 121.5
    assert available_bytes() == 39 * 2**20
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert gpu_watts() is None
    (proc / "meminfo").write_text("MemAvailable: 7 kB\n")
    assert available_bytes() == 7 * 1024  # of the machine then


@pytest.mark.parametrize(
    "names", [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")]
)
def test_a_container_s_limit_is_known(tmp_path, proc, names):
    folder = tmp_path / "cgroup" if names[0] == "memory.max" else tmp_path / "cgroup/memory"
    folder.mkdir(parents=True)
    for name, text in zip((*names, "memory.stat"), ("1000", "300", "anon 200\ninactive_file 100\n"), strict=True):
        (folder / name).write_text(text)
    assert _container_bytes() == 800
    (proc / "self" / "cgroup").write_text("4:memory:/pod\n0::/pod\n")
    assert _container_bytes() == 800
    (folder / names[0]).write_text("max")
    assert _container_bytes() == float("inf")
