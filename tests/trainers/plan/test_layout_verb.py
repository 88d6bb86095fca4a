"""`trainwright plan` from the command line."""

import json

import pytest

from tests.trainers.plan.toy import CLUSTER, TINY
from trainwright.cli import SUBJECTS, main
from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import resolve_degrees
from trainwright.configs.planned import any_world, planned_ranks, planned_worlds
from trainwright.models import llama_plan
from trainwright.trainers.plan import layout_verb, rehearsal_verb, search_verb, shapes
from trainwright.trainers.plan.layout import GIB, Layout
from trainwright.trainers.plan.search import Refused, search
from trainwright.trainers.plan.step_time import StepTime
from trainwright.trainers.plan.wording import differences

HLAT = ["recipe=llama2_7b", "cluster=trn1.32xlarge", "cluster.nodes=128"]
TOY = [*TINY, *CLUSTER, "precision=mixed", "train.global_batch_size=8", "train.micro_batch_size=1"]


@pytest.fixture
def refusal(capsys, tmp_path):
    def refused(*words: str) -> str:
        assert main(["plan", *words[:1], f"plan.dir={tmp_path}", *words[1:]]) == 2
        return capsys.readouterr().err.removeprefix("trainwright: ").strip()

    return refused


def test_the_recipe_may_come_at_once(tmp_path, capsys):
    assert main(["plan", *HLAT, f"plan.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        "plan=layout instance=trn1.32xlarge ranks=4096 pp=1 dp_replicate=1 dp_shard=512"
    )
    assert "plan=model parameters=6738415616 " in printed[1]
    assert printed[-1] == f"plan={tmp_path / 'plan.html'}"
    assert any('what="activations\' gradients"' in line for line in printed)
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["memory"]["fits"]
    assert record["time"]["step_s"] == pytest.approx(
        sum(record["time"][f"{part}_s"] for part in StepTime._fields)
    )
    page = (tmp_path / "plan.html").read_text()
    assert "4,096 ranks on trn1.32xlarge" in page
    assert "http" not in page
    assert main(["plan", "layout", *HLAT, f"plan.dir={tmp_path}"]) == 0


def test_in_a_terminal_it_is_a_table(tmp_path):
    recipe = load_recipe(TOY, planned_worlds, planned=True)
    shown = "\n".join(layout_verb.tables(Layout(recipe, resolve_degrees(recipe.parallel, 8))))
    assert "7,248 parameters" in shown
    assert "8 ranks on 2 toy: pp 1 x dp_replicate 1 x dp_shard 8 x tp 1" in shown
    assert "what limits it: " in shown
    assert "36.0 an hour" in shown


def test_what_is_refused(refusal):
    assert refusal() == (
        "parallel.dp_shard=-1 takes the ranks that are left, and nothing says how many there are: give "
        "cluster=NAME cluster.nodes=N, or parallel.dp_shard"
    )
    assert refusal(*HLAT[:2], "cluster.nodes=64") == (
        "parallel.dp_shard=512 x parallel.tp=8 needs 4096 ranks and this run has 2048; parallel.dp_shard=256 "
        "would fit"
    )
    assert "cluster=trn9 is not an option of cluster; the nearest is cluster=trn" in refusal("cluster=trn9")
    assert "cluster.reached=2.0 must be a number of at least 1e-06 and at most 1.0" in refusal(
        "cluster.reached=2", "parallel.dp_shard=1"
    )
    assert "plan.dir=" in refusal(*TOY, "plan.dir=/dev/null/no")
    assert refusal("cluster=p5", "platform=neuron", "parallel.dp_shard=8") == (
        "platform=neuron isn't that of p5.48xlarge, whose devices are cuda: use platform=auto"
    )
    negative = refusal("cluster=p5", "cluster.nodes=-1", "parallel.dp_shard=8")
    assert negative == "cluster.nodes=-1 must be at least 1"
    assert refusal("cluster.nodes=16", "parallel.dp_shard=1") == (
        "cluster.nodes=16 says how many nodes there are and nothing says of which kind: name it, as by "
        "cluster=trn1.32xlarge, or leave cluster.nodes out"
    )


def test_what_does_not_fit_names_the_number_and_what_would_do(refusal):
    said = refusal("recipe=llama2_70b", "cluster=trn1.32xlarge", "cluster.nodes=2", "parallel.dp_shard=1")
    assert said.startswith("a rank of stage 0 of the pipeline needs ")
    assert " GiB and has 15.0, the most of it for " in said
    assert said.endswith("let trainwright plan search look for a layout that fits")
    toy = load_recipe(TOY, planned_worlds, planned=True)
    needs = Layout(toy, resolve_degrees(toy.parallel, 8)).memory[1].total
    tight = refusal(*TOY, f"cluster.memory_gib={needs / GIB * 0.95}")
    assert tight.endswith("train.activation_checkpointing=full or parallel.pp=2 would do")


def test_without_a_cluster_there_is_memory_but_no_time(tmp_path, capsys):
    assert main(["plan", *TINY, "parallel.dp_shard=1", f"plan.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "room=None fits=None" in printed
    assert "step_s" not in printed
    page = (tmp_path / "plan.html").read_text()
    assert "A step" not in page
    assert "Nothing says how much memory there is" in page


def test_the_search_and_the_scaling_leave_their_records(tmp_path, capsys):
    assert main(["plan", "search", *TOY, f"plan.dir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "plan_search.json").read_text())
    assert found["fit"][0]["place"] == 1
    assert found["own"]["place"]
    assert all(one["why"] for one in found["refused"])
    assert (
        main(["plan", "scaling", *TOY, "parallel.dp_shard=8", "cluster.nodes=4", f"plan.dir={tmp_path}"]) == 0
    )
    assert [one["nodes"] for one in json.loads((tmp_path / "plan_scaling.json").read_text())] == [1, 2, 4]
    printed = capsys.readouterr().out
    assert "plan=layout place=1 " in printed
    assert "plan=scaling nodes=4 " in printed
    shown = "\n".join(search_verb.tables(search(load_recipe(TOY, any_world, planned=True), 8)))
    assert "the recipe's own layout is number " in shown


@pytest.mark.parametrize("words", [["layout"], ["search"], ["scaling"], ["layout", "--rehearse"]])
def test_experts_are_refused(words: list[str], refusal):
    experts = ["model.moe.num_local_experts=4", "parallel.dp_shard=8"]
    assert refusal(*words, *TOY, *experts) == (
        "trainwright plan doesn't work out a mixture of experts (model.moe.num_local_experts) yet: plan a "
        "dense model, as that of recipe=llama2_7b"
    )


@pytest.mark.parametrize(
    "words", [["layout"], ["layout", "--rehearse"], ["search"], ["scaling", "parallel.dp_shard=8"]]
)
def test_a_sharding_plan_that_is_not_the_models_is_one_sentence(
    words: list[str], refusal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(llama_plan.PLAN, "layers.*.mlp.down_proj")
    monkeypatch.setattr(shapes, "_made", {})
    assert refusal(*words, *TOY) == (
        "the sharding plan misses the module layers.0.mlp.down_proj: mend it in "
        "trainwright/models/llama_plan.py"
    )


def test_a_search_that_finds_nothing(refusal):
    assert "none of " in refusal("search", *TOY, "cluster.memory_gib=0.000001")


def test_more_nodes_that_do_not_help(refusal, tmp_path):
    said = refusal("scaling", *TOY, "parallel.dp_shard=8", "cluster.memory_gib=0.000001")
    assert said.startswith("the layout fits on no number of nodes; on 2 a rank needs 0.0 GiB")
    assert (tmp_path / "plan_scaling.json").exists()


@pytest.mark.parametrize("verb", ["search", "scaling", "goodput"])
def test_only_a_layout_is_rehearsed(verb: str, refusal):
    assert refusal(verb, *TOY, "--rehearse") == (
        f"--rehearse goes with trainwright plan layout, not with plan {verb}: leave it out"
    )


@pytest.mark.parametrize("subject", SUBJECTS)
def test_help_shows_what_can_be_run(subject: str, capsys):
    with pytest.raises(SystemExit, match="0"):  # Hydra's
        main(["plan", subject, "--help"])
    shown = capsys.readouterr().out.split("Groups and")[0].split("Examples:\n")[1]
    assert shown.strip().splitlines() == SUBJECTS[subject].example.splitlines()
    assert main(["plan", "--help"]) == 0
    assert " --rehearse\n" in capsys.readouterr().out


RANK = {"memory": {"total": 2**30}, "as_by_arithmetic": True, "memory_ratio": 1.0, "rank": 4}


def test_what_differs_from_the_arithmetic_is_said():
    def said(**changes: object) -> list[str]:
        return list(differences({"ranks": [RANK | changes]}))

    assert said() == said(memory_ratio=0.91) == []
    assert said(memory_ratio=1.25) == ["rank 4 holds 1.25 times what arithmetic says, which is 0.80 GiB"]
    assert said(as_by_arithmetic=False) == ["rank 4 sends something else than arithmetic says: a bug"]


def test_a_rehearsal_is_on_the_page_and_does_not_take_back_what_arithmetic_refuses(
    refusal, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    told = RANK | {"rank": 0, "memory": {"total": 12345678}, "memory_ratio": 1.5}
    monkeypatch.setattr(
        rehearsal_verb, "rehearse_and_tell", lambda layout: ({"platform": "cuda", "ranks": [told]}, None)
    )
    said = refusal("--rehearse", *TOY, "cluster.memory_gib=0.000001")
    assert said.startswith("a rank needs 0.0 GiB and has 0.0")
    page = (tmp_path / "plan.html").read_text()
    assert "It needs more memory than there is; by arithmetic, and a step was rehearsed" in page
    assert "nothing was run" not in page
    assert "<h2>Rehearsed, on cuda</h2>" in page
    assert "rank 0 holds 1.50 times what arithmetic says" in page


def test_rehearsing_is_asked_for_by_a_word(tmp_path, capsys):
    assert main(["plan", "--rehearse", "--cfg", "job"]) == 0
    assert "rehearse: true" in capsys.readouterr().out


def test_the_published_run_fits_and_what_is_faster_is_its_neighbour():
    recipe = load_recipe(HLAT, any_world, planned=True)
    found = search(recipe, planned_ranks(recipe))
    assert not isinstance(found.own, Refused)
    _, own = found.own
    assert own.degrees == (1, 1, 512, 8)
    assert own.recipe == recipe
    best = found.fit[0].degrees
    assert best.pp == 1
    assert best.tp in (4, 8)
