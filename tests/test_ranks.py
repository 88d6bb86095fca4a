import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.ranks import UNANSWERED, RankFailed, RankPool, as_under_torchrun, torchrun_variables


def rank_and(*args, **kwargs):
    return int(os.environ["RANK"]), args, kwargs


def all_reduced():
    dist.init_process_group("gloo")
    number = torch.tensor(10.0 ** dist.get_rank())
    dist.all_reduce(number)
    return number.item()  # the group is left for the pool to destroy


def one_raises_and_the_others_wait(which):
    dist.init_process_group("gloo")
    print("hello from", dist.get_rank())
    if dist.get_rank() == which:
        raise LookupError("the cause")
    dist.barrier()


def raises_and_leaves_slowly():
    """Rank 1 raises first, but rank 0 has lost it before rank 1's exception comes out."""
    dist.init_process_group("gloo")
    try:
        if dist.get_rank() == 1:
            raise LookupError("the cause")
        dist.barrier()
    finally:
        dist.destroy_process_group()
        if os.environ["RANK"] == "1":
            time.sleep(0.5)


def one_exits(which):
    dist.init_process_group("gloo")
    if dist.get_rank() == which:
        print("last words")
        os._exit(3)
    dist.barrier()


def one_sleeps(which):
    if int(os.environ["RANK"]) == which:
        time.sleep(600)


def system_exit():
    print("to stderr", file=sys.stderr)
    raise SystemExit(2)


def leaves_traces(folder):
    os.environ["LEFT_BEHIND"] = "yes"
    os.chdir(folder)
    dist.init_process_group("gloo")


def traces():
    return os.environ.get("LEFT_BEHIND"), os.getcwd(), dist.is_initialized()


def sum_on_a_mesh(*groups_before):
    """A matrix product that gathers, on the inner axis of a mesh of 2 x 2."""
    dist.init_process_group("gloo")
    for ranks in groups_before:
        dist.new_group(ranks)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    matrix = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)])
    return (matrix @ matrix.T).full_tensor().sum().item()


def works(run_on_ranks):
    return run_on_ranks(all_reduced, 2) == [11.0, 11.0]


def test_nothing_starts_before_it_is_needed():
    before = multiprocessing.active_children()
    RankPool().close()
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize(("ranks", "total"), [(2, 11.0), (3, 111.0), (4, 1111.0), (1, 1.0)])
def test_all_reduce(run_on_ranks, ranks, total):
    assert run_on_ranks(all_reduced, ranks) == [total] * ranks


def test_results_are_by_rank_and_arguments_arrive(run_on_ranks):
    tensor = torch.arange(3)
    for rank, (own, args, kwargs) in enumerate(run_on_ranks(rank_and, 3, "a", t=tensor)):
        assert own == rank
        assert args == ("a",)
        assert torch.equal(kwargs["t"], tensor)


def test_many_cases_go_to_the_same_workers(run_on_ranks):
    pids = run_on_ranks(os.getpid, 4)
    for _ in range(20):
        assert run_on_ranks(os.getpid, 4) == pids
    assert len({*pids, os.getpid()}) == 5


def test_a_case_leaves_nothing_to_the_next(run_on_ranks, tmp_path):
    run_on_ranks(leaves_traces, 2, tmp_path)
    assert run_on_ranks(traces, 2) == [(None, os.getcwd(), False)] * 2


def test_a_case_sees_the_tests_environment_and_folder(run_on_ranks, monkeypatch, tmp_path):
    monkeypatch.setenv("LEFT_BEHIND", "by the test")
    monkeypatch.chdir(tmp_path)
    assert run_on_ranks(traces, 1) == [("by the test", str(tmp_path), False)]


def test_torchruns_variables_are_taken_away(tmp_path):
    variables, folder = torchrun_variables(1, 2, 29500), Path.cwd()
    before = {name: os.environ.get(name) for name in variables}
    with as_under_torchrun(os.environ | variables, str(tmp_path)):
        assert os.environ["LOCAL_RANK"] == "1"
        assert Path.cwd() == tmp_path
    assert {name: os.environ.get(name) for name in variables} == before
    assert Path.cwd() == folder


def test_a_mesh_does_not_meet_the_groups_of_an_earlier_one(run_on_ranks):
    # DTensor's caches keep a mesh and find it again for one that is equal, though its groups have other names.
    for groups_before in ([], [[0, 1]], []):
        assert run_on_ranks(sum_on_a_mesh, 4, *groups_before) == [400.0] * 4


def test_the_rank_that_raised_is_named_while_another_waits(run_on_ranks):
    with pytest.raises(RankFailed) as caught:
        run_on_ranks(one_raises_and_the_others_wait, 2, 1)
    said = str(caught.value)
    assert said.startswith("rank 1 of 2 failed first: LookupError: the cause\nTraceback")
    assert "\nrank 0 failed too: " in said
    assert "\n---- rank 0, stdout ----\nhello from 0\n---- rank 1, stdout ----\nhello from 1" in said
    assert works(run_on_ranks)


def test_the_cause_is_named_even_if_it_is_told_last(run_on_ranks):
    outcomes = run_on_ranks.outcomes(raises_and_leaves_slowly, 2)
    assert outcomes[0].failure.at < outcomes[1].failure.at
    assert str(RankFailed(outcomes)).startswith("rank 1 of 2 failed first: LookupError: the cause\nTraceback")


def test_a_rank_that_dies_is_named(run_on_ranks):
    with pytest.raises(RankFailed, match=r"(?s)^rank 1 of 2 failed first: Died: exit code 3\n.*last words"):
        run_on_ranks(one_exits, 2, 1)
    assert works(run_on_ranks)


def test_a_rank_that_does_not_answer_is_named(run_on_ranks):
    assert works(run_on_ranks)
    said = r"^rank 1 of 2 failed first: Unanswered: no answer after \d"
    with pytest.raises(RankFailed, match=said) as caught:
        run_on_ranks(one_sleeps, 2, 1, timeout=1.0)
    done, hung = caught.value.outcomes
    assert (done.failure, hung.failure.type) == (None, UNANSWERED)
    assert "in one_sleeps" in hung.stderr  # where it stands
    assert works(run_on_ranks)


def test_outcomes_of_failures_that_are_expected(run_on_ranks):
    pids = run_on_ranks(os.getpid, 2)
    waiting, raising = run_on_ranks.outcomes(one_raises_and_the_others_wait, 2, 1)
    assert (raising.rank, raising.stdout) == (1, "hello from 1\n")
    assert (raising.failure.type, raising.failure.message) == ("LookupError", "the cause")
    assert "in one_raises_and_the_others_wait" in raising.failure.traceback
    assert (raising.failure.echo, waiting.failure.echo) == (False, True)
    assert run_on_ranks(os.getpid, 2) == pids
    assert works(run_on_ranks)


def test_an_exit_is_an_outcome(run_on_ranks):
    pids = run_on_ranks(os.getpid, 2)
    for outcome in run_on_ranks.outcomes(system_exit, 2):
        assert (outcome.failure.type, outcome.failure.message) == ("SystemExit", "2")
        assert "to stderr" in outcome.stderr
    assert run_on_ranks(os.getpid, 2) == pids
