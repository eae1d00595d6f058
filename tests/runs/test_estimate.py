import random

import pytest
from conftest import message_of

from aigc_tf import estimate, memory_warning
from aigc_tf.models.networks import build
from aigc_tf.runs import estimate as estimate_module
from aigc_tf.runs import measurement

RUN = {"vocab_size": 500, "context": 12, "batch_size": 4, "steps": 100}


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("transformer", {}),
        ("transformer", {"num_layers": 3, "num_heads": 2, "hidden_dim": 24}),
        ("transformer", {"size": "small", "num_layers": 1}),
        ("lstm", {}),
        ("lstm", {"num_layers": 3, "hidden_dim": 24}),
        ("lstm", {"size": "small", "num_layers": 2}),
    ],
)
def test_parameters_are_those_of_the_model(model, settings):
    figures = estimate(model, **RUN, **settings, seconds=0)
    assert figures["parameters"] == build(model, 500, 12, **settings).count_params()


def test_operations_counted_by_hand():
    # Per token, two for each weight of: attention 4 x 8 x 8, MLP 2 x 8 x 32, head 500 x 8; and QK^T and its
    # product with V over 12 positions.
    figures = estimate("transformer", **RUN, num_layers=1, num_heads=1, hidden_dim=8, seconds=0)
    assert figures["forward_flops_per_token"] == 2 * (4 * 64 + 2 * 8 * 32 + 500 * 8) + 2 * 2 * 12 * 8
    # Four gates from 4 inputs and 8 of the state, from 8 to 4, head 500 x 4.
    lstm = estimate("lstm", **RUN, num_layers=1, hidden_dim=8, seconds=0)
    assert lstm["forward_flops_per_token"] == 2 * (4 * 8 * (4 + 8) + 8 * 4 + 500 * 4)
    assert lstm["train_flops"] == 3 * lstm["forward_flops_per_token"] * 100 * 4 * 12


def test_memory_adds_up_and_half_precision_halves_the_cache():
    figures = estimate(**RUN, seconds=0)
    parts = ("weights", "gradients", "optimizer", "activations", "overhead", "runtime")
    assert figures["peak_memory_bytes"] == sum(figures[f"{part}_bytes"] for part in parts)
    assert figures["optimizer_bytes"] == 2 * figures["weights_bytes"] == 8 * figures["parameters"]
    assert figures["generation_bytes_per_text"] == 2 * 2 * 12 * 128 * 4  # keys and values, layers, T, D, float32
    half = estimate(**RUN, seconds=0, precision="mixed_bfloat16")
    assert half["generation_bytes_per_text"] == figures["generation_bytes_per_text"] / 2
    assert half["weights_bytes"] == figures["weights_bytes"]


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_more_of_anything_needs_more_memory(model):
    def peak(**changes):
        figures = estimate(model, **{**RUN, **changes}, seconds=0)
        return figures["peak_memory_bytes"] - figures["runtime_bytes"]

    changes = ({"batch_size": 8}, {"context": 24}, {"vocab_size": 900}, {"num_layers": 5}, {"hidden_dim": 640})
    assert all(peak(**change) > peak() for change in changes)
    assert peak(size="base") > peak(size="small") > peak()


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_the_measurement_gives_time_and_energy(model):
    figures = estimate(model, **RUN, num_layers=1, hidden_dim=16, seconds=0.3, watts=50)
    assert figures["num_candidates"] == 500 // 8
    assert figures["step_seconds"] > 0
    assert figures["tokens_per_second"] == pytest.approx(4 * 12 / figures["step_seconds"])
    assert figures["hours"] == pytest.approx(figures["step_seconds"] * 100 / 3600)
    assert figures["kilowatt_hours"] == pytest.approx(figures["hours"] * 50 / 1000)


def test_hours_count_validations_and_memory_what_is_counted():
    small = {"num_layers": 1, "num_heads": 1, "hidden_dim": 8, "seconds": 0.1}
    figures = estimate(**RUN, **small, valid_tokens=500, validations=3)
    assert figures["validation_hours"] > 0
    seconds = figures["step_seconds"] * 100
    assert figures["hours"] == pytest.approx(seconds / 3600 + figures["validation_hours"])
    peaks = [estimate(**RUN, train_tokens=n, seconds=0)["peak_memory_bytes"] for n in (0, 10**7, 10**9)]
    assert peaks[0] < peaks[1] == pytest.approx(peaks[2], rel=0.1)


def test_time_and_energy_follow_from_what_is_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(
        estimate_module, "seconds_and_watts_of_steps", lambda *args: measured.append(args[-2]) or (0.5, 30.0)
    )
    monkeypatch.setattr(estimate_module, "seconds_per_evaluated_token", lambda *args: 1e-3)
    small = {**RUN, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "validations": 3, "num_candidates": 99}
    for valid_tokens, evaluated in ((0, 0), (500, 4 * 500), (10**6 - 1, 3 * 200_000 + 10**6 - 1), (10**9, 16 * 10**5)):
        figures = estimate(**small, valid_tokens=valid_tokens)
        assert figures["validation_hours"] * 3600 == pytest.approx(evaluated * 1e-3)
        assert figures["hours"] * 3600 == pytest.approx(100 * 0.5 + evaluated * 1e-3)
        assert figures["watts"] == 30
    assert estimate(**small, watts=50)["watts"] == 50
    assert {*measured} == {99}


def test_a_measurement_changes_nothing_for_what_comes_after():
    from aigc_tf.runtime.backend import keras

    before = random.getstate()
    estimate(**RUN, num_layers=1, num_heads=1, hidden_dim=8, seconds=0.1, precision="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    assert random.getstate() == before


def test_without_power_there_is_no_energy(monkeypatch):
    monkeypatch.setattr(measurement, "processor_joules", lambda: None)
    monkeypatch.setattr(measurement, "gpu_watts", lambda: None)
    figures = estimate(**RUN, num_layers=1, num_heads=1, hidden_dim=8, seconds=0.1)
    assert "hours" in figures
    assert not {"watts", "kilowatt_hours"} & set(figures)


def test_the_warning_names_a_change_that_helps():
    assert memory_warning(**RUN) == ""
    too_large = {"vocab_size": 20_000, "context": 1024, "batch_size": 4096, "steps": 1}
    warning = memory_warning("transformer", "base", **too_large)
    batch_size = int(warning.removesuffix(".").split()[-1])
    assert f"It would fit with batch_size {batch_size}." in warning
    assert memory_warning("transformer", "base", **{**too_large, "batch_size": batch_size}) == ""
    assert "tokens_per_second" not in estimate("transformer", "base", **too_large, seconds=5)
    deep = {"num_layers": 2000, "hidden_dim": 1200, "num_heads": 12}
    assert "It would fit with size" in memory_warning("transformer", "base", **{**too_large, "batch_size": 1}, **deep)
    assert "more memory" in memory_warning("lstm", **{**too_large, "vocab_size": 10**12})


def test_a_training_that_needs_more_than_the_free_memory_is_warned_of(monkeypatch):
    monkeypatch.setattr(estimate_module, "available_bytes", lambda: 4000 * 1024)
    assert estimate(**RUN, seconds=0)["available_memory_bytes"] == 4000 * 1024
    assert "This training needs about" in memory_warning(**RUN)


def test_what_the_process_holds_already_is_part_of_the_peak_and_needs_no_free_memory(monkeypatch):
    figures = estimate(**RUN, seconds=0)
    alone = figures["peak_memory_bytes"] - figures["runtime_bytes"]
    monkeypatch.setattr(estimate_module, "process_bytes", lambda: 8 * alone)
    monkeypatch.setattr(estimate_module, "available_bytes", lambda: 1.01 * alone)
    assert memory_warning(**RUN) == ""
    counted = estimate(**RUN, seconds=0, train_tokens=10**7)
    assert counted["peak_memory_bytes"] == 118 * 10**7 + counted["weights_bytes"] + 8 * alone


def test_where_no_memory_is_reported_there_is_no_warning_and_no_error(monkeypatch):
    for name in ("available_bytes", "process_bytes"):
        monkeypatch.setattr(estimate_module, name, lambda: None)
    assert memory_warning("transformer", "base", **{**RUN, "batch_size": 10**6}) == ""
    figures = estimate(**RUN, num_layers=1, num_heads=1, hidden_dim=8, seconds=0.1)
    assert "available_memory_bytes" not in figures
    assert figures["runtime_bytes"] == 0
    assert figures["hours"] > 0


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"model": "rnn"}, "model must be one of"),
        ({"size": "huge"}, "size must be one of tiny, small, base"),
        ({"model": "lstm", "num_heads": 2}, "num_heads is for a Transformer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"precision": "int8"}, "precision must be"),
        ({"num_candidates": 47}, "num_candidates must be 0, or from 48"),
        ({"seconds": -1}, "seconds must be at least 0"),
        ({"watts": 0}, "watts above 0"),
    ],
)
def test_invalid_settings_are_refused(wrong, part):
    assert part in message_of(ValueError, estimate, **{**RUN, "seconds": 0, **wrong})
