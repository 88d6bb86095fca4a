"""The probes hold on a CPU, and each fails of a device that does what it asks about."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainwright.cli import main
from trainwright.configs.compose import load_recipe
from trainwright.errors import BadNode, BadRequest, NumericalFailure, RunFailed, TrainwrightError
from trainwright.trainers.health import check, probes
from trainwright.trainers.health.check import examine, require
from trainwright.trainers.health.probes import FAILED, NONE, OK, PROBES, Outcome, probe_all
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

Patch = pytest.MonkeyPatch
WORDS = ["platform=cpu"]


def probed(spoil: Callable[[Patch], None] | None, spoilt: int = 0) -> list[Outcome]:
    """What all ranks found, of which `spoilt` has a device that was tampered with."""
    recipe, platform = load_recipe(WORDS), Cpu()
    with open_ranks(recipe.parallel, platform) as ranks, Patch.context() as patch:
        if spoil and ranks.rank == spoilt:
            spoil(patch)
        return probe_all(recipe, ranks, platform)


def verdicts(outcomes: list[Outcome]) -> dict[str, str]:
    return {one.probe: one.verdict for one in outcomes}


ALL_WELL = {probe.name: OK for probe in PROBES}


def test_one_process_has_no_sum_to_ask_for():
    assert verdicts(probed(None)) == ALL_WELL | {"inf_all_reduce": NONE}


@pytest.mark.parametrize("ranks", [2, 4])
def test_they_hold_on_a_cpu(run_on_ranks, ranks: int):
    for outcomes in run_on_ranks(probed, ranks, None):
        assert verdicts(outcomes) == ALL_WELL
        found = {one.probe: one.found for one in outcomes}
        assert found["stochastic_rounding"] == "1024 and 2048 times 0.5 make 1024: rounded to nearest"
        assert found["inf_all_reduce"] == f"inf -inf nan {ranks}"
        assert re.fullmatch(r"whole off by \S+ mesh off by \S+", found["norm_2d"])
        assert all(one.ranks == () for one in outcomes)


def saturate(patch: Patch) -> None:
    """As a compiler may: what isn't finite arrives as the largest number, or as 0."""
    right = Ranks.sum

    def wrong(self: Ranks, numbers: torch.Tensor) -> torch.Tensor:
        return torch.nan_to_num(right(self, numbers))

    patch.setattr(Ranks, "sum", wrong)


def round_by_chance(patch: Patch) -> None:
    """A device that rounds so, on average."""
    patch.setattr(probes, "ADDED", 1.0)


def miscount(patch: Patch) -> None:
    right = probes.sum_of_squares
    patch.setattr(probes, "sum_of_squares", lambda *args: right(*args) * 1.001)


def multiply_wrong(patch: Patch) -> None:
    """A device whose steps are off in the third digit."""
    right = probes._step

    def wrong(platform: Cpu) -> tuple[float, float, float]:
        loss, grad_norm, after = right(platform)
        return (loss, grad_norm, after) if type(platform) is not Cpu else (loss, grad_norm * 1.003, after)

    patch.setattr(probes, "_step", wrong)
    patch.setattr(probes, "Cpu", type("Other", (Cpu,), {}))


def refuse(patch: Patch) -> None:
    def refused(platform: Cpu) -> Any:
        raise RuntimeError("operator not implemented\nfor this device")

    patch.setattr(probes, "_step", refused)


@pytest.mark.parametrize(
    ("spoil", "probe", "found"),
    [
        (saturate, "inf_all_reduce", r"3\.4e\+38 -3\.4e\+38 0 2"),
        (round_by_chance, "stochastic_rounding", r".* make 2048: rounded stochastically"),
        (miscount, "norm_2d", r"whole off by \S+ mesh off by 2\.\de-04"),
        (multiply_wrong, "parity", r"loss \S+ off by 0\.0e\+00 grad_norm \S+ off by 3\.0e-03 .*"),
        (refuse, "parity", r"RuntimeError: operator not implemented for this device"),
    ],
)
def test_the_rank_that_fails_is_named(run_on_ranks, spoil: Callable[[Patch], None], probe: str, found: str):
    for outcomes in run_on_ranks(probed, 2, spoil, 1):
        (failed,) = (one for one in outcomes if one.verdict == FAILED and 1 in one.ranks)
        assert (failed.probe, failed.ranks) == (probe, (1,) if probe != "norm_2d" else failed.ranks)
        assert re.fullmatch(found, failed.found), failed.found


def refuse_a_mesh(patch: Patch) -> None:
    """A device that fails before the ranks come together."""

    def refused(tensors: Any, device: Any) -> Any:
        raise RuntimeError("operator not implemented")

    patch.setattr(probes, "sum_of_squares", refused)


def test_ranks_do_not_wait_for_one_that_cannot_come(run_on_ranks):
    for outcomes in run_on_ranks(probed, 2, refuse_a_mesh, 1):
        (failed,) = (one for one in outcomes if one.probe == "norm_2d")
        assert (failed.verdict, failed.ranks) == (FAILED, (1,))
        assert failed.found == "RuntimeError: operator not implemented"


@pytest.mark.parametrize(
    ("says", "ends"),
    [
        ("NEFF version mismatch", BadRequest),
        ("NRT_RESOURCE", BadRequest),
        ("NRT_LOAD_NOT_ENOUGH_NC", RunFailed),
        ("NRT_EXEC_COMPLETED_WITH_NUM_ERR", NumericalFailure),
        ("NRT_EXEC_HW_ERR_NC_UE", BadNode),
        ("who knows", BadNode),
    ],
)
@pytest.mark.parametrize("where", ["product", "parity"])
def test_only_what_another_node_would_mend_makes_one_bad(
    says: str, ends: type[TrainwrightError], where: str, monkeypatch: Patch
):
    def broken(platform: Cpu) -> Any:
        raise RuntimeError(says)

    monkeypatch.setattr(Cpu, "failures", NEURON_ERRORS)
    monkeypatch.setattr(
        probes if where == "parity" else check, "_step" if where == "parity" else "products", broken
    )
    with pytest.raises(TrainwrightError) as caught:
        require(examine(load_recipe(WORDS), Ranks(), Cpu(), thorough=True), Ranks())
    assert type(caught.value) is ends


def test_a_nan_that_was_brought_is_an_answer(monkeypatch: Patch):
    def told(recipe: Any, ranks: Any, platform: Any) -> Any:
        raise RuntimeError("NRT_EXEC_COMPLETED_WITH_NUM_ERR")

    monkeypatch.setattr(Cpu, "failures", NEURON_ERRORS)
    monkeypatch.setattr(probes, "PROBES", (PROBES[-1]._replace(ask=told),))
    (outcome,) = probe_all(load_recipe(WORDS), Ranks(), Cpu())
    assert outcome.verdict == FAILED


def test_the_nan_comes_last():
    assert PROBES[-1].name == "inf_all_reduce"


def test_a_recipe_that_wants_hardware_to_round_is_told_that_it_does_not():
    recipe = load_recipe(["platform=neuron", "precision=bf16_sr", "precision.rounding=hardware"])
    (outcome,) = (one for one in probe_all(recipe, Ranks(), Cpu()) if one.probe == "stochastic_rounding")
    assert outcome.verdict == FAILED
    assert "use precision.rounding=optimizer" in outcome.touches


def test_only_parity_makes_a_node_bad(monkeypatch: Patch):
    round_by_chance(monkeypatch)
    miscount(monkeypatch)
    found = examine(load_recipe(WORDS), Ranks(), Cpu(), thorough=True)
    assert found.bad_nodes() == {}
    refuse(monkeypatch)
    found = examine(load_recipe(WORDS), Ranks(), Cpu(), thorough=True)
    (said,) = found.bad_nodes().values()
    assert said == "rank 0 fails the probe parity (RuntimeError: operator not implemented for this device)"
    assert examine(load_recipe(WORDS), Ranks(), Cpu()).bad_nodes() == {}


def test_the_verb_shows_them(monkeypatch: Patch, capsys: pytest.CaptureFixture[str], tmp_path):
    round_by_chance(monkeypatch)
    assert main(["health", *WORDS, f"run.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert 'probe=inf_all_reduce verdict=none found="one process"\n' in printed
    assert re.search(
        r'^probe=stochastic_rounding verdict=failed found="1024 and .* stochastically"$', printed, re.M
    )
    assert "\nstochastic_rounding failed on rank 0: precision.rounding=hardware relies on it" in printed
    assert re.search(r"^health=ok probes_failed=1 seconds=", printed, re.M)
