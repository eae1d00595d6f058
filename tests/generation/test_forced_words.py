import itertools
import re
import time
from random import Random

import numpy as np
import pytest
from conftest import message_of, spread, table_model
from hypothesis import given
from hypothesis import strategies as st

from aigc_tf import Tokenizer, generate, generate_batch, stream
from aigc_tf.generation.engines.engine import Engine, make_engine
from aigc_tf.generation.settings import check_sampling
from aigc_tf.generation.writer import Writer
from aigc_tf.models.ngram import Ngram

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


def write(words, max_new_tokens, wanted=(), strength=6.0, seed=0, prompt="", banned=(), stop=(), bias=()):
    """Let a writer that does not look at the text write; return the ids."""
    logits = np.zeros(V, np.float32)
    logits[wanted] += strength
    decoder = Engine(lambda rows, positions, ids: np.tile(logits, (len(np.unique(rows)), 1)), lambda parents: None)
    settings = check_sampling(forced=words, banned=banned, logit_bias=dict(bias), temperature=1.0, top_p=None)
    writer = Writer(TOKENIZER, "numpy", None, settings, max_new_tokens, stop)
    writer.check_prompt(prompt)
    writer._make_engine = lambda num_rows: decoder
    ((ids, _),) = writer.write([[BOS, *TOKENIZER.encode(prompt)]], seed, 1, False)
    assert len(ids) <= max_new_tokens
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
        words = TOKENIZER.decode(write(["白日", "山", "依"], 4, BYTES, seed=seed))
        assert sorted([words.replace("白日", ""), "白日"]) in (["山依", "白日"], ["依山", "白日"])
    assert write([], 3, [EOS], strength=99) == [EOS]


def test_too_little_room_is_refused():
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


def test_a_word_that_comes_in_one_token_with_a_stop_string_before_it_is_still_missing():
    tokenizer = Tokenizer(["白", "日", "，", "，白日"])
    model = table_model(tokenizer, {tokenizer.BOS: tokenizer.piece_id("，白日")})
    text = generate(model, tokenizer, forced=["白日"], stop="，", max_new_tokens=60, temperature=0)
    assert text.endswith("白日")
    assert "，" not in text


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
def test_a_forced_word_never_splits_a_character(character, before):
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


class Rule(Ngram):
    """A model of a function from the ids of a text to the tokens that follow, each as likely; others next to never."""

    input_shape, output_shape = (None, 16), (None, 16, V)

    def __init__(self, tokens_after):
        self._tokens_after = tokens_after

    def predict_on_batch(self, ids):
        logits = np.full((*ids.shape, V), -20.0, np.float32)
        for row, text in enumerate(ids.tolist()):
            for t in range(len(text)):
                logits[row, t, self._tokens_after(text[: t + 1])] = 0
        return logits


def test_a_word_is_read_whole_before_its_place_is_taken():
    comma, hill, sun, lean, white = map(TOKENIZER.piece_id, "，山日依白")

    def tokens_after(text):
        # 白 may follow 日 too, but 白依 comes after the comma alone.
        if text[-1] == white:
            return [lean] if text[-2] == comma else [hill]
        after = {sun: [comma, white, hill], comma: [sun, white, EOS], lean: [hill]}
        return after.get(text[-1], [sun])

    settings = {"forced": ["白依"], "max_new_tokens": 14, "temperature": 1.0, "top_p": None, "seed": 0}
    texts = generate_batch(Rule(tokens_after), TOKENIZER, [""] * 10, **settings)
    assert all("，白依" in text for text in texts)


@pytest.mark.parametrize("words", [["白日依"], ["白日", "依山"], ["白", "日", "依"]])
def test_words_come_before_the_end_that_the_model_expects(words):
    # Any pieces, and after seven of them the end.
    model = Rule(lambda text: list(range(259, 264)) if len(text) < 8 else [EOS])
    settings = {"forced": words, "max_new_tokens": 14, "temperature": 1.0, "top_p": None, "seed": 0}
    for text in generate_batch(model, TOKENIZER, [""] * 10, **settings):
        assert len(text) == 7
        assert all(word in text for word in words)


def test_a_word_comes_within_some_tokens_of_a_text_without_end():
    for seed in range(5):
        ids = write(["龘山"], 1000, WANTED["pieces"], strength=40, seed=seed)
        assert ids.index(3 + "龘".encode()[0]) <= 64


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


def holds(text, first, words):
    """Return whether a text holds a word that ends after a place."""
    return any(text.find(word, max(0, first - len(word) + 1)) >= 0 for word in words)


def tokens_needed(words, prompt, banned, stop):
    """Count the tokens of the shortest text of all words in any order, with "#" where two must be separated."""
    counts = []
    for order in itertools.permutations(words):
        for parts in itertools.product(["", "#"], repeat=len(words)):
            new = "".join(part + word for part, word in zip(parts, order, strict=True))
            if not holds(prompt + new, len(prompt), banned) and not holds(new, 0, stop):
                counts.append(room(*order) + "".join(parts).count("#"))
    return min(counts)


@given(
    st.lists(st.text("白日依é", min_size=1, max_size=2), min_size=1, max_size=3, unique=True),
    st.lists(st.text("白日依é", min_size=2, max_size=3), min_size=1, max_size=6),
    st.lists(st.text("白日依é", min_size=2, max_size=3), max_size=3),
    st.sampled_from(["", "白", "日日", "依白日"]),
    st.integers(0, 3),
    st.sampled_from(list(WANTED)),
)
def test_no_forced_word_completes_a_banned_one_or_a_stop_string(words, banned, stop, prompt, extra, wanted):
    words = [word for word in words if not any(word in other for other in words if other != word)]
    banned, stop = ([end for end in ends if not any(end in word for word in words)] for ends in (banned, stop))
    needed = tokens_needed(words, prompt, banned, stop)
    settings = {"wanted": WANTED[wanted], "prompt": prompt, "banned": banned, "stop": stop}
    if needed > room(*words):
        message = message_of(ValueError, write, words, needed - 1, **settings)
        assert f"they need {needed}, got max_new_tokens {needed - 1}" in message
    for seed in range(3):
        ids = write(words, needed + extra, seed=seed, **settings)
        data = b"".join(map(TOKENIZER.token_bytes, ids))
        assert not holds(prompt.encode() + data, len(prompt.encode()), [word.encode() for word in banned])
        stops = [data.index(end.encode()) for end in stop if end.encode() in data]
        assert all(word.encode() in data[: min(stops, default=None)] for word in words)


def test_words_that_no_token_may_separate_are_refused():
    bias = {i: -np.inf for i in range(3, V) if TOKENIZER.token_bytes(i) != "日".encode()}
    message = message_of(ValueError, write, ["山"], 9, prompt="依日", banned=["日山"], bias=bias)
    assert message == (
        "After '依日' the forced words complete a banned word or a stop string where they meet in every order tried, "
        "and no token may separate them. Ban less."
    )
    model = table_model(TOKENIZER, {})
    for function in (generate, stream):
        settings = {"forced": ["山", "日"], "stop": ["山日", "日山"], "max_new_tokens": 2}
        assert "with tokens that separate them they need 3, got" in message_of(
            ValueError, function, model, TOKENIZER, **settings
        )
    assert generate(model, TOKENIZER, "日", forced=["山"], stop="日山", max_new_tokens=1) == "日山"


@pytest.mark.parametrize("num_words", [9, 12, 60])
def test_orders_are_tried_in_little_time(num_words):
    # One word may stand beside no other, so that no order is right, in room for the words and one more token.
    words, unrelated = ([chr(first + i) for i in range(num)] for first, num in ((0x4E00, num_words), (0x6000, 2000)))
    banned = [pair for word in words[1:] for pair in (words[0] + word, word + words[0])]
    began = time.perf_counter()
    text = TOKENIZER.decode(write(words, room(*words) + 1, banned=banned + [word * 2 for word in unrelated]))
    assert time.perf_counter() - began < 0.1 * num_words + 5
    assert all(word in text for word in words)
    assert not any(word in text for word in banned)


def test_a_word_completed_where_others_meet_comes_again_to_separate_others():
    allowed = ["白日", "日依", "日，", "依山", "依，", "山日", "，日"]
    banned = [a + b for a, b in itertools.product("白日依山，", repeat=2) if a + b not in allowed]
    words = ["白日", "依山", "日依", "，"]  # 日依 arises in 白日依山, after which only it and 日 may follow
    bias = {i: -np.inf for i in range(3, V) if TOKENIZER.decode([i]) not in "白日依山，"}
    for extra in (0, 1, 2, 33):
        text = TOKENIZER.decode(write(words, room(*words) + extra, banned=banned, bias=bias))
        assert all(word in text for word in words)
        assert not any(word in text for word in banned)


@pytest.mark.parametrize("seed", range(24))
def test_many_words_of_which_one_is_completed_where_two_meet(seed):
    random = Random(seed)
    first, second, third, fourth, *others = (chr(0x4E00 + i) for i in range(random.randint(14, 20)))
    words = [first + second, third + fourth, second + third, *others]
    order = random.sample(words, len(words))
    order.remove(third + fourth)
    order.insert(order.index(first + second) + 1, third + fourth)
    orders = [order, *(random.sample(words, len(words)) for _ in range(random.randint(0, 2)))]
    allowed = {a[-1] + b[0] for order in orders for a, b in itertools.pairwise(order)} | set(words)
    banned = [a + b for a, b in itertools.product(dict.fromkeys("".join(words)), repeat=2) if a + b not in allowed]
    try:
        ids = write(words, room(*words), banned=banned, seed=seed)
    except ValueError as error:
        needed = int(re.search(r"they may need (\d+), got", str(error))[1])
        ids = write(words, needed, banned=banned, seed=seed)
    text = TOKENIZER.decode(ids)
    assert all(word in text for word in words)
    assert not any(word in text for word in banned)


@given(st.integers(8, 24), st.integers(0, 2), st.randoms(use_true_random=False), st.integers(0, 5))
def test_many_words_of_which_most_pairs_are_banned_come_in_the_room_they_need(num_words, share, random, seed):
    words = [chr(0x4E00 + i) for i in range(num_words)]
    allowed = set(itertools.pairwise(random.sample(words, num_words)))  # so that there is an order
    for _ in range(share):
        allowed |= set(zip(words, random.sample(words, num_words), strict=True))
    banned = [a + b for a, b in itertools.permutations(words, 2) if (a, b) not in allowed]
    needed = room(*words)
    try:
        ids = write(words, needed, BYTES, banned=banned, seed=seed)
    except ValueError as error:
        if num_words <= 10:  # of which every order is tried
            raise
        # Another order was found.
        needed = int(re.search(r"they may need (\d+), got", str(error))[1])
        ids = write(words, needed, BYTES, banned=banned, seed=seed)
    text = TOKENIZER.decode(ids)
    assert all(word in text for word in words)
    assert not any(word in text for word in banned)


@pytest.mark.parametrize("is_touchy", [False, True])
@pytest.mark.parametrize("extra", [2, 4, 6])
def test_many_words_come_though_a_draft_holds_some_of_them(extra, is_touchy):
    others = [chr(0x4E01 + i) for i in range(14)]
    tokenizer = Tokenizer(["一", *others])
    words = ["一abcdef", *others]  # the first, in any order of letters, seldom begins a text
    first, *_, liked = (tokenizer.encode(word)[0] for word in ("一", *others))

    def read(rows, positions, ids):
        newest = ids[np.flatnonzero(np.append(rows[1:] != rows[:-1], True))]
        logits = np.zeros((len(newest), tokenizer.vocab_size), np.float32)
        logits[:, liked - 6 : liked + 1] += 6
        logits[newest == tokenizer.BOS, first] = -6
        return logits

    banned = [char * 2 for char in ("a", *others)] if is_touchy else []
    settings = check_sampling(forced=words, banned=banned, temperature=1.0, top_p=None)
    max_new_tokens = sum(len(tokenizer.encode(word)) for word in words) + extra
    for seed in range(9):
        writer = Writer(tokenizer, "numpy", None, settings, max_new_tokens, ())
        writer.check_prompt("")
        writer._make_engine = lambda num_rows: Engine(read, lambda parents: None)
        ((ids, _),) = writer.write([[tokenizer.BOS]], seed, 1, False)
        assert all(word in tokenizer.decode(ids) for word in words)
        assert not any(word in tokenizer.decode(ids) for word in banned)


def test_a_word_placed_first_has_the_probability_that_the_model_gives_it():
    hill, lean, sun, white = TOKENIZER.encode("山依日白")
    model = table_model(TOKENIZER, {BOS: [hill, lean, sun], sun: [white, lean], white: [hill, sun]})
    # What the model gives a probability may not come at once, and there is room for no draft of two tokens.
    settings = {"forced": ["山"], "banned": ["日山"], "logit_bias": {"依": -np.inf}, "log_probability": True}
    text = generate(model, TOKENIZER, "日", max_new_tokens=2, **settings)
    assert text == "日白山"
    assert text.log_probability == pytest.approx(2 * np.log(0.5), abs=1e-3)
    text = generate(model, TOKENIZER, "", forced=["白日"], max_new_tokens=2, log_probability=True)
    assert text.log_probability < -40
    text = generate(
        model, TOKENIZER, "日", forced=["山"], banned=["日山", "白山"], max_new_tokens=2, log_probability=True
    )
    assert text.log_probability < -40


def test_nothing_follows_a_stop_string_that_comes_with_the_last_word():
    white_sun, lean_hill, lean = map(TOKENIZER.piece_id, ("白日", "依山", "依"))
    bias = {TOKENIZER.piece_id("白"): -np.inf}

    def tokens_after(text):
        return [white_sun] if len(text) == 1 else [lean]

    model = Rule(tokens_after)
    model.predict_on_batch = lambda ids: np.where(
        np.arange(V) == TOKENIZER.piece_id("白"), -np.inf, Rule.predict_on_batch(model, ids)
    ).astype(np.float32)
    text = generate(model, TOKENIZER, forced=["白"], stop="日", max_new_tokens=9, temperature=0, logit_bias=bias)
    assert (text, text.ids, text.finish_reason) == ("白", (white_sun,), "stop")
    # A word after the stop string has not come.
    model = table_model(TOKENIZER, {BOS: lean_hill, lean_hill: lean, lean: lean})
    text = generate(model, TOKENIZER, forced=["山"], stop="依", max_new_tokens=9, temperature=0)
    assert "山" in text


def test_a_banned_word_in_the_prompt_does_not_keep_the_words_out():
    for seed in range(10):
        ids = write(["山"], 5, BYTES, seed=seed, prompt="依白日依", banned=["白日"])
        assert "山" in TOKENIZER.decode(ids)


def test_forced_words_override_other_settings():
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


@pytest.mark.parametrize("words", [[], ["白日"], ["白日", "依山"], ["日依山"], ["山，白"]])
def test_a_text_with_forced_words_keeps_its_form(words):
    # Four clauses of three characters: at its last place a clause has room for half a word of two.
    comma = TOKENIZER.piece_id("，")

    def tokens_after(text):
        place = len(text) - 1
        return [EOS] if place == 15 else [comma] if place % 4 == 3 else TOKENIZER.encode("白日依山")

    settings = {"forced": words, "max_new_tokens": 30, "temperature": 1.0, "top_p": None, "seed": 0}
    texts = generate_batch(Rule(tokens_after), TOKENIZER, [""] * 10, **settings)
    assert all(re.fullmatch("[白日依山]{3}(，[白日依山]{3}){3}", text) for text in texts), texts
    assert all(word in text for word in words for text in texts)
    assert len(set(texts)) == 10


def test_a_word_that_the_model_gives_no_probability_comes_without_a_word_before_it():
    (word,) = TOKENIZER.encode("山")
    for banned in ((), ("龘",)):
        ids = write(["山"], 3, wanted=[word], strength=-np.inf, banned=banned)
        assert ids.index(word) == 0


CLAUSE = Tokenizer([*"春风明月。，", "\n"])


@pytest.mark.parametrize(
    ("words", "stop", "written"),
    [
        (["明月。"], "。\n", "春风。\n春风。"),
        (["明月"], "明月。", "春风明月。"),
        (["明月。"], "月。，" + "春" * 70, "春风，" + "春" * 9),  # longer than a draft looks ahead
        (["明月。", "风，"], "。\n", "春。\n春风"),
    ],
)
def test_no_stop_string_begins_within_a_forced_word(words, stop, written):
    ids = CLAUSE.encode(written)
    successors = dict(zip([CLAUSE.BOS, *ids], [*ids, ids[0]], strict=True))
    if stop == "。\n":  # which would follow the word at once
        successors[CLAUSE.piece_id("。")] = CLAUSE.piece_id("\n")
    if len(stop) > 9:
        successors |= {CLAUSE.piece_id("，"): CLAUSE.piece_id("春"), CLAUSE.piece_id("。"): CLAUSE.piece_id("，")}
    model = table_model(CLAUSE, successors)
    for settings in ({"temperature": 0}, {"seed": 0}, {"seed": 1, "best_of": 2}):
        text = generate(model, CLAUSE, forced=words, stop=[stop], max_new_tokens=99, **settings)
        assert all(word in text for word in words)
        assert stop not in text
    text = "".join(stream(model, CLAUSE, forced=words, stop=stop, max_new_tokens=99, temperature=0))
    assert all(word in text for word in words)


def test_the_log_probability_of_a_long_text_is_that_of_writing_it_from_the_prompt(build):
    from aigc_tf.generation.batch import TextBatch, log_probabilities
    from aigc_tf.generation.engines.choose import choose_engine

    model = spread(build(V, 8))
    decode = choose_engine(model, "numpy", check_sampling())[1]
    settings = {"forced": ["白日"], "max_new_tokens": 30, "seed": 0, "engine": "numpy", "logit_bias": {EOS: -np.inf}}
    for best_of in (1, 2):
        text = generate(model, TOKENIZER, "山", log_probability=True, best_of=best_of, **settings)
        assert len(text.ids) == 30
        texts = TextBatch(make_engine(decode, 1, "numpy"), [[BOS, *TOKENIZER.encode("山")]])
        (expected,) = log_probabilities(texts, [list(text.ids)])
        assert text.log_probability == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("extra", [0, 1])
def test_logits_that_are_not_finite_are_refused_with_forced_words(extra):
    from aigc_tf.generation.sampler import NOT_FINITE

    model = table_model(TOKENIZER, {BOS: range(V)})
    weights = model.get_weights()
    model.set_weights([np.full_like(weight, np.nan) for weight in weights])
    for settings in ({}, {"log_probability": True}):
        message = message_of(
            ValueError, generate, model, TOKENIZER, forced=["白日"], max_new_tokens=2 + extra, **settings
        )
        assert message == NOT_FINITE
