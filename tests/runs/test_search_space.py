from conftest import message_of

from aigc_tf.runs.pipeline import SETTINGS
from aigc_tf.runs.search_space import DEFAULT_SPACE, check_space, parse_space


def test_a_space_is_read_from_a_command_line():
    space, fixed = parse_space(
        "learning_rate=1e-3..1e-2|model = transformer, lstm|steps=300|num_heads=1,2|num_layers=1..4|"
        "dropout=0,.1|user_dict=../words.txt|stopwords=cn|vocab_size=500".split("|")
    )
    assert space == {
        "learning_rate": (1e-3, 1e-2),
        "model": ["transformer", "lstm"],
        "num_heads": [1, 2],
        "num_layers": (1, 4),
        "dropout": [0.0, 0.1],
    }
    assert fixed == {"steps": 300, "user_dict": "../words.txt", "stopwords": "cn", "vocab_size": 500}
    assert parse_space([]) == ({}, {})
    for texts, part in [
        (["steps"], "name=values"),
        (["steps="], "name=values"),
        (["width=3"], "no setting 'width'"),
        (["steps=3", "steps=4..5"], "must be given once"),
        (["steps=many"], "steps must be an integer, got 'many'"),
        (["dropout=0.1,"], "dropout must be a number, got ''"),
        (["learning_rate=1e-3..1e-2..1"], "low..high"),
        (["learning_rate=1e-2..1e-3"], "low <= high"),
    ]:
        assert part in message_of(ValueError, parse_space, texts), texts


def test_the_default_space_is_one_of_settings():
    assert check_space(DEFAULT_SPACE, {}) == DEFAULT_SPACE
    assert set(DEFAULT_SPACE) < set(SETTINGS)
