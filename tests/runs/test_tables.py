from aigc_tf.runs.tables import estimate_table


def test_the_table_of_an_estimate_has_units():
    table = estimate_table({"parameters": 124439808.0, "peak_memory_bytes": 3.21e9, "hours": 1.5, "train_flops": 7e15})
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    assert rows == [
        ["parameters", "124,439,808"],
        ["peak", "memory", "3.21 GB"],
        ["total", "time", "90 min"],
        ["whole", "training", "7 PFLOPs"],
    ]
    assert estimate_table({"weights_bytes": 999_999}).split() == ["weights", "1", "MB"]
    assert estimate_table({"num_candidates": 0.0, "validation_hours": 3.81e-05}).split("\n") == [
        "tokens in the softmax                      all",
        "validation time                         137 ms",
    ]
