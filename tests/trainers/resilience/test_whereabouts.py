from trainwright.trainers.resilience.whereabouts import Whereabouts


def step(where: Whereabouts, number: int):
    for phase in ("forward_backward", "data", "agree", "update", "observers"):
        where.at(phase, number)


def test_a_run_that_begins_again_may_take_as_long_as_a_start():
    where = Whereabouts()
    for number in (1, 2, 3):
        step(where, number)
    assert len(where.steps) == 2  # the first may compile
    where.begin_again()
    assert (where.now.phase, len(where.steps)) == ("start_up", 0)
    step(where, 2)
    assert not where.steps
    where.at("forward_backward", 3)
    assert len(where.steps) == 1
