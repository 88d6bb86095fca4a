"""What a row of numbers is judged to be."""

import math
from collections.abc import Sequence

import pytest

from trainwright.configs.schema import StabilityConfig
from trainwright.trainers.stability import Judgement, Monitor, Spike

NAN = math.nan


def judge(
    norms: Sequence[float],
    params: Sequence[float] | None = None,
    warmup: int = 0,
    rollbacks_left: int = 3,
    **config: object,
) -> dict[int, Judgement]:
    """By step, what there was to say of so many steps; a norm that is NaN comes with a loss that is."""
    monitor = Monitor(StabilityConfig(**config), warmup, rollbacks_left)
    params = params or [50.0] * len(norms)
    looked = {
        step: monitor.look(step, 2.0 + 0 * norm, norm, param)
        for step, (norm, param) in enumerate(zip(norms, params, strict=True), start=1)
    }
    return {step: judged for step, judged in looked.items() if judged.findings or judged.ended}


def spikes(judged: dict[int, Judgement]) -> list[Spike]:
    return [one.ended for one in judged.values() if one.ended]


def findings(judged: dict[int, Judgement]) -> list[tuple[int, str, str, int]]:
    return [(step, f.kind, f.answer, f.began) for step, one in judged.items() for f in one.findings]


def test_a_spike_is_above_the_running_mean_of_20_steps_and_a_tenth():
    calm = [1.0 + 0.04 * (-1) ** step for step in range(20)]  # r = 1
    judged = judge([*calm, 1.0999, *calm[:3], 1.11, 1.5, 1.2, 1.0])
    (spike,) = spikes(judged)
    assert (spike.began, spike.length, spike.height) == (25, 3, 1.5)
    assert spike.mean == pytest.approx(
        (20.0 + 1.0999 - 1.04 - 0.96 - 1.04 + sum(calm[:3]) - 0.96) / 20, abs=3e-3
    )
    assert list(judged) == [28]  # it is told of when it is over


def test_the_first_steps_are_no_spikes():
    assert not judge([float(20 - step) for step in range(19)] + [90.0])


def test_steps_that_spike_stay_out_of_the_mean():
    """With them in it, r would be 2.35 after the third and the last but one no spike."""
    (spike,) = spikes(judge([1.0] * 20 + [10.0, 10.0, 10.0, 2.3, 1.0]))
    assert spike.length == 4


def test_the_relative_margin_counts_where_it_is_the_larger():
    norms = [4.0] * 20 + [5.9, 6.2, 4.0]
    assert [spike.began for spike in spikes(judge(norms, relative_margin=0.5))] == [22]
    assert [spike.began for spike in spikes(judge(norms, relative_margin=0.01))] == [21]


def test_a_level_that_stays_is_a_persistent_spike_and_then_the_new_one():
    judged = judge([1.0] * 20 + [2.0] * 60, persistent=10)
    assert findings(judged) == [(31, "persistent", "warn", 21)]
    (spike,) = spikes(judged)
    # From its 11th step on it enters r, which is 2 - 0.1 when two of the 20 old steps are left.
    assert (spike.began, spike.length) == (21, 28)


@pytest.mark.parametrize("answer", ["skip", "rollback", "stop"])
def test_a_spike_is_answered_at_once(answer: str):
    judged = judge([1.0] * 20 + [3.0, 3.0, 1.0], on_spike=answer)
    assert findings(judged) == [(21, "spike", answer, 21), (22, "spike", answer, 21)]
    assert judged[21].skip == (answer == "skip")
    worst = judged[21].worst
    assert worst is not None
    assert "step 21 has gradient norm 3 and the running mean was 1" in worst.said


def test_a_spike_that_persists_is_no_longer_skipped():
    judged = judge([1.0] * 20 + [3.0] * 12, on_spike="skip", on_persistent="stop", persistent=10)
    assert [step for step, one in judged.items() if one.skip] == list(range(21, 31))
    assert judged[31].worst is not None
    assert judged[31].worst.answer == "stop"
    assert 32 not in judged


def test_numbers_that_are_not_finite_are_answered_from_the_first_step_on():
    for answer in ("stop", "skip", "rollback"):
        assert findings(judge([1.0, NAN], on_nonfinite=answer)) == [(2, "nonfinite", answer, 2)]
    (spike,) = spikes(judge([1.0, NAN, 1.0], on_nonfinite="skip"))
    assert (spike.began, spike.length, spike.mean) == (2, 1, None)


def test_what_skipping_cannot_help_is_a_stop():
    broken = judge([1.0] * 3, [50.0, 50.0, NAN], on_nonfinite="skip")
    assert findings(broken) == [(3, "nonfinite", "stop", 2)]  # the update of the step before has done it
    endless = judge([1.0] * 20 + [NAN] * 6, on_nonfinite="skip", persistent=5, on_persistent="warn")
    assert [f[2] for f in findings(endless) if f[1] == "nonfinite"] == ["skip"] * 5 + ["stop"]


def test_the_strongest_answer_counts():
    judged = judge([1.0] * 20 + [NAN] * 6, on_nonfinite="rollback", persistent=5)
    assert [f.answer for f in judged[26].findings] == ["rollback", "warn"]
    assert judged[26].worst == judged[26].findings[0]


def test_a_rollback_goes_to_before_the_spike_in_which_the_numbers_broke():
    judged = judge([1.0] * 20 + [3.0, 9.0, math.inf], on_nonfinite="rollback")
    assert findings(judged) == [(23, "nonfinite", "rollback", 21)]


def test_when_all_rollbacks_are_used_up_it_is_a_stop():
    judged = judge([1.0] * 20 + [3.0], on_spike="rollback", rollbacks_left=0)
    assert findings(judged) == [(21, "rollbacks", "stop", 21)]
    assert judged[21].worst is not None
    assert "rolled back stability.rollbacks=3 times" in judged[21].worst.said


def test_a_mean_that_rises_to_three_times_its_lowest_is_found_once():
    down = [8 - 0.05 * step for step in range(140)]  # to 1.05
    up = [1.05 + 0.09 * step for step in range(60)]
    judged = judge([*down, *up], warmup=20, on_rise="stop", margin=100.0)
    ((step, kind, answer, _),) = findings(judged)
    assert (kind, answer) == ("rise", "stop")
    lowest = min(sum([*down, *up][end - 20 : end]) / 20 for end in range(41, 201))
    assert sum([*down, *up][step - 20 : step]) / 20 > 3 * lowest
    assert sum([*down, *up][step - 21 : step - 1]) / 20 <= 3 * lowest


def test_what_was_low_in_the_warm_up_does_not_count():
    norms = [0.3 + 0.02 * step for step in range(40)] + [2.5] * 60
    assert not judge(norms, warmup=40, margin=100.0)
    assert findings(judge(norms, warmup=5, margin=100.0))


def walk(*paces: tuple[int, float]) -> list[float]:
    norms = [50.0]
    for steps, pace in paces:
        for _ in range(steps):
            norms.append(norms[-1] * (1 + pace))
    return norms


@pytest.mark.parametrize("sign", [1, -1])
def test_a_parameter_norm_that_moves_three_times_as_fast_drifts(sign: int):
    params = walk((220, sign * 1e-3), (60, sign * 3.2e-3))
    judged = judge([1.0] * len(params), params)
    ((step, kind, answer, _),) = findings(judged)
    assert (kind, answer) == ("drift", "warn")
    assert 221 < step <= 261
    assert not judge([1.0] * len(params), walk((220, 1e-3), (60, 2.8e-3)))


def test_a_drift_is_told_in_numbers_that_show_it():
    judged = judge([1.0] * 281, walk((220, 1e-6), (60, 5e-6)))
    (finding,) = [finding for one in judged.values() for finding in one.findings]
    assert "at step 241 the parameter norm moves by 5e-06 of itself a step, 1e-06 was usual" in finding.said


def test_the_last_digit_of_a_norm_that_stands_still_is_no_drift():
    last_digit = 50.0 * (1 + 2.0**-23)
    params = [50.0] * 220 + [last_digit] * 60
    assert not judge([1.0] * len(params), params)
    assert not judge([1.0] * len(params), [50.0] * 220 + [50.0, last_digit] * 30)
    assert findings(judge([1.0] * len(params), [50.0] * 220 + [50.0, 50.0 * (1 + 1e-6)] * 30))


def test_a_pace_that_grows_slowly_is_found_too():
    params = walk(*((20, 1e-4 * 1.1**stretch) for stretch in range(30)))
    ((step, kind, _, _),) = findings(judge([1.0] * len(params), params))
    assert kind == "drift"
    assert 440 < step < 520  # 1.1 ** (n / 2) is 3 after 23 stretches


def test_a_parameter_norm_that_turns_round_does_not_drift():
    """Its pace is a mean of sizes: their sum is zero at the turn, and after it 30 times as much."""
    noise = [2e-4 * (-1) ** step for step in range(400)]
    params = [50.0]
    for step in range(400):
        params.append(params[-1] * (1 + noise[step] + 1.5e-6 * (200 - step)))
    assert not judge([1.0] * len(params), params)


def test_what_a_warm_up_and_spikes_move_is_not_the_usual_pace():
    params = walk((60, 1e-5), (200, 1e-3))
    assert not judge([1.0] * len(params), params, warmup=60)
    params = walk((220, 1e-3), (1, 0.5), (30, 1e-3))
    assert not findings(judge([1.0] * 220 + [9.0] + [1.0] * 31, params))
    assert findings(judge([1.0] * 252, params))


def test_it_is_known_beforehand_whether_updates_wait():
    def waits(**config: str) -> bool:
        return Monitor(StabilityConfig(**config), 0, 3).skips

    assert not waits()
    assert not waits(on_spike="rollback", on_nonfinite="rollback")
    assert waits(on_spike="skip")
    assert waits(on_nonfinite="skip")
