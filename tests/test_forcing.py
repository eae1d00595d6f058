import numpy as np
import pytest
from conftest import message_of, table_model
from hypothesis import given
from hypothesis import strategies as st

from aigc_tf import Tokenizer, generate, generate_batch, stream
from aigc_tf.forcing import Forcing
from aigc_tf.sampler import Sampler, check_settings

TOKENIZER = Tokenizer(["白", "日", "依", "山", "，", "白日", "依山"])
BOS, EOS, V = TOKENIZER.BOS, TOKENIZER.EOS, TOKENIZER.vocab_size
BYTES = np.arange(3, 259)
# What begins a character of two, three or four bytes, which then may never be completed.
FIRST_BYTES = 3 + np.r_[0xC2:0xE0, 0xE0:0xF0, 0xF0:0xF5]

WANTED = {  # what a writer prefers, by any amount
    "nothing": [],
    "the end": [EOS],
    "bytes": BYTES,
    "first bytes": FIRST_BYTES,
    "four bytes": 3 + np.r_[0xF0, 0x9F, 0x90, 0x89],
    "pieces": np.arange(259, V),
}


def room(*words):
    return sum(len(TOKENIZER.encode(word)) for word in words)


def write(words, max_new_tokens, wanted=(), strength=6.0, seed=0, prompt="", banned=()):
    """Let a writer of chance write, kept to the words; return the ids."""
    sampler = Sampler(TOKENIZER, check_settings(forced=words, banned=banned))
    forcing = Forcing(sampler, TOKENIZER, prompt, max_new_tokens)
    generator = np.random.default_rng(seed)
    logits = sampler.bias.copy()
    logits[wanted] += strength
    ids = []
    for step in range(max_new_tokens):
        constrained = logits.copy()
        forcing.constrain(constrained, max_new_tokens - step)
        assert (constrained > -np.inf).any()
        ids.append(int((constrained + generator.gumbel(size=V)).argmax()))
        forcing.note(ids[-1])
        if ids[-1] == EOS:
            break
    return ids


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("words", ["白日", "龘", "🐉龘", "白日 ，山 依", "🐉龘 白a 日", "a \ud800"], ids=ascii)
def test_forced_words_come_whatever_the_writer_wants(words, wanted):
    words = words.split()
    for extra in (0, 1, 2, 3, 4, 5, 9, 40):
        for seed in range(12):
            ids = write(words, room(*words) + extra, WANTED[wanted], strength=3.0 * (seed % 4), seed=seed)
            text = TOKENIZER.decode(ids)
            assert all(word in text for word in words), (extra, seed, text)


@given(
    st.lists(st.text("白日依山龘é🐉a", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 20),
    st.sampled_from(list(WANTED)),
    st.integers(0, 10**6),
)
def test_forced_words_come_in_the_room_they_need(words, extra, wanted, seed):
    text = TOKENIZER.decode(write(words, room(*set(words)) + extra, WANTED[wanted], seed=seed))
    assert all(word in text for word in words)


def test_in_room_as_large_as_needed_nothing_else_comes():
    for seed in range(20):
        assert TOKENIZER.decode(write(["白日龘"], 5, BYTES, seed=seed)) == "白日龘"
        assert TOKENIZER.decode(write(["白日", "山", "依"], 4, BYTES, seed=seed)) == "白日山依"
    assert write([], 3, [EOS], strength=99) == [EOS]


def test_too_little_room_is_said():
    model = table_model(TOKENIZER, {})
    for words, needed in ((["白日"], 2), (["白日", "龘"], 5), (["🐉"], 4), (["白日", "白日"], 2)):
        for max_new_tokens in range(needed):
            expected = f"The forced words need {needed} tokens, got max_new_tokens {max_new_tokens}. Allow more."
            for function, prompt in ((generate, "山"), (stream, ""), (generate_batch, ["", "山"])):
                settings = {"forced": words, "max_new_tokens": max_new_tokens}
                assert message_of(ValueError, function, model, TOKENIZER, prompt, **settings) == expected
        text = generate(model, TOKENIZER, "山", forced=words, max_new_tokens=needed)
        assert sorted(text) == sorted("山" + "".join(set(words)))


def test_a_text_ends_after_its_words_and_not_before():
    model = table_model(TOKENIZER, {})  # it always ends at once
    for seed in range(10):
        text = generate(model, TOKENIZER, "依", forced=["白日", "龘"], max_new_tokens=200, seed=seed)
        assert text.endswith(("白日", "龘"))
        assert "白日" in text
        assert "龘" in text
    # Where none is lacking, it may end as ever.
    assert generate(model, TOKENIZER, "依", max_new_tokens=200) == "依"


def test_a_word_that_comes_by_itself_is_not_written_again():
    word = TOKENIZER.encode("白日依")
    model = table_model(TOKENIZER, dict(zip([BOS, *word], [*word, EOS], strict=True)))
    assert generate(model, TOKENIZER, forced=["白日依", "日"], max_new_tokens=60, temperature=0) == "白日依"
    # Nor where it is spelt in another way than the tokenizer would.
    for ids in ([TOKENIZER.piece_id("白日")], [3 + byte for byte in "白日".encode()]):
        model = table_model(TOKENIZER, dict(zip([BOS, *ids], [*ids, EOS], strict=True)))
        assert generate(model, TOKENIZER, forced=["白日"], max_new_tokens=60, temperature=0) == "白日"


def test_the_prompt_is_not_the_text():
    model = table_model(TOKENIZER, {})
    text = generate(model, TOKENIZER, "白日", forced=["白日"], max_new_tokens=9, seed=0)
    assert text.count("白日") == 2
    assert text.endswith("白日")


def test_no_word_comes_twice():
    for seed in range(50):
        text = TOKENIZER.decode(write(["白依", "龘山"], 60, BYTES, seed=seed))
        assert text.count("白依") == text.count("龘山") == 1


def test_a_word_within_another_needs_no_room_of_its_own():
    for words in (["白日", "白日依"], ["白日依", "日"]):
        assert TOKENIZER.decode(write(words, 3)) == "白日依"
        for seed in range(20):
            text = TOKENIZER.decode(write(words, 40, BYTES, seed=seed))
            assert text.count("白日") == 1


@pytest.mark.parametrize("before", ["", "日", "日山"])
@pytest.mark.parametrize("character", ["é", "龘", "🐉"])
def test_a_forced_word_never_stands_amidst_a_character(character, before):
    # A writer of nothing but characters in bytes, which lie in full on either side of the words; after some pieces, as
    # words come at certain steps.
    ids, begin = [3 + byte for byte in character.encode()], [BOS, *TOKENIZER.encode(before)]
    successors = dict(zip([*begin, *ids], [*begin[1:], *ids, ids[0]], strict=True))
    model = table_model(
        TOKENIZER, {**dict.fromkeys(range(259, V), ids[0]), 3 + "𤭢".encode()[-1]: ids[0], **successors}
    )
    for max_new_tokens in range(room("白", "𤭢"), 60, 3):
        text = generate(model, TOKENIZER, forced=["白", "𤭢"], max_new_tokens=max_new_tokens, temperature=0)
        assert text.count("白") == text.count("𤭢") == 1
        assert "\ufffd" not in text
        assert text.count(character) >= max_new_tokens // len(ids) - 6


def test_a_word_comes_where_it_is_likely():
    comma, hill, sun, lean, white = map(TOKENIZER.piece_id, "，山日依白")
    # After a comma the first token of the word is as likely as what follows, elsewhere next to impossible.
    model = table_model(TOKENIZER, {BOS: hill, hill: sun, sun: lean, lean: comma, comma: [hill, white], white: sun})
    settings = {"forced": ["白山"], "max_new_tokens": 90, "temperature": 1.0, "top_p": None, "seed": 0}
    for text in generate_batch(model, TOKENIZER, [""] * 30, **settings):
        assert "，白山" in text
        assert text.split("白山")[0].count("，") > 1  # and not at the first place that there is


def test_a_word_comes_soon_where_it_is_as_likely_everywhere():
    for seed in range(20):
        ids = write(["龘山"], 1000, WANTED["pieces"], strength=40, seed=seed)
        assert 8 < ids.index(3 + "龘".encode()[0]) <= 16


def test_a_banned_word_does_not_arise_from_a_forced_one():
    sun, hill = map(TOKENIZER.piece_id, "日山")
    model = table_model(TOKENIZER, {BOS: [sun, hill], sun: sun, hill: [sun, hill]})
    for words, banned in ((["山"], ["日山"]), (["山日", "依"], ["日山"]), (["龘"], ["日龘", "山龘"])):
        settings = {"forced": words, "banned": banned, "max_new_tokens": room(*words) + 6}
        for text in generate_batch(model, TOKENIZER, ["日"] * 30, temperature=1.0, seed=0, **settings):
            assert all(word in text for word in words), text
            assert not any(word in text for word in banned), text


def test_words_that_would_make_a_banned_one_come_in_the_other_order():
    assert TOKENIZER.decode(write(["山", "白"], 2, prompt="日", banned=["日山"])) == "白山"
    assert TOKENIZER.decode(write(["日", "山"], 2, banned=["日山"])) == "山日"


def test_a_banned_word_in_the_prompt_does_not_keep_the_words_out():
    for seed in range(10):
        ids = write(["山"], 5, BYTES, seed=seed, prompt="依白日依", banned=["白日"])
        assert "山" in TOKENIZER.decode(ids)


def test_force_is_stronger_than_what_else_is_unwanted():
    model = table_model(TOKENIZER, {})
    for settings in (
        {"logit_bias": {"白": float("-inf")}},
        {"no_repeat_ngram": 1},
        {"repetition_penalty": 9.0},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 0},
    ):
        text = generate(model, TOKENIZER, "白白", forced=["白日白"], max_new_tokens=9, seed=0, **settings)
        assert text.count("白日白") == 1, settings


def test_each_text_of_a_batch_has_its_words():
    lean, hill, comma = TOKENIZER.encode("依山，")
    # Some end long before others.
    model = table_model(TOKENIZER, {BOS: lean, lean: [lean, hill], hill: comma, comma: [lean, EOS]})
    prompts = ["依", "山依山", "", "白日"]
    settings = {"forced": ["白日", "龘"], "max_new_tokens": 30, "temperature": 1.0, "top_p": None}
    texts = generate_batch(model, TOKENIZER, prompts, seed=4, **settings)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert "白日" in text[len(prompt) :]
        assert "龘" in text
        assert generate(model, TOKENIZER, prompt, seed=4 + i, **settings) == text
        assert "".join(stream(model, TOKENIZER, prompt, seed=4 + i, **settings)) == text
    assert all("龘" in generate(model, TOKENIZER, "依", best_of=3, seed=seed, **settings) for seed in range(5))
