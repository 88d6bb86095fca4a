import pytest
import torch

from trainwright.errors import BadRequest
from trainwright.models.attention import KERNELS
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.choose import PLATFORMS, choose_platform


def test_auto_takes_what_is_there():
    found = torch.accelerator.current_accelerator(check_available=True)
    assert choose_platform("auto").name == ("cpu" if found is None else found.type)


def test_the_cpu_is_always_there():
    cpu = choose_platform("cpu")
    cpu.prepare()
    assert 0 < cpu.memory_gib() < 1024
    assert "threads" in cpu.describe()
    assert cpu.peak_flops(torch.bfloat16) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(BadRequest, match="platform=cuda: torch finds no cuda device here; use platform=cpu"):
        choose_platform("cuda")


@pytest.mark.parametrize("platform", PLATFORMS.values())
def test_every_platform_names_a_kernel_that_exists(platform: type[Platform]):
    assert platform.attention in KERNELS


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_devices_that_cannot_round_by_themselves_refuse_it(name: str):
    with pytest.raises(BadRequest) as caught:
        Platform.round_stochastically(PLATFORMS[name].__new__(PLATFORMS[name]), seed=0)
    assert str(caught.value) == (
        f"precision.rounding=hardware: {name} has no stochastic rounding of its own; use "
        "precision.rounding=optimizer"
    )
