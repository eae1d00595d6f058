import numpy as np
import pytest
from conftest import message_of, table_model

from aigc_tf import Tokenizer, generate, generate_batch, stream
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling

TOKENIZER = Tokenizer(["白", "日", "依", "山", "，", "白日", "山白", "日依", "依白日山"])
V = TOKENIZER.vocab_size
NAN, INF = float("nan"), float("inf")


def make(**settings):
    return Sampler(TOKENIZER, check_sampling(**settings))


@pytest.mark.parametrize(
    ("settings", "rule", "received"),
    [
        ({"temperature": -1}, "temperature must be at least 0", "-1"),
        ({"temperature": NAN}, "temperature must be at least 0", "nan"),
        ({"temperature": INF}, "temperature must be at least 0", "inf"),
        ({"temperature": "0.8"}, "temperature must be at least 0", "'0.8'"),
        ({"temperature": None}, "temperature must be at least 0", "None"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1", "0"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 1", "2.5"),
        ({"top_k": "3"}, "top_k must be a whole number of at least 1", "'3'"),
        ({"top_k": NAN}, "top_k must be a whole number of at least 1", "nan"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1", "0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1", "1.01"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1", "nan"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1", "-0.1"),
        ({"min_p": 1.1}, "min_p must be from 0 to 1", "1.1"),
        ({"typical_p": 0}, "typical_p must be above 0 and at most 1", "0"),
        ({"typical_p": 2}, "typical_p must be above 0 and at most 1", "2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0", "0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be above 0", "-1"),
        ({"repetition_penalty": INF}, "repetition_penalty must be above 0", "inf"),
        ({"repetition_penalty": None}, "repetition_penalty must be above 0", "None"),
        ({"presence_penalty": NAN}, "presence_penalty must be a finite number", "nan"),
        ({"presence_penalty": "1"}, "presence_penalty must be a finite number", "'1'"),
        ({"frequency_penalty": -INF}, "frequency_penalty must be a finite number", "-inf"),
        ({"frequency_penalty": None}, "frequency_penalty must be a finite number", "None"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be a whole number of at least 1", "0"),
        ({"no_repeat_ngram": 1.5}, "no_repeat_ngram must be a whole number of at least 1", "1.5"),
        ({"exempt": "的"}, "exempt must be a list of words, none of them empty", "'的'"),
        ({"exempt": [7]}, "exempt must be a list of words, none of them empty", "[7]"),
        ({"banned": "白日"}, "banned must be a list of words, none of them empty", "'白日'"),
        ({"banned": ["白", ""]}, "banned must be a list of words, none of them empty", "['白', '']"),
        ({"banned": [b"ab"]}, "banned must be a list of words, none of them empty", "[b'ab']"),
        ({"forced": "白日"}, "forced must be a list of words, none of them empty", "'白日'"),
        ({"forced": [""]}, "forced must be a list of words, none of them empty", "['']"),
        (
            {"forced": ["山白日"], "banned": ["依", "白日"]},
            "'山白日' is forced and contains '白日', which is banned. Remove",
            "",
        ),
        ({"logit_bias": {"白日": 1}}, "logit_bias takes single tokens, and '白日' is 2", ""),
        ({"logit_bias": {"": 1}}, "logit_bias takes single tokens, and '' is 0", ""),
        ({"logit_bias": {"龘": 1}}, "logit_bias takes single tokens, and '龘' is 3", ""),
        ({"logit_bias": {V: 1}}, f"Ids of this vocabulary run from 0 to {V - 1}", f"{V} in logit_bias"),
        ({"logit_bias": {-1: 1}}, f"Ids of this vocabulary run from 0 to {V - 1}", "-1 in logit_bias"),
        ({"logit_bias": {"白": NAN}}, "logit_bias must be a number or minus infinity ('白')", "nan"),
        ({"logit_bias": {7: INF}}, "logit_bias must be a number or minus infinity (7)", "inf"),
        ({"logit_bias": dict.fromkeys(range(V), -INF)}, "leave no token to choose, not even the end", ""),
        ({"temprature": 1, "k": 2}, "There is no setting 'k'. The settings are max_new_tokens, stop, seed", ""),
    ],
)
def test_invalid_settings_of_sampling_are_refused(settings, rule, received):
    message = message_of(ValueError, make, **settings)
    assert rule in message
    assert not received or f"got {received}" in message


@pytest.mark.parametrize(
    ("name", "value", "received"),
    [
        ("exempt", None, "None"),
        ("banned", 5, "5"),
        ("forced", 0.5, "0.5"),
        ("logit_bias", None, "None"),
        ("logit_bias", ["白"], "['白']"),
        ("logit_bias", {"白": "1.5"}, "1.5"),
        ("logit_bias", {"白": None}, "None"),
        ("logit_bias", {1.5: 1}, "1.5"),
        ("logit_bias", {None: 1}, "None"),
        ("logit_bias", {"白": 1e39}, "1e+39"),  # infinite in float32
    ],
)
def test_settings_of_sampling_of_a_wrong_type_are_refused(name, value, received):
    message = message_of(ValueError, make, **{name: value})
    assert name in message
    assert received in message.rpartition("got ")[2]


def test_the_bounds_of_a_range_belong_to_it():
    for settings in (
        {"temperature": 0},
        {"top_k": 1},
        {"top_k": 10**6},
        {"top_k": None, "top_p": None, "min_p": None, "typical_p": None, "no_repeat_ngram": None},
        {"top_p": 1, "min_p": 0, "typical_p": 1},
        {"min_p": 1},
        {"repetition_penalty": 0.1, "presence_penalty": -2, "frequency_penalty": 0.0},
        {"no_repeat_ngram": 1},
        {"banned": (), "forced": [], "exempt": set(), "logit_bias": {}},
        {"banned": {"白": 1}, "forced": ("日",), "exempt": frozenset("的")},
        {"logit_bias": {"白": -INF, 0: 0, np.int64(7): np.float32(1)}},
    ):
        probabilities = np.full((1, V), 1 / V, np.float32)
        assert 0 <= make(**settings).sample(np.log(probabilities), np.array([0.5]))[0] < V


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_settings_that_overflow_float32_are_refused(name):
    assert "1000000" in message_of(ValueError, check_sampling, **{name: 1e39})
    bias = {"白": 3.4e38, TOKENIZER.encode("白")[0]: 3.4e38}
    assert "add up to infinity" in message_of(ValueError, make, logit_bias=bias)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0.*, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0.*, got nan"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1.*, got 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1.*, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1.*, got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 0, got 1.5"),
        ({"nonsense": 1}, "There is no setting 'nonsense'. The settings are max_new_tokens, .*logit_bias"),
    ],
)
def test_invalid_settings_are_refused(tokenizer, settings, message):
    model = table_model(tokenizer, {})
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(model, tokenizer, "白", **settings)
    with pytest.raises(ValueError, match="same vocabulary size"):
        generate(model, Tokenizer.train(["白日依"]), "白")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"best_of": 0}, "best_of must be a whole number of at least 1, got 0."),
        ({"best_of": 1.5}, "best_of must be a whole number of at least 1, got 1.5."),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0."),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan."),
        ({"length_penalty": -float("inf")}, "length_penalty must be a finite number, got -inf."),
        ({"length_penalty": 2.0}, "length_penalty ranks the texts of a beam search. Give num_beams > 1 too."),
        (
            {"num_beams": 2, "best_of": 2},
            "num_beams > 1 does not support best_of > 1: a search draws no samples. Give one of them.",
        ),
    ],
)
def test_invalid_settings_of_a_search_are_refused(tokenizer, settings, expected):
    assert message_of(ValueError, generate, table_model(tokenizer, {}), tokenizer, **settings) == expected
    assert message_of(ValueError, generate_batch, table_model(tokenizer, {}), tokenizer, [], **settings) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", "5"),
        ("max_new_tokens", float("nan")),
        ("max_new_tokens", float("inf")),
        ("max_new_tokens", None),
        ("best_of", "2"),
        ("best_of", None),
        ("num_beams", float("inf")),
        ("num_beams", float("nan")),
        ("length_penalty", "1"),
        ("length_penalty", None),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "7"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(tokenizer, name, value):
    message = message_of(ValueError, generate, table_model(tokenizer, {}), tokenizer, **{name: value})
    assert name in message
    assert str(value) in message


def test_a_whole_number_may_be_a_float(tokenizer):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {a: b, b: a})
    for settings in (
        {"max_new_tokens": 5},
        {"max_new_tokens": 5, "top_k": 2},
        {"max_new_tokens": 5, "no_repeat_ngram": 2},
        {"max_new_tokens": 5, "best_of": 2},
        {"max_new_tokens": 5, "num_beams": 2},
    ):
        for kind in (float, np.float32, np.int64):
            other = {name: kind(value) for name, value in settings.items()}
            expected = generate(model, tokenizer, "白", seed=1, **settings)
            assert generate(model, tokenizer, "白", seed=np.int64(1), **other) == expected


@pytest.mark.parametrize(
    ("name", "meant"), [("max_tokens", "max_new_tokens"), ("topp", "top_p"), ("stops", "stop"), ("beams", "num_beams")]
)
def test_a_misspelt_setting_is_corrected(tokenizer, name, meant):
    message = message_of(ValueError, generate, table_model(tokenizer, {}), tokenizer, **{name: 1})
    assert f"There is no setting '{name}'. Did you mean {meant}?" in message


def test_a_stop_string_within_a_forced_word_is_refused(tokenizer):
    model = table_model(tokenizer, {})
    message = message_of(ValueError, generate, model, tokenizer, forced=["白日"], stop="日")
    assert message == "'白日' is forced and contains the stop string '日'. Remove one of them."
    for stop in ("", [""], [3], 3):
        assert "stop must be" in message_of(ValueError, generate, model, tokenizer, stop=stop)


@pytest.mark.parametrize("name", ["top_k", "no_repeat_ngram", "temperature", "best_of", "length_penalty", "seed"])
def test_a_number_too_large_for_a_float_is_refused(tokenizer, name):
    assert name in message_of(ValueError, generate, table_model(tokenizer, {}), tokenizer, **{name: 10**400})


@pytest.mark.parametrize("function", [generate, lambda *args, **settings: "".join(stream(*args, **settings))])
def test_stop_strings_may_come_from_an_iterator(tokenizer, function):
    white, sun, hill = map(tokenizer.piece_id, "白日山")
    model = table_model(tokenizer, {tokenizer.BOS: white, white: sun, sun: hill, hill: white})
    settings = {"forced": ["白", "日"], "temperature": 0, "max_new_tokens": 9}
    assert function(model, tokenizer, stop=iter(["龘", "山"]), **settings) == "白日"
    for stop in ("日", ["龘", "日"]):
        message = message_of(ValueError, function, model, tokenizer, stop=iter(stop), **settings)
        assert message == "'日' is forced and contains the stop string '日'. Remove one of them."


def test_a_temperature_too_low_to_tell_from_0_is_0():
    for temperature in (0, 1e-7, 5e-324):
        assert check_sampling(temperature=temperature).temperature == 0
    assert check_sampling(temperature=1e-6).temperature == 1e-6
