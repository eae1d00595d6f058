import pytest

from aigc_tf.training.schedule import WarmupStableDecay


def test_the_learning_rate_warms_up_stays_and_decays():
    schedule = WarmupStableDecay(1e-2, 200)
    rates = [float(schedule(step)) for step in range(200)]
    for steps, expected in [
        ((0, 4, 9), (1e-3, 5e-3, 1e-2)),
        ((10, 100, 139), (1e-2, 1e-2, 1e-2)),
        ((140, 170, 185, 199), (1e-2, 5e-3, 2.5e-3, 1e-2 / 60)),
    ]:
        assert [rates[step] for step in steps] == pytest.approx(expected)
    # Also with too few steps for that.
    for steps in (1, 2, 3):
        assert all(0 < float(WarmupStableDecay(1e-2, steps)(step)) <= 1e-2 for step in range(steps))


def test_all_microbatches_of_a_step_have_its_learning_rate():
    rates, schedule = WarmupStableDecay(1e-2, 200), WarmupStableDecay(1e-2, 200, num_microbatches=3)
    for step in (0, 1, 9, 100, 170, 199):
        assert [float(schedule(3 * step + i)) for i in range(3)] == [float(rates(step))] * 3
