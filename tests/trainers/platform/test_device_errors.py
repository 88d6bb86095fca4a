"""Lines in which devices' libraries tell of failures, and what they come to.

Those of Neuron are as documented (the runtime's troubleshooting guide, its pages on core dumps and on memory).
None was recorded from a device.
"""

import re

import pytest

from trainwright import verdict
from trainwright.errors import BadNode, BadRequest, NumericalFailure, RunFailed, TrainwrightError
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.cuda_errors import CUDA_ERRORS
from trainwright.trainers.platform.device_errors import known_in, tells
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

HBM = (
    "(FATAL-RT-UNDEFINED-STATE) Uncorrectable HBM memory error is detected. Execution results may be invalid. "
)
TIMED_OUT = (
    "(FATAL-RT-UNDEFINED-STATE) execution timeout (30000 ms) on Neuron Device 0 NC 0, model m.neff, waiting"
)

NEURON = [
    (f"{HBM}Please terminate this instance to prevent future impact from the hardware error.", 1201, BadNode),
    (f"{HBM}Please reload the neuron driver or reboot your EC2 instance to prevent", 1205, BadNode),
    ("(FATAL-RT-UNDEFINED-STATE) [ND 0][NC 0] Uncorrectable memory error is detected, metadata", 1202, BadNode),
    ("NEURON_HW_ERR=SRAM_UNCORRECTABLE_ERROR instance-id=i-0 nd-id=0 action=TERMINATE_INSTANCE", 1202, BadNode),
    ("[MLA 0][NC 0] DMA TX engine 0 is in an abort state", 1203, BadNode),
    ("nrt_execute failed: NRT_EXEC_COMPLETED_WITH_ERR", 1004, BadNode),
    ("NRT:nrt_infodump  Failure: NRT_EXEC_SW_NQ_OVERFLOW in nrt_execute()", 1204, RunFailed),
    ("potentially caused by DGE notifications enabled. Please disable it", 1204, RunFailed),
    (
        "missing collectives status on Neuron Device 0 NC 0, suspected hang in collectives operation",
        1200,
        RunFailed,
    ),
    (TIMED_OUT, 5, RunFailed),
    ("NMGR:dlr_infer    Inference completed with err: 5", 5, RunFailed),
    ("Failed to initialize devices, error:5", 5, RunFailed),
    ("NRT:nrt_execute_repeat   Failed to execute model file.neff with status 1205", 1205, BadNode),
    ("NRT_NETWORK_PROXY_FAILURE", 1206, RunFailed),
    ("NRT_QUEUE_FULL (7)", 7, RunFailed),
    ("NRT_EXEC_COMPLETED_WITH_NUM_ERR: execution completed with NaN", 1003, NumericalFailure),
    ("Error notifications found on NC 3; INFER_ERROR_SUBTYPE_NUMERICAL", 1003, NumericalFailure),
    (
        "TDRV:log_dev_mem  Failed to allocate 4.000GB (alignment: none, usage: tensors) on ND 0:NC 4",
        4,
        BadRequest,
    ),
    ("[NCC_EOOM001] The combined memory needed for the model tensors exceeds the limit", 4, BadRequest),
    (
        "NRT:nrt_allocate_neuron_cores  NeuronCore(s) not available - Requested:nc1-nc1 Available:0",
        9,
        RunFailed,
    ),
    ("NEFF version mismatch supported: 1.1 received: 2.0", 10, BadRequest),
]


@pytest.mark.parametrize(
    ("line", "code", "kind"), NEURON, ids=[f"{code}-{n}" for n, (_, code, _) in enumerate(NEURON)]
)
def test_neurons_lines(line: str, code: int, kind: type[TrainwrightError]):
    text = f"2026-Oct-01 23:48:34.002205 516278:516289 INFO  of no interest\n{line}\nand more"
    known = known_in(text, NEURON_ERRORS)
    assert known is not None
    assert known.name.endswith(f", {code}")
    assert tells(line)
    error = known.error(text, worked=False)
    assert type(error) is kind
    assert str(error).endswith(f"; it said: {' '.join(line.split())[:200]}")


@pytest.mark.parametrize(
    "text",
    [
        "shape '[3]' is invalid for input of size 4",
        "expected 5 tensors, with 7 given; error: 4",
        "Connection closed by peer",
        "NRT_SUCCESS",
        "neuronx-cc failed with status 7",
    ],
)
def test_other_errors_are_nobodys(text: str):
    assert known_in(text, NEURON_ERRORS) is None
    assert known_in(text, CUDA_ERRORS) is None


def test_what_broke_counts_before_who_only_waited():
    known = known_in(f"{TIMED_OUT}\nDMA RX engine 3 is in an abort state\nNRT_TIMEOUT", NEURON_ERRORS)
    assert known is not None
    assert known.name == "NRT_EXEC_HW_ERR_DMA_ABORT, 1203"


def test_every_code_has_one_row():
    numbers = [re.sub(".*, ", "", known.name) for known in NEURON_ERRORS]
    assert len(set(numbers)) == len(numbers)
    for known, number in zip(NEURON_ERRORS, numbers, strict=True):
        name = known.name.split(",")[0]
        assert known_in(f"failed: {name}", NEURON_ERRORS) is known
        assert known_in(f"failed to execute m with status {number}", NEURON_ERRORS) is known


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
            BadRequest,
            "lower train.micro_batch_size",
        ),
        ("CUDA error: uncorrectable ECC error encountered", BadNode, "replace the node"),
        ("NVRM: Xid (PCI:0000:53:00): 79, GPU has fallen off the bus.", BadNode, "replace the node"),
    ],
)
def test_cudas_lines(text: str, kind: type[TrainwrightError], says: str):
    known = known_in(text, CUDA_ERRORS)
    assert known is not None
    assert tells(text)
    assert type(known.error(text, worked=False)) is kind
    assert says in str(known.error(text, worked=False))


def test_memory_that_was_enough_before_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cpu, "failures", NEURON_ERRORS)
    for first_step, kind in ((None, BadRequest), (1.0, RunFailed)):
        monkeypatch.setattr(verdict, "_first_step", first_step)
        with pytest.raises(kind), Cpu().explaining():
            raise RuntimeError("NRT_RESOURCE")


def test_a_platform_raises_what_its_librarys_errors_come_to(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Cpu, "failures", NEURON_ERRORS)
    stopped = r"a DMA engine stopped \(NRT_EXEC_HW_ERR_DMA_ABORT, 1203\)"
    with pytest.raises(BadNode, match=stopped) as caught, Cpu().explaining():
        raise RuntimeError("NRT_EXEC_HW_ERR_DMA_ABORT")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="a bug"), Cpu().explaining():
        raise RuntimeError("a bug")
