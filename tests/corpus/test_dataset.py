import itertools
import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_tf import Tokenizer, make_dataset, make_store, open_store
from aigc_tf.corpus import dataset, store
from aigc_tf.corpus.dataset import Batches, _window_starts
from aigc_tf.corpus.store import sample_tokens
from aigc_tf.training.sampled_softmax import candidate_sampler


def batches(data, count=None):
    return [(np.asarray(x), np.asarray(y)) for x, y in itertools.islice(data, count)]


def test_targets_are_the_inputs_one_token_on(documents, tokenizer):
    for x, y in batches(make_dataset(documents, tokenizer, 16, 4)):
        assert x.shape == y.shape == (4, 16)
        assert x.dtype == y.dtype == np.int32
        assert (y[:, :-1] == x[:, 1:]).all()


def test_shapes_are_static(documents, tokenizer):
    pytest.importorskip("tensorflow")
    for seed in (None, 0):
        inputs, targets = make_dataset(documents, tokenizer, 16, 4, seed).element_spec
        assert inputs.shape == targets.shape == (4, 16)


def test_the_row_is_each_document_framed(documents, tokenizer):
    expected = [i for d in documents for i in (tokenizer.BOS, *tokenizer.encode(d), tokenizer.EOS)]
    assert make_store(documents, tokenizer).tolist() == expected


def test_windows_begin_with_a_document(documents, tokenizer):
    inputs = np.concatenate([x for x, _ in batches(make_dataset(documents, tokenizer, 40, 1))])
    # The longest document has 38 tokens, so only the last window, filled up from before, may begin within one.
    assert (inputs[:-1, 0] == tokenizer.BOS).all()


def starts_by_hand(tokens, bos, context):
    """Say what `_window_starts` says, window by window."""
    boundaries = [*np.flatnonzero(tokens == bos).tolist(), len(tokens)]
    starts, start = [], 0
    while start + context + 1 <= len(tokens):
        starts.append(start)
        start = max([b for b in boundaries if start < b <= start + context + 1], default=start + context)
    if start < len(tokens) - 1:
        starts.append(len(tokens) - context - 1)
    return starts


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20), context=st.integers(1, 20))
def test_every_token_is_a_target_and_every_window_full(lengths, context):
    row = np.concatenate([[1] + [9] * n + [2] for n in lengths])
    if len(row) < context + 1:
        with pytest.raises(ValueError, match="one window needs"):
            _window_starts(row, 1, context)
        return
    starts = _window_starts(row, 1, context)
    assert starts.tolist() == starts_by_hand(row, 1, context)
    assert (starts >= 0).all()
    assert (starts + context < len(row)).all()
    assert (np.diff(starts) > 0).all()
    times = np.zeros(len(row), int)
    for start in starts:
        times[start + 1 : start + context + 1] += 1
    assert (times[row != 1] >= 1).all()
    # Only the last window, filled up from before, can make a token count a third time.
    assert times.max() <= 3


def test_a_document_that_fits_is_whole_in_some_window(documents, tokenizer):
    starts = _window_starts(make_store(documents, tokenizer), tokenizer.BOS, 40)
    begin = 0
    for document in documents:
        end = begin + len(tokenizer.encode(document)) + 2
        assert any(start <= begin and end <= start + 41 for start in starts)
        begin = end


def test_every_window_once_a_pass(documents, tokenizer):
    in_order = {x.tobytes() for x, _ in batches(make_dataset(documents, tokenizer, 20, 1))}
    num_windows = len(batches(make_dataset(documents, tokenizer, 20, 1)))
    assert len(in_order) == num_windows  # all different, so that counting them means something
    shuffled = batches(make_dataset(documents, tokenizer, 20, 1, seed=5), 3 * num_windows)
    passes = [[x.tobytes() for x, _ in shuffled[i * num_windows :][:num_windows]] for i in range(3)]
    for one_pass in passes:
        assert sorted(one_pass) == sorted(in_order)
    assert passes[0] != passes[1] != passes[2]


def test_order_is_a_function_of_the_seed(documents, tokenizer):
    def first(seed):
        return [x.tolist() for x, _ in batches(make_dataset(documents, tokenizer, 20, 4, seed), 10)]

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, float("nan")])
def test_seeds_that_cannot_be_are_refused(documents, tokenizer, seed):
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1, got"):
        make_dataset(documents, tokenizer, 8, 4, seed=seed)


def test_a_seed_is_a_number_of_python_s_own(documents, tokenizer):
    data = make_dataset(documents, tokenizer, 8, 4, seed=np.int64(3))
    assert json.loads(json.dumps(data.identity()))["order's seed"] == 3


@pytest.mark.parametrize("start_step", [1, 7, 100])
def test_starting_at_a_step_is_skipping_to_it(documents, tokenizer, start_step):
    whole = batches(make_dataset(documents, tokenizer, 20, 4, seed=3), start_step + 5)
    resumed = batches(make_dataset(documents, tokenizer, 20, 4, seed=3, start_step=start_step), 5)
    for (x, y), (x2, y2) in zip(whole[start_step:], resumed, strict=True):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setattr(dataset, "tensorflow_for_data", lambda: None)


@pytest.mark.parametrize("seed", [None, 3])
def test_without_tensorflow_batches_are_the_same(documents, tokenizer, seed, request):
    settings = {"context": 16, "batch_size": 4, "seed": seed}
    given = make_dataset(documents, tokenizer, **settings)
    request.getfixturevalue("without_tensorflow")
    data = make_dataset(documents, tokenizer, **settings)
    assert type(data) is Batches
    assert data.shape == (4, 16)
    count = None if seed is None else 60
    for _ in range(2):  # from the beginning each time
        np.testing.assert_array_equal(batches(data, count), batches(given, count))
    np.testing.assert_array_equal(batches(data.from_step(5), 4), batches(given.from_step(5), 4))
    halves = [(x[rows], y[rows]) for x, y in batches(given.from_step(5), 4) for rows in (slice(2), slice(2, 4))]
    np.testing.assert_array_equal(batches(data.from_step(5).rebatch(2, drop_remainder=True), 8), halves)
    assert data.cardinality() == given.cardinality()
    assert data.rebatch(2, drop_remainder=True).cardinality() == (-1 if seed else 2 * data.cardinality())
    assert (data.seed, data.identity(), data.counts().tolist()) == (seed, given.identity(), given.counts().tolist())
    for array in batches(data, 1)[0]:
        assert array.dtype == np.int32


@pytest.mark.parametrize("fixtures", [[], ["without_tensorflow"]])
def test_data_that_starts_later_says_so(documents, tokenizer, fixtures, request):
    for name in fixtures:
        request.getfixturevalue(name)
    for seed in (None, 3):
        whole = make_dataset(documents, tokenizer, 16, 4, seed)
        late = make_dataset(documents, tokenizer, 16, 4, seed, start_step=2)
        np.testing.assert_array_equal(batches(late.from_step(3), 4), batches(whole.from_step(5), 4))
        assert late.identity() == {**whole.identity(), "first batch": 2} != whole.identity()
        assert late.cardinality() == (whole.cardinality() - 2 if seed is None else -1)
    assert make_dataset(documents, tokenizer, 16, 4, start_step=10**6).cardinality() == 0


def test_one_pass_has_a_known_length_and_training_data_has_no_end(documents, tokenizer):
    one_pass = make_dataset(documents, tokenizer, 20, 4)
    assert one_pass.cardinality() == len(batches(one_pass))
    infinite = -1  # tf.data.INFINITE_CARDINALITY
    assert make_dataset(documents, tokenizer, 20, 4, seed=0).cardinality() == infinite


def test_no_tuner_keeps_an_iterator_from_ending(documents, tokenizer):
    pytest.importorskip("tensorflow")
    data = make_dataset(documents, tokenizer, 8, 4, seed=0).from_step(3)
    sampled = candidate_sampler(data.counts(), 10, seed=0)(data, 0)
    for each in (data, data.rebatch(2), sampled):
        assert each.options().autotune.enabled is False


def test_a_store_on_disk_gives_the_same_batches(tmp_path, documents, tokenizer):
    store = make_store(documents, tokenizer, tmp_path / "store")
    assert isinstance(store, np.memmap)
    assert store.dtype == np.uint16
    on_disk = batches(make_dataset(open_store(tmp_path / "store", tokenizer), tokenizer, 20, 4, seed=1), 20)
    in_memory = batches(make_dataset(documents, tokenizer, 20, 4, seed=1), 20)
    np.testing.assert_array_equal(on_disk, in_memory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_large_vocabularies_take_four_bytes():
    for last, dtype in ((2**16 - 1, np.uint16), (2**16, np.uint32)):
        tokenizer = Tokenizer([chr(0x10000 + i) for i in range(last + 1 - 259)])
        store = make_store([tokenizer.pieces[-1]], tokenizer)
        assert store.dtype == dtype
        assert store.tolist() == [1, last, 2]


def test_a_store_that_fails_leaves_nothing(tmp_path, tokenizer):
    def broken():
        yield "白日"
        raise RuntimeError("the disk of the source")

    with pytest.raises(RuntimeError):
        make_store(broken(), tokenizer, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_nothing_is_empty(tmp_path, tokenizer):
    for path in (None, tmp_path / "store"):
        assert make_store([], tokenizer, path).tolist() == []
    assert open_store(tmp_path / "store", tokenizer).tolist() == []


def test_a_store_needs_no_tensorflow(tmp_path):
    code = f"""if True:
        import sys
        sys.modules["tensorflow"] = sys.modules["keras"] = None
        import aigc_tf
        tokenizer = aigc_tf.Tokenizer.train(["春眠不觉晓"])
        print(len(aigc_tf.make_store(["春眠"], tokenizer, {str(tmp_path / "store")!r})))
        print(len(aigc_tf.open_store({str(tmp_path / "store")!r}, tokenizer)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["4", "4"], "")


def test_a_store_larger_than_the_memory_is_read_in_blocks(monkeypatch, documents, tokenizer):
    ids = make_store(documents, tokenizer)
    expected = make_dataset(ids, tokenizer, 16, 4, seed=0)
    monkeypatch.setattr(store, "_BLOCK", 7)
    for module in (dataset, store):
        monkeypatch.setattr(module, "np", np_with_small_arrays(np, 8, "bincount", "flatnonzero"))
    in_blocks = make_dataset(ids, tokenizer, 16, 4, seed=0)
    assert in_blocks.counts().tolist() == expected.counts().tolist() == np.bincount(ids).tolist()
    np.testing.assert_array_equal(batches(in_blocks, 5), batches(expected, 5))


def np_with_small_arrays(library, most, *names):
    """Return NumPy, but for functions that refuse arrays of `most` elements and more."""

    def refusing(function):
        def small_only(values, *args, **kwargs):
            assert len(values) < most
            return function(values, *args, **kwargs)

        return small_only

    return types.SimpleNamespace(**{**vars(library), **{name: refusing(getattr(library, name)) for name in names}})


@pytest.mark.parametrize("length", [50, 99, 100, 101, 1_000])
def test_a_sample_is_slices_all_over_the_store(length):
    sample = sample_tokens(np.arange(length), 100)
    assert len(sample) == min(length, 100)
    assert sample[0] == 0
    assert sample[-1] == length - 1
    assert (np.diff(sample) > 0).all()
    assert np.diff(sample).max() <= math.ceil(length / 99) + 1


def test_stores_refuse_what_does_not_fit(tmp_path, documents, tokenizer):
    path = tmp_path / "store"
    with pytest.raises(FileNotFoundError, match="no token store"):
        open_store(path, tokenizer)
    make_store(documents, tokenizer, path)
    with pytest.raises(FileExistsError, match="exists already"):
        make_store(documents, tokenizer, path)
    with pytest.raises(ValueError, match="another tokenizer"):
        open_store(path, Tokenizer.train(documents, vocab_size=262))
    with open(path / "tokens.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match="does not have the"):
        open_store(path, tokenizer)
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    (path / "manifest.json").write_text(json.dumps({**manifest, "dtype": "nonsense"}), "utf-8")
    with pytest.raises(ValueError, match="must be of uint16, but says nonsense"):
        open_store(path, tokenizer)
    for wrong in ({"version": 99}, {"tokens": None}):
        (path / "manifest.json").write_text(json.dumps({**manifest, **wrong}), "utf-8")
        with pytest.raises(ValueError, match="cannot be read by this version"):
            open_store(path, tokenizer)


def test_too_little_text_is_said(tokenizer):
    with pytest.raises(ValueError, match=r"has 4 tokens, but one window needs context \+ 1 = 9"):
        make_dataset(["白日"], tokenizer, 8, 1)
    with pytest.raises(ValueError, match="has 0 tokens"):
        make_dataset([], tokenizer, 8, 1)
    with pytest.raises(ValueError, match="one batch needs 100"):
        make_dataset(["白日依山尽"], tokenizer, 2, 100)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        make_dataset(["白日"], tokenizer, 0, 1)
