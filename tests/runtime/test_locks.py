import os
import subprocess
import sys
import threading

import pytest

from aigc_tf.runtime.locks import locked


def test_a_folder_is_locked_for_others_and_not_for_its_owner(tmp_path):
    folder = tmp_path / "runs" / "new"
    errors = []

    def try_to_lock():
        try:
            with locked(folder):
                errors.append(None)
        except BlockingIOError as error:
            errors.append(error.strerror)

    def in_another_thread():
        thread = threading.Thread(target=try_to_lock)
        thread.start()
        thread.join()
        return errors.pop()

    with locked(folder):
        try_to_lock()
        assert errors.pop() is None
        assert f"A training is running in this folder (process {os.getpid()} on " in in_another_thread()
    assert not (tmp_path / "runs").exists()  # what was made for the lock alone
    assert in_another_thread() is None
    with locked(folder):
        (folder / "a.txt").write_text("")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


HOLD = """
import sys, time
from aigc_tf.runtime.locks import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_again(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    code = (
        "import os, sys\n"
        "from aigc_tf.runtime.locks import locked\n"
        "with locked(sys.argv[1]):\n"
        "    if os.fork() == 0:\n"
        "        try:\n"
        "            with locked(sys.argv[1]): pass\n"
        "        except BlockingIOError: print('locked')\n"
        "        sys.exit()\n"  # leaves the block of its parent
        "    os.wait()\n"
        "    print(os.path.exists(sys.argv[1] + '/.lock'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["locked", "True"]
