"""The descriptions of machines."""

from importlib.resources import files

import pytest

from trainwright.configs.compose import load_recipe
from trainwright.configs.planned import any_world

NAMES = [file.name.removesuffix(".yaml") for file in files("trainwright.configs").joinpath("cluster").iterdir()]


@pytest.mark.parametrize("name", NAMES)
def test_each_says_all_that_a_plan_needs(name: str):
    cluster = load_recipe([f"cluster={name}", "cluster.nodes=3"], any_world).cluster
    assert cluster.nodes == 3
    for key in ("instance", "ranks_per_node", "memory_gib", "peak_tflops", "node_gb_s", "network_gb_s"):
        assert getattr(cluster, key) is not None, key
    assert cluster.usd_per_hour
    assert cluster.priced
    assert (cluster.ranks_per_group is None) == (cluster.group_gb_s is None)


@pytest.mark.parametrize(
    ("name", "instance"), [("p4d", "p4d.24xlarge"), ("p5", "p5.48xlarge"), ("g6", "g6.48xlarge")]
)
def test_short_names(name: str, instance: str):
    assert (
        load_recipe([f"cluster={name}"], any_world).cluster
        == load_recipe([f"cluster={instance}"], any_world).cluster
    )


def test_no_cluster_is_the_default_and_names_no_run():
    plain, on_trn2 = load_recipe([]), load_recipe(["cluster=trn2.48xlarge"])
    assert plain.cluster.instance is None
    assert plain.run.name == on_trn2.run.name
