"""Learning-rate schedules as pure functions of the step."""

import pytest

from owlore.training.schedule import learning_rate


def rates(schedule, steps=10, warmup=0):
    return [learning_rate(s, peak=1.0, steps=steps, schedule=schedule, warmup=warmup) for s in range(steps)]


def test_linear_starts_at_the_peak_and_falls_evenly():
    assert rates("linear") == pytest.approx([1 - s / 10 for s in range(10)])


def test_cosine_is_half_way_down_in_the_middle():
    assert rates("cosine")[5] == pytest.approx(0.5)


def test_constant_stays_and_an_unknown_schedule_is_refused():
    assert set(rates("constant")) == {1.0}
    with pytest.raises(ValueError, match="linear, cosine, constant"):
        rates("exponential")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_to_the_peak_and_no_step_is_wasted(schedule):
    found = rates(schedule, steps=12, warmup=3)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert min(found) > 0
