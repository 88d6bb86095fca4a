"""Which platform a run is on."""

import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.cuda import Cuda
from trainwright.trainers.platform.neuron import Neuron

PLATFORMS: dict[str, type[Cpu] | type[Cuda] | type[Neuron]] = {"cpu": Cpu, "cuda": Cuda, "neuron": Neuron}


def choose_platform(name: str) -> Platform:
    """The platform called `name`; `auto` is the accelerator that torch finds, else the CPU.

    Raises:
        BadRequest: the device isn't there, or there is no platform for it.
    """
    if name in PLATFORMS:
        PLATFORMS[name].register()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = "cpu" if accelerator is None else accelerator.type
    if name == "auto":
        name = found if found in PLATFORMS else "cpu"
    if name not in ("cpu", found):
        there = found if found in PLATFORMS else "cpu"
        raise BadRequest(f"platform={name}: torch finds no {name} device here; use platform={there}")
    return PLATFORMS[name]()
