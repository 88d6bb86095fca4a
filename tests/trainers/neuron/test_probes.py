"""The probes on the stand-in: what they say of the one thing that it does wrong, and of nothing else."""

import pytest

from tests.neuron_device.processes import command, on_stand_in
from tests.ranks import RankPool
from trainwright.configs.compose import load_recipe
from trainwright.trainers.health.probes import FAILED, NONE, OK, PROBES, Outcome, probe_all
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.platform.choose import choose_platform


def probed() -> list[Outcome]:
    recipe = load_recipe(["platform=neuron"])
    platform = choose_platform("neuron")
    with open_ranks(recipe.parallel, platform) as ranks:
        return probe_all(recipe, ranks, platform)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_device_that_makes_inf_finite_in_sums_is_found(run_on_neuron: RankPool, ranks: int):
    sums = NONE if ranks == 1 else FAILED
    for outcomes in run_on_neuron(on_stand_in, ranks, probed):
        assert {one.probe: one.verdict for one in outcomes} == {probe.name: OK for probe in PROBES} | {
            "inf_all_reduce": sums
        }, outcomes
        assert ranks == 1 or outcomes[-1].found == "1.7e+38 -1.7e+38 1 2"


@pytest.mark.slow
def test_the_verb_says_so_and_the_node_stays(tiny: list[str]):
    run = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "trainwright", "health"]
    done = command(*run, *tiny, "platform=neuron")
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'probe=inf_all_reduce verdict=failed found="1.7e+38 -1.7e+38 1 2"\n' in done.stdout
    assert (
        "inf_all_reduce failed on rank 0, 1: a loss or a norm that isn't finite is told by a flag"
        in done.stdout
    )
    assert "probe=parity verdict=ok" in done.stdout
    assert "neuron-ls: skipped (not installed)" in done.stdout
    assert "health=ok probes_failed=1 " in done.stdout
