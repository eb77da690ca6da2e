"""The learning rate is a function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit import TrainConfig
from lorafit.training.optim import lr_at

schedules = st.sampled_from(["constant", "linear", "cosine"])


@given(schedules, st.integers(1, 500), st.floats(0, 0.9))
def test_rises_to_the_peak_and_never_above_it(schedule: str, steps: int, warmup: float) -> None:
    config = TrainConfig(lr=0.5, schedule=schedule, warmup=warmup)
    rates = [lr_at(step, steps, config) for step in range(steps)]
    peak = round(warmup * steps)
    assert all(0 < rate <= 0.5 * (1 + 1e-12) for rate in rates)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if peak < steps:
        assert rates[peak] == pytest.approx(0.5)


def test_the_shapes() -> None:
    def at(step: int, **settings: object) -> float:
        return lr_at(step, 100, TrainConfig(lr=1.0, warmup=0, **settings))

    assert at(50, schedule="linear") == pytest.approx(0.5)
    assert at(50, schedule="cosine") == pytest.approx(0.5)
    assert at(25, schedule="cosine") == pytest.approx((1 + 2**-0.5) / 2)
    assert at(99, schedule="constant") == 1.0


def test_warmup_of_one_or_more_counts_steps() -> None:
    config = TrainConfig(lr=1.0, warmup=10, schedule="constant")
    assert lr_at(4, 1000, config) == pytest.approx(0.5)
    assert lr_at(10, 1000, config) == 1.0
