"""A stand-in for TorchNeuron: the device `neuron` over CPU tensors, for tests of what trains on it.

It has TorchNeuron's name, so that with the folder that it stands in on PYTHONPATH `platform=neuron` finds it as
it would find the real one. It raises where the real one can't do what it is asked for (`limits`), and counts
what the real one would compile (`counting.compiled`). It doesn't model speed, memory, kernels, numerics of the
chip, or torch.compile; see docs/trainium_stand_in.md.

Registering a device is once a process, so tests that use it run in processes of their own.
"""

from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torch_neuronx import device

# The tensors stand on what is registered here.
_setup_privateuseone_for_python_backend("neuron", backend_module=device)

from torch_neuronx import fsdp, groups, tensor  # noqa: E402

__all__ = ["device", "fsdp", "groups", "tensor"]
