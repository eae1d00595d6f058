"""Chunks: the same in one process and in several, nothing read too early, and no worker that is missed."""

import os
import pickle
import subprocess
import sys
import warnings

import pytest

from aigc_tf import Tokenizer
from aigc_tf.corpus import parallel, segmentation
from aigc_tf.corpus.parallel import map_chunks
from aigc_tf.runs import encoded_text
from aigc_tf.runs.pipeline import run_pipeline

DOCUMENTS = ["春眠不觉晓，", "处处闻啼鸟。", "夜来风雨声，", "花落知多少。"] * 5


@pytest.fixture(autouse=True)
def _one_document_a_chunk(monkeypatch):
    monkeypatch.setattr(parallel, "_CHUNK_CHARS", 1)


def test_several_processes_give_what_one_gives_in_order():
    expected = [[document] for document in DOCUMENTS]
    assert list(map_chunks(list, DOCUMENTS, 1)) == list(map_chunks(list, DOCUMENTS, 3)) == expected
    assert list(map_chunks(list, [], 2)) == []


@pytest.mark.parametrize(("processes", "most"), [(1, 1), (2, 4)])
def test_documents_are_read_as_they_are_needed(processes, most):
    read = []
    results = map_chunks(list, (read.append(d) or d for d in DOCUMENTS), processes)
    next(results)
    assert len(read) <= most
    next(results)
    assert len(read) <= most + 1
    results.close()


def test_an_error_in_a_worker_is_raised_here():
    with pytest.raises(TypeError, match="unsupported operand"):
        list(map_chunks(sum, DOCUMENTS, 2))


def test_an_error_of_the_documents_is_raised_here():
    def broken():
        yield "春"
        raise RuntimeError("the disk of the source")

    with pytest.raises(RuntimeError, match="the disk of the source"):
        list(map_chunks(list, broken(), 2))


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false"])
def test_without_a_worker_the_work_is_done_here(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.warns(UserWarning, match="A worker process failed .* this process does its work"):
        results = list(map_chunks(list, DOCUMENTS, 2))
    assert results == [[document] for document in DOCUMENTS]


def test_a_worker_that_dies_is_replaced_by_this_process():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = list(map_chunks(DiesElsewhere(os.getpid()), DOCUMENTS, 2))
    assert results == [[document] for document in DOCUMENTS]
    assert len(caught) == 2  # one for each worker


class DiesElsewhere:
    """What gives its chunk back in the process it was made in, and kills any other."""

    def __init__(self, process):
        self.process = process

    def __call__(self, chunk):
        return chunk if os.getpid() == self.process else os._exit(1)


def test_no_worker_outlives_its_work(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    results = map_chunks(list, DOCUMENTS, 2)
    next(results)
    results.close()
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_plain_script_may_use_several_processes(tmp_path):
    # Without `if __name__ == "__main__":`, as people write scripts; it runs once, from top to bottom.
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun')\n"
        "from aigc_tf import Tokenizer\n"
        f"print(len(Tokenizer.train({DOCUMENTS!r}, 'word', processes=2).pieces))\n",
        "utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["begun", str(len(Tokenizer.train(DOCUMENTS, "word").pieces))]
    assert done.stderr == ""


def test_a_tokenizer_is_pickled_without_its_cached_tables():
    trained = Tokenizer.train(DOCUMENTS)
    size = len(pickle.dumps(trained))
    trained.encode("春眠")
    assert len(pickle.dumps(trained)) == size < 10_000
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode("春眠龘") == trained.encode("春眠龘")
    assert copy.fingerprint == trained.fingerprint


def test_several_processes_are_the_default_only_for_much_text(monkeypatch):
    monkeypatch.setattr(segmentation, "usable_cores", lambda: 7)
    for uses_rjieba, worth in ((False, 10_000_000), (True, 100_000_000)):
        monkeypatch.setattr(segmentation, "uses_rjieba", lambda user_dict, uses_rjieba=uses_rjieba: uses_rjieba)
        assert segmentation.default_processes(worth, "word") == 7
        assert segmentation.default_processes(worth - 1, "word") == 1
        assert segmentation.default_processes(worth, "char") == 1


def test_the_pipeline_cuts_words_in_several_processes(monkeypatch, documents, tmp_path):
    settings = {"unit": "word", "context": 8, "steps": 1, "validations": 1, "num_layers": 1, "hidden_dim": 8}
    settings |= {"valid_fraction": 0.2, "progress": False}
    expected = run_pipeline(documents, tmp_path / "a", **settings)
    monkeypatch.setattr(encoded_text, "default_processes", lambda *_: 2)
    assert run_pipeline(documents, tmp_path / "b", **settings) == expected


@pytest.mark.parametrize("processes", [0, -1])
def test_less_than_one_process_is_refused(processes):
    with pytest.raises(ValueError, match=f"processes must be at least 1, got {processes}"):
        list(map_chunks(list, DOCUMENTS, processes))
