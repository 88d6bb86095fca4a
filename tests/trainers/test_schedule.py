import math

import pytest

from trainwright.configs.schema import OptimConfig
from trainwright.trainers.schedule import learning_rate


def rates(steps: int = 100, **options) -> list[float]:
    optim = OptimConfig(lr=1.0, min_lr=0.1, **options)
    return [learning_rate(optim, steps, step) for step in range(1, steps + 1)]


def test_warm_up_is_linear_and_reaches_the_peak():
    assert rates(warmup_steps=10)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_the_first_step_without_warm_up_is_near_the_peak():
    assert rates()[0] == pytest.approx(1.0, abs=1e-3)


def test_cosine_ends_at_the_minimum_and_is_half_way_in_the_middle():
    curve = rates(warmup_steps=20, constant_steps=20)
    assert curve[19:40] == [1.0] * 21
    assert curve[69] == pytest.approx(0.55)
    assert curve[-1] == pytest.approx(0.1)
    assert curve[54] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_linear_and_constant():
    assert rates(schedule="linear")[49] == pytest.approx(0.55)
    assert set(rates(schedule="constant")) == {1.0}


def test_the_minimum_is_kept_after_decay_steps():
    assert rates(decay_steps=50)[49:] == pytest.approx([0.1] * 51)


def test_without_an_end_there_is_no_decay():
    assert learning_rate(OptimConfig(lr=1.0), None, 10**6) == 1.0
