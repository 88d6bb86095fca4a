"""Which platform a run is on."""

import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.cuda import Cuda
from trainwright.trainers.platform.environment import device_of
from trainwright.trainers.platform.neuron import Neuron

SAID = 200  # characters of what an import said

PLATFORMS: dict[str, type[Cpu] | type[Cuda] | type[Neuron]] = {"cpu": Cpu, "cuda": Cuda, "neuron": Neuron}


def choose_platform(name: str) -> Platform:
    """The platform called `name`; `auto` is the accelerator that torch finds, else the CPU.

    Raises:
        BadRequest: the device isn't there, or there is no platform for it.
    """
    asked = device_of(name)
    error = PLATFORMS[asked].register() if asked in PLATFORMS else None
    why = "" if error is None else f" ({type(error).__name__}: {' '.join(str(error).split())[:SAID]})"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = "cpu" if accelerator is None else accelerator.type
    there = found if found in PLATFORMS else "cpu"
    if name == "auto" and not error:
        name = there
    if name not in ("cpu", found):
        raise BadRequest(f"platform={name}: torch finds no {asked} device here{why}; use platform={there}")
    return PLATFORMS[name]()
