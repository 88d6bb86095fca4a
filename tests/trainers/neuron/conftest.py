import pytest

from tests.ranks import RankPool
from tests.trainers.parallel.conftest import base as recipe_of_layouts  # noqa: F401
from tests.trainers.parallel.conftest import text  # noqa: F401
from tests.trainers.parallel.runs import Alone

STEPS = 10


@pytest.fixture(scope="session")
def base(recipe_of_layouts: list[str]) -> list[str]:  # noqa: F811
    """That of the layouts, validated early: on the stand-in a step takes several times as long as on a CPU."""
    return [*recipe_of_layouts, "train.validate_every=5", "health.check=false"]


@pytest.fixture(scope="session")
def alone(run_on_ranks: RankPool, base: list[str]) -> Alone:
    """`alone("precision=mixed")`: the metrics of 10 steps on a single CPU process."""
    return Alone(run_on_ranks, base, STEPS)
