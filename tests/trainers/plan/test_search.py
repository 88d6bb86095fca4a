"""Which layouts a toy cluster can run, in which order, and why not the others."""

import pytest

from tests.trainers.plan.toy import CLUSTER, TINY
from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import Degrees
from trainwright.configs.planned import any_world
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.scaling import efficiency, scaling
from trainwright.trainers.plan.search import Refused, candidates, divisors, search, words_of

# Layers that four peers can part; products so slow that links hardly matter.
BASE = "model.intermediate_size=512 precision=mixed train.global_batch_size=8 train.micro_batch_size=1"


def recipe_for(*words: str) -> Recipe:
    return load_recipe([w for several in (*TINY, *CLUSTER, BASE, *words) for w in several.split()], any_world)


def test_all_degrees_are_tried_once():
    recipe = recipe_for()
    tried = [words_of(candidate) for candidate in candidates(recipe, 8)]
    assert len(tried) == len(set(tried))
    for candidate in candidates(recipe, 8):
        parallel = candidate.parallel
        assert parallel.tp * parallel.pp * parallel.dp_replicate * parallel.dp_shard == 8
        assert parallel.tp in (1, 2, 4)
        assert parallel.pp <= 2
    assert "parallel.tp=2 parallel.pp=1 parallel.dp_replicate=2 parallel.dp_shard=2 parallel.zero=3 " in str(
        tried
    )
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_the_fastest_comes_first_and_each_refusal_has_its_reason():
    found = search(recipe_for("train.global_batch_size=4"), 8)
    paces = [layout.time.total for layout in found.fit]
    assert paces == sorted(paces)
    assert all(layout.fits for layout in found.fit)
    # Eight data-parallel ranks have too few sequences, and a pipeline too few micro-batches.
    reasons = {why for _, _, why in found.reasons}
    assert "train.global_batch_size=4 must be at least 8, the number of data-parallel ranks" in reasons
    assert any("takes at least 2 micro-batches" in why for why in reasons)
    assert sum(count for _, count, _ in found.reasons) == len(found.refused)


def test_memory_is_a_reason_and_checkpointing_a_way_out():
    plenty = search(recipe_for(), 8)
    assert {layout.recipe.train.activation_checkpointing for layout in plenty.fit} == {"none"}
    needs = sorted(layout.memory[1].total for layout in plenty.fit)
    middle = needs[len(needs) // 2] / 2**30
    tight = search(recipe_for(f"cluster.memory_gib={middle}"), 8)
    assert all(layout.memory[1].total <= middle * 2**30 for layout in tight.fit)
    assert {layout.recipe.train.activation_checkpointing for layout in tight.fit} > {"none"}
    assert any(one.why.startswith("a rank") for one in tight.refused)


def test_a_slow_network_keeps_the_traffic_in_the_nodes():
    best = search(recipe_for("cluster.network_gb_s=0.000001 train.global_batch_size=64"), 8).fit[0].degrees
    assert best.pp == 2  # of what can cross the network, a pipeline's sends are the least


def test_the_recipes_own_place():
    found = search(recipe_for("parallel.tp=2 parallel.zero=1"), 8)
    assert not isinstance(found.own, Refused)
    place, layout = found.own
    assert layout.degrees == Degrees(dp_shard=4, tp=2)
    assert found.fit[place] == layout
    assert len({repr(one.recipe) for one in found.fit}) == len(found.fit)
    # It is timed as it is written, also where less checkpointing would fit.
    full = search(recipe_for("parallel.tp=2 parallel.zero=1 train.activation_checkpointing=full"), 8)
    assert not isinstance(full.own, Refused)
    assert full.own[1].recipe.train.activation_checkpointing == "full"
    assert full.own[1].time.again > 0
    assert len(full.fit) == len(found.fit) + 1


def test_why_the_recipes_own_layout_cannot_be():
    small = search(recipe_for("parallel.tp=2 cluster.memory_gib=0.000001"), 8).own
    assert isinstance(small, Refused)
    assert small.why.startswith("a rank needs 0.0 GiB and has 0.0")
    wrong = search(recipe_for("parallel.tp=2 parallel.dp_shard=8"), 8).own
    assert isinstance(wrong, Refused)
    assert "needs 16 ranks and this run has 8" in wrong.why


def test_a_cluster_that_is_not_described():
    with pytest.raises(BadRequest, match="nothing says how fast a rank is"):
        search(recipe_for("cluster.peak_tflops=null"), 8)
    with pytest.raises(BadRequest, match="nothing says how fast a rank is"):
        search(recipe_for("precision=fp32"), 8)


def test_weak_scaling_by_hand():
    # No hops and nothing hidden: the data-parallel part is (n - 1) / n of as many bytes on any number of nodes.
    words = "cluster.overlap=0 parallel.dp_shard=4 parallel.zero=1 train.global_batch_size=4"
    layouts = scaling(recipe_for(words, "cluster.nodes=4"))
    assert [layout.ranks for layout in layouts] == [4, 8, 16]
    assert [layout.recipe.train.global_batch_size for layout in layouts] == [4, 8, 16]
    shares = [layout.time.data / layout.time.compute for layout in layouts]
    over_network = shares[1] / (7 / 8)
    assert shares[2] == pytest.approx(over_network * 15 / 16)
    kept = [1 / sum(layout.time) for layout in layouts]
    assert efficiency(layouts) == pytest.approx([pace / kept[0] for pace in kept])
    assert efficiency(layouts)[0] == 1


def test_efficiency_is_of_what_fits():
    words = "parallel.dp_shard=4 parallel.zero=1 train.global_batch_size=4 cluster.nodes=4"
    layouts = scaling(recipe_for(words))
    needs = [layout.memory[1].total / 2**30 for layout in layouts]
    assert needs == sorted(needs, reverse=True)
    shares = efficiency(scaling(recipe_for(words, f"cluster.memory_gib={needs[1]}")))
    assert shares[:2] == [None, 1]
    assert shares[2] is not None
    assert 0 < shares[2] < 1


def test_scaling_begins_where_the_model_goes():
    words = "parallel.pp=2 parallel.tp=4 parallel.dp_shard=1 cluster.nodes=4"
    assert [layout.ranks for layout in scaling(recipe_for(words))] == [8, 16]
    replicas = "parallel.dp_replicate=2 parallel.dp_shard=4 cluster.nodes=4"
    assert [layout.degrees.dp_replicate for layout in scaling(recipe_for(replicas))] == [1, 2, 4]
    with pytest.raises(BadRequest, match="doesn't go on 1 nodes of 4 ranks"):
        scaling(recipe_for(words, "cluster.nodes=1"))
    with pytest.raises(BadRequest, match="nothing says how fast"):
        scaling(recipe_for("parallel.dp_shard=4 cluster.ranks_per_node=null"))
