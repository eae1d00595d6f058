import json

import pytest
from conftest import message_of

from aigc_tf.runs.trials import keep_best, read_trials, write_trials

SPACE = {"learning_rate": (1e-4, 0.03), "num_layers": (1, 3), "model": ["transformer", "lstm"], "num_heads": [1, 2]}
SETTINGS = {"learning_rate": 0.01, "num_layers": 2, "model": "transformer", "num_heads": 1}
TRIAL = {"trial": 1, "settings": SETTINGS, "bits_per_char": 7.0, "seconds": 1.5, "error": None}
SEARCH = {"documents": "a hash", "seed": 0}


def changed(**settings):
    return {**TRIAL, "settings": {**SETTINGS, **settings}}


def without(*names, **settings):
    return {**TRIAL, "settings": {name: v for name, v in {**SETTINGS, **settings}.items() if name not in names}}


@pytest.mark.parametrize(
    "trial",
    [
        TRIAL,
        {**TRIAL, "bits_per_char": None, "error": "out of memory"},
        changed(learning_rate=1e-4),
        changed(learning_rate=0.03 * (1 + 1e-15)),  # as rounding may propose it at an end
        without("num_heads", model="lstm"),
    ],
)
def test_trials_are_read_as_they_were_written(tmp_path, trial):
    write_trials(tmp_path, SEARCH, [TRIAL, trial])
    assert read_trials(tmp_path, SEARCH, SPACE) == [TRIAL, trial]


WRONG = [
    *(None, 1, [], {}, "trial", {**TRIAL, "more": 1}, {name: v for name, v in TRIAL.items() if name != "error"}),
    *({**TRIAL, "trial": value} for value in ("1", True, 0, 1.0, None)),
    *({**TRIAL, "bits_per_char": value} for value in (None, "7", True, [7.0], float("nan"), 10**400)),
    *({**TRIAL, "seconds": value} for value in (None, "7", False, {}, float("inf"), 10**400)),
    *({**TRIAL, "error": value} for value in ("out of memory", 1, ["out of memory"])),
    *({**TRIAL, "bits_per_char": None, "error": value} for value in (None, "", True)),
    *({**TRIAL, "settings": value} for value in (None, [], "", 1, {}, {"width": 1}, {**SETTINGS, "width": 1})),
    *(changed(learning_rate=value) for value in (0.5, "a", None, True, [0.01], 10**400)),
    *(changed(num_layers=value) for value in (4, 2.0, 2.5, True, "2")),
    *(changed(model=value) for value in ("rnn", ["lstm"], {}, 1)),
    *(changed(num_heads=value) for value in (3, 1.0, True)),
    without("learning_rate"),
    without("num_heads"),
]


@pytest.mark.parametrize("trial", WRONG, ids=lambda trial: str(trial)[:99])
def test_a_trial_that_was_edited_into_another_type_is_refused(tmp_path, trial):
    write_trials(tmp_path, SEARCH, [TRIAL, trial])
    message = message_of(ValueError, read_trials, tmp_path, SEARCH, SPACE)
    assert message == (
        f"{tmp_path / 'trials.json'} is damaged: entry 2 is not a trial of this search. Name another folder."
    )


def test_a_space_in_another_order_is_another_search(tmp_path):
    space = {"dropout": [0.1, 0.2], "model": ["lstm", "transformer"]}  # the order decides what a seed proposes
    write_trials(tmp_path, {**SEARCH, "space": space}, [])
    assert read_trials(tmp_path, {**SEARCH, "space": space}, SPACE) == []
    for other in (dict(reversed(space.items())), {**space, "dropout": [0.2, 0.1]}):
        message = message_of(ValueError, read_trials, tmp_path, {**SEARCH, "space": other}, SPACE)
        assert "differs in space." in message


@pytest.mark.parametrize(
    "content", ["{", "1", "[]", "null", *(json.dumps({**SEARCH, "trials": v}) for v in (1, {}, ""))]
)
def test_a_file_without_a_list_of_trials_is_refused(tmp_path, content):
    (tmp_path / "trials.json").write_text(content)
    assert "trials.json is damaged: " in message_of(ValueError, read_trials, tmp_path, SEARCH, SPACE)


@pytest.mark.parametrize("killed", ["before the old best goes", "while it goes", "before the new one comes"])
def test_wherever_replacing_the_best_run_was_interrupted_the_next_call_completes_it(tmp_path, killed):
    records = [{"trial": 1, "bits_per_char": 8.0, "error": None}, {"trial": 2, "bits_per_char": 7.0, "error": None}]
    (tmp_path / "trial-2").mkdir()
    (tmp_path / "trial-2" / "run.json").write_text("second")
    (tmp_path / "trial-1").mkdir()
    (tmp_path / "trial-3").mkdir()  # unfinished
    if killed != "before the new one comes":
        (tmp_path / "best").mkdir()
        if killed == "before the old best goes":
            (tmp_path / "best" / "run.json").write_text("first")
        (tmp_path / "best" / "model.keras").write_text("first")
    for _ in range(2):
        keep_best(tmp_path, records)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "trial-3"]
        assert [path.name for path in (tmp_path / "best").iterdir()] == ["run.json"]
        assert (tmp_path / "best" / "run.json").read_text() == "second"
