"""How documents are divided into training and held-out ones."""

import math
import random

import pytest
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_tf.corpus import splitting
from aigc_tf.corpus.splitting import split

often = settings(max_examples=300, deadline=None)

POEMS = [f"第{i}首" for i in range(100)]
extra_documents = st.lists(st.text(st.characters(), max_size=3), max_size=20)


@often
@given(extra_documents, st.floats(0.1, 0.9), st.integers(0, 9))
def test_split_is_disjoint_complete_and_keeps_the_order(extra, valid_fraction, seed):
    documents = POEMS + extra
    random.Random(seed).shuffle(documents)
    train, valid = split(documents, valid_fraction)
    held_out = set(valid)
    assert held_out.isdisjoint(train)
    assert train == [document for document in documents if document not in held_out]
    assert valid == [document for document in documents if document in held_out]


@often
@given(extra_documents, st.sampled_from([0.1, 0.5]), st.integers(0, 9))
def test_split_is_stable_when_documents_are_added_or_reordered(extra, valid_fraction, seed):
    held_out = set(split(POEMS, valid_fraction)[1])
    documents = POEMS + extra
    random.Random(seed).shuffle(documents)
    assert held_out == set(split(documents, valid_fraction)[1]).intersection(POEMS)


def test_split_is_the_same_in_every_process():
    # Written out, because a hash that is salted once a process is stable within this one.
    assert split(POEMS)[1] == ["第20首", "第23首", "第40首", "第44首", "第50首", "第70首", "第73首"]


@pytest.mark.parametrize("valid_fraction", [0.01, 0.05, 0.3])
def test_split_holds_out_about_the_fraction_asked(valid_fraction):
    _, valid = split([f"第{i}首" for i in range(5_000)], valid_fraction)
    standard_deviation = math.sqrt(5_000 * valid_fraction * (1 - valid_fraction))
    assert abs(len(valid) - 5_000 * valid_fraction) < 4 * standard_deviation


@pytest.mark.parametrize("valid_fraction", [0, 1, -0.1, 1.5, math.nan])
def test_split_refuses_a_fraction_out_of_range(valid_fraction):
    assert "between 0 and 1" in message_of(ValueError, split, POEMS, valid_fraction)


@pytest.mark.parametrize("documents", [[], ["春"], ["春", "春"], ["春" * 10_000]])
def test_split_of_fewer_than_two_different_documents_is_refused(documents):
    message = message_of(ValueError, split, documents)
    assert f"at least two different documents, one to hold out, got {len(set(documents))}" in message
    assert "add text" in message


@pytest.mark.parametrize("valid_fraction", [1e-9, 0.05, 1 - 1e-9])
def test_however_few_documents_both_sides_have_some(valid_fraction):
    for i in range(100):
        documents = [f"{i}-{j}" for j in range(2 + i % 9)] * 2
        train, valid = split(documents, valid_fraction)
        assert train
        assert valid
        assert sorted(train + valid) == sorted(documents)
        assert set(valid).isdisjoint(train)
        # The one that is held out is the one that the smallest fraction to hold out any would hold out.
        if valid_fraction < 1e-6:
            assert len(set(valid)) == 1
            assert set(valid) <= set(split(documents, 0.3)[1])


def test_a_novel_is_cut_at_line_ends():
    novel = "\n".join(f"第{i}段。{'春眠不觉晓，' * (i % 50)}" for i in range(2_000))
    train, valid = split([novel])
    pieces = splitting._pieces(novel)
    assert "\n".join(pieces) == novel
    assert all(len(piece) <= 4_000 for piece in pieces)
    assert sorted(train + valid) == sorted(pieces)
    assert 0 < len(valid) < len(pieces) / 5
    # What is written after it, and other documents, change no side.
    assert set(split([novel + "\n尾声", "春"])[1]) >= set(valid) - {pieces[-1]}


@often
@given(st.text(st.sampled_from("春眠\n"), max_size=60), st.integers(1, 9))
def test_pieces_joined_are_the_document(document, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "MAX_PIECE_CHARS", most)
        pieces = splitting._pieces(document)
    assert "\n".join(pieces) == document
    assert all(len(piece) <= most or "\n" not in piece.lstrip("\n")[:-1] for piece in pieces)
    assert document == "" or "" not in pieces[:-1]
