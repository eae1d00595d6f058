import multiprocessing
import os
import re
import sys

import pytest
from conftest import message_of, spread, table_model

import aigc_tf
from aigc_tf import generate, kneser_ney, stream
from aigc_tf.generation.engines import choose
from aigc_tf.generation.engines.weight_cache import cached_weights
from aigc_tf.generation.settings import check_sampling
from aigc_tf.runtime import numba_availability

PLAIN = check_sampling()
BANNED = check_sampling(banned=["黄河"])


@pytest.fixture(scope="module")
def model(build, tokenizer):
    return spread(build(tokenizer.vocab_size, 8))


def test_the_engine_is_chosen_by_model_device_and_settings(model, tokenizer, documents, monkeypatch):
    def chosen(model, settings=PLAIN, **others):
        return choose.choose_engine(model, "auto", settings, **others)[0]

    weights = cached_weights(model)
    assert chosen(model) == "numba"
    assert chosen(table_model(tokenizer, {})) == chosen(kneser_ney(documents, tokenizer)) == "model"
    assert chosen(weights) == "numpy"  # numba would take longer to load
    monkeypatch.setattr(choose, "_PARAMETERS_WORTH_LOADING_NUMBA", 1)
    assert chosen(weights) == "numba"
    monkeypatch.setattr(choose, "_has_accelerator", lambda: True)
    assert chosen(model) == "device"
    assert chosen(weights) == "numba"  # of a process without Keras
    assert chosen(model, BANNED) == chosen(model, num_beams=2) == "numba"
    assert chosen(table_model(tokenizer, {})) == "model"
    monkeypatch.setattr(choose, "_has_accelerator", lambda: False)
    monkeypatch.setattr(numba_availability, "_forked", True)
    assert chosen(model) == chosen(weights) == "numpy"


def test_what_is_written_does_not_depend_on_how_much_may_be(model, tokenizer):
    weights = cached_weights(model)
    for source in (model, weights):
        long = generate(source, tokenizer, "白", max_new_tokens=1000, seed=5)
        assert long.startswith(generate(source, tokenizer, "白", max_new_tokens=20, seed=5))


def test_an_engine_that_cannot_be_used_is_refused(model, tokenizer, monkeypatch):
    def refused(model, engine, **settings):
        message = message_of(ValueError, generate, model, tokenizer, "白", engine=engine, **settings)
        assert message == message_of(ValueError, stream, model, tokenizer, "白", engine=engine, **settings)
        return message

    other, weights = table_model(tokenizer, {}), cached_weights(model)
    assert "engine must be one of auto, numba, numpy, device, model, got 'gpu'" in refused(model, "gpu")
    for engine in ("numba", "numpy", "device"):
        assert 'Use engine="model"' in refused(other, engine)
    assert "needs the model itself" in refused(weights, "model")
    assert 'engine="device" does not support banned, forced' in refused(
        model, "device", banned=["黄河"], forced=["明月"]
    )
    assert "num_beams" in message_of(ValueError, generate, model, tokenizer, "白", engine="device", num_beams=2)
    monkeypatch.setattr(numba_availability, "_forked", True)
    assert "was forked" in refused(model, "numba")


@pytest.fixture
def without_numba(monkeypatch):
    """Numba, importable again afterwards, under the import of which something goes wrong."""
    for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    numba_availability._problem_of_import.cache_clear()
    yield monkeypatch
    numba_availability._problem_of_import.cache_clear()


@pytest.mark.parametrize(
    ("numba", "said"),
    [
        ('raise ImportError("Numba needs NumPy 2.3 or less.\\nGot 2.9")', r"Numba needs NumPy 2\.3 or less\. Got 2\.9"),
        ("", "has no attribute 'config'"),  # what is left of one that was removed by half
    ],
    ids=["refuses", "empty"],
)
def test_numpy_replaces_a_numba_that_cannot_be_used_with_one_warning(
    model, tokenizer, without_numba, tmp_path, numba, said
):
    (tmp_path / "numba.py").write_text(numba)
    without_numba.syspath_prepend(tmp_path)
    settings = {"max_new_tokens": 6, "seed": 0}
    with pytest.warns(UserWarning, match=f"more slowly: .*{said}"):
        text = generate(model, tokenizer, "白", **settings)
    assert text == generate(model, tokenizer, "白", engine="numpy", **settings)  # and no other warning
    assert re.search(said, message_of(ValueError, generate, model, tokenizer, "白", engine="numba"))


def test_numpy_replaces_a_numba_that_is_switched_off_with_one_warning(model, tokenizer, monkeypatch):
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    numba_availability._problem_of_import.cache_clear()
    try:
        with pytest.warns(UserWarning, match="NUMBA_DISABLE_JIT"):
            assert choose.choose_engine(model, "auto", PLAIN)[0] == "numpy"
        assert choose.choose_engine(model, "auto", PLAIN)[0] == "numpy"
    finally:
        numba_availability._problem_of_import.cache_clear()


def in_a_child(function) -> str:
    """Return what a function returns in a forked child, or how the child ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, str(function()).encode())
        except BaseException as error:
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return said if status == 0 else f"status {status}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_child_writes_with_numpy(tokenizer):
    weights = cached_weights(spread(aigc_tf.transformer(tokenizer.vocab_size, 8, hidden_dim=16)))
    settings = {"max_new_tokens": 8, "seed": 0}
    generate(weights, tokenizer, "白", engine="numba", **settings)  # so that numba's threads run
    begun = stream(weights, tokenizer, "白", engine="numba", **settings)
    next(begun)
    next(begun)
    expected = generate(weights, tokenizer, "白", engine="numpy", **settings)

    def write():
        engine, source = choose.choose_engine(weights, "auto", PLAIN)
        return f"{engine} {generate(source, tokenizer, '白', **settings)}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_PARAMETERS_WORTH_LOADING_NUMBA", 1)
        assert choose.choose_engine(weights, "auto", PLAIN)[0] == "numba"
        assert in_a_child(write) == f"numpy {expected}"
    assert "was forked" in in_a_child(lambda: generate(weights, tokenizer, "白", engine="numba", **settings))
    assert "Start it again" in in_a_child(lambda: list(begun))


def write_in_a_pool(seed):
    return generate(*write_in_a_pool.model, "白", max_new_tokens=8, seed=seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_pool_of_forked_workers_writes(tokenizer):
    model = aigc_tf.lstm(tokenizer.vocab_size, 8, hidden_dim=16)
    generate(model, tokenizer, "白", engine="numba", max_new_tokens=2)
    write_in_a_pool.model = cached_weights(model), tokenizer
    with multiprocessing.get_context("fork").Pool(2) as pool:
        texts = pool.map_async(write_in_a_pool, range(4)).get(timeout=120)  # it would be made anew without end
    assert texts == [write_in_a_pool(seed) for seed in range(4)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_fork_while_compiled_code_runs_does_not_hang(tokenizer):
    weights = cached_weights(aigc_tf.lstm(tokenizer.vocab_size, 8, hidden_dim=16))
    with numba_availability.numba_lock:
        assert (
            in_a_child(lambda: len(generate(weights, tokenizer, "白", max_new_tokens=3, temperature=0)) > 0) == "True"
        )
        assert in_a_child(numba_availability.numba_is_usable) == "False"
    assert numba_availability.numba_is_usable()
