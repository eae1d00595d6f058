"""Files: what is written is whole or not there at all."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aigc_tf.runtime.files import atomic_write, read_text, shipped_file, write_json
from aigc_tf.runtime.locks import locked

NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")


def test_atomic_write_replaces_on_success(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("旧", "utf-8")
    with atomic_write(target) as temporary:
        temporary.write_text("新", "utf-8")
        assert target.read_text("utf-8") == "旧"
    assert target.read_text("utf-8") == "新"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write_stays_in_the_folder_and_keeps_the_suffix(tmp_path):
    with atomic_write(tmp_path / "model.keras") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".keras"
        temporary.write_text("", "utf-8")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_leaves_nothing_on_failure(tmp_path, error):
    with pytest.raises(error), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half", "utf-8")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_fails_cleanly_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="^too early$"), atomic_write(tmp_path / "a.txt"):
        raise ValueError("too early")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_target_on_failure(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("旧", "utf-8")
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text("half", "utf-8")
        raise error
    assert target.read_text("utf-8") == "旧"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [FileNotFoundError, pytest.param(PermissionError, marks=NOT_ROOT)])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, error):
    target = tmp_path / "folder" / "a.json"
    if error is PermissionError:
        target.parent.mkdir(mode=0o500)
    with pytest.raises(error) as caught:
        write_json(target, {})
    assert caught.value.filename == str(target)


def test_write_json_is_readable_and_read_back_equal(tmp_path):
    content = {"字": ["春", "\n", "\u2028"], "n": 1}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert "春" in text
    assert json.loads(text) == content


def test_write_json_keeps_the_old_file_when_the_content_is_not_json(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"n": 1})
    with pytest.raises(TypeError):
        write_json(target, {"n": {1, 2}})
    assert json.loads(target.read_text("utf-8")) == {"n": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_the_numbers_of_numpy_are_written_as_python_s(tmp_path):
    path = tmp_path / "run.json"
    numbers = {"int64": np.int64(3), "float32": np.float32(0.5), "bool": np.bool_(True), "in a list": [np.uint8(255)]}
    write_json(path, numbers)
    assert json.loads(path.read_text("utf-8")) == {"int64": 3, "float32": 0.5, "bool": True, "in a list": [255]}


def test_read_text_removes_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "春".encode())
    assert read_text(tmp_path / "a.txt") == "春"


def test_shipped_files_are_there():
    assert shipped_file("stopwords_cn.txt").is_file()
    assert shipped_file("tang_quatrains.txt").is_file()


def test_two_threads_that_write_one_file_leave_it_whole(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_write(target) as one, atomic_write(target) as two:
        assert one != two
        one.write_text("一", "utf-8")
        two.write_text("二", "utf-8")
    assert target.read_text("utf-8") == "一"
    assert list(tmp_path.iterdir()) == [target]


WRITE = """
import sys, time
from pathlib import Path
from aigc_tf.runtime.files import temporary_path
with temporary_path(Path(sys.argv[1], "model.keras")) as file, temporary_path(Path(sys.argv[1], ".saving")) as folder:
    file.touch()
    folder.mkdir()
    (folder / "run.json").touch()
    print(file.name, folder.name, flush=True)
    time.sleep(600)
"""


def test_unfinished_files_of_a_process_are_deleted_only_after_it_was_killed(tmp_path):
    (tmp_path / ".my-notes").touch()
    (tmp_path / ".0123456789ab-notes").touch()
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        written = process.stdout.readline().split()
        for _ in range(2):
            with locked(tmp_path):
                write_json(tmp_path / "a.json", {})
        assert (tmp_path / written[1] / "run.json").exists()
        assert set(written) < {path.name for path in tmp_path.iterdir()}
    finally:
        process.kill()
        process.communicate()
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {".my-notes", ".0123456789ab-notes", "a.json"}


def test_unfinished_files_of_another_thread_stay(tmp_path):
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("春", "utf-8")
        with ThreadPoolExecutor(1) as other:
            other.submit(write_json, tmp_path / "b.json", {}).result()
            assert temporary.read_text("utf-8") == "春"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.json"}


def test_writing_works_despite_leftovers_that_cannot_be_deleted(tmp_path, monkeypatch):
    (tmp_path / ".0123456789ab-.lock").touch()
    (tmp_path / ".0123456789ab-.saving").mkdir()

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("aigc_tf.runtime.files.shutil.rmtree", fail)
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / ".0123456789ab-.lock").exists()
    monkeypatch.undo()
    write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="other locks")
@pytest.mark.parametrize("why", ["another host", "no locks"])
def test_leftovers_of_unknown_processes_stay_for_a_day(tmp_path, monkeypatch, why):
    lock, left = tmp_path / ".0123456789ab-.lock", tmp_path / ".0123456789ab-step.npz"
    lock.write_text(f"process 1 on another-{socket.gethostname()}")
    left.touch()

    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if why == "no locks":
        monkeypatch.setattr("aigc_tf.runtime.locks.fcntl.flock", fail)
    write_json(tmp_path / "a.json", {})
    assert lock.exists()
    assert left.exists()
    os.utime(lock, (0, time.time() - 2 * 86400))
    write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_does_not_delete_what_its_parent_writes(tmp_path):
    code = (
        "import os, sys\n"
        "from aigc_tf.runtime.files import atomic_write\n"
        "with atomic_write(sys.argv[1] + '/a.txt') as temporary:\n"
        "    temporary.touch()\n"
        "    if os.fork() == 0: sys.exit()\n"  # leaves the block of its parent
        "    os.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="folders are opened on POSIX only")
def test_the_folder_is_synced_too(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("")
    assert synced == [False, True]
