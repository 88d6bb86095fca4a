"""What the Neuron tools print, from executables of that name on PATH that print it.

The reports of neuron-ls and neuron-monitor are those of the tools' user guides, with other numbers. The guide
of nccom-test shows its table only: its JSON file has the table's columns for keys here.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainwright.trainers.platform import neuron_tools
from trainwright.trainers.platform.base import ToolReport
from trainwright.trainers.platform.neuron_tools import collectives, device_listing, hardware_counters


def device(number: int) -> dict[str, Any]:
    return {
        "neuron_device": number,
        "bdf": "cc:00.0",
        "cpu_affinity": "48-95,144-191",
        "numa_node": "1",
        "connected_to": [12, 3, 4, 1],
        "nc_count": 4,
        "logical_neuroncore_config": 2,
        "memory_size": 103079215104,
        "neuroncore_ids": [4 * number + core for core in range(4)],
        "neuron_processes": [{"pid": 113985, "command": "python", "neuron_runtime_version": "2.0.0"}],
    }


DEVICES = json.dumps([device(number) for number in range(16)], indent=4)


def counters(*errors: dict[str, int], summary: dict[str, int] | None = None) -> str:
    """A report of neuron-monitor, a line: a device for each of `errors`."""
    none = {
        "mem_ecc_corrected": 3,
        "mem_ecc_uncorrected": 0,
        "sram_ecc_uncorrected": 0,
        "sram_ecc_corrected": 1,
    }
    devices = [{"neuron_device_index": n, **none, **its} for n, its in enumerate(errors)]
    stats = {"error_summary": {"generic": 0, "numerical": 0, "hardware": 0, **(summary or {})}, "error": ""}
    report = {
        "neuron_runtime_data": [{"pid": 1, "error": "", "report": {"execution_stats": stats}}],
        "system_data": {"neuron_hw_counters": {"period": 1.03, "neuron_devices": devices, "error": ""}},
        "neuron_hardware_info": {"neuron_device_type": "trainium2", "neuron_device_count": len(devices)},
    }
    return json.dumps(report)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`tool(name, prints, more)`: an executable on PATH, which has no other; the file of what it is asked."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, prints: str = "", more: str = "") -> Path:
        (tmp_path / f"{name}.said").write_text(prints)
        asked = tmp_path / f"{name}.asked"
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$@" > {asked}\n/bin/cat {tmp_path}/{name}.said\n{more}\n')
        path.chmod(0o755)
        return asked

    return make


def test_the_devices_of_a_node(tool):
    asked = tool("neuron-ls", DEVICES)
    assert device_listing() == ToolReport("neuron-ls", note="16 devices of 96 GiB, 64 cores")
    assert asked.read_text() == "--json-output\n"


def test_tools_that_are_not_there_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_listing().skipped == "not installed"
    assert hardware_counters().skipped == "not installed"
    assert collectives().skipped == "neuron-ls: not installed"


@pytest.mark.parametrize("nonsense", ["", "null", "[]", "{}", "[1, 2]", "no driver"])
def test_tools_that_say_nonsense_are_skipped(tool, nonsense: str):
    for name in ("neuron-ls", "neuron-monitor"):
        tool(name, f"{nonsense}\n")
    assert device_listing().skipped
    assert hardware_counters().skipped
    assert collectives().skipped


GOES_ON = "exec /bin/sleep 60"  # as neuron-monitor does, which reports for ever


@pytest.mark.parametrize(
    ("errors", "faults"),
    [
        ({}, ()),
        ({"mem_ecc_uncorrected": 2}, ("device 1 with 2 uncorrected errors of its memory: replace the node",)),
        (
            {"sram_ecc_uncorrected": 1, "mem_ecc_repairable_uncorrected": 5},
            (
                "device 1 with 1 uncorrected errors of its cores' memory: replace the node",
                "device 1 with 5 memory errors that a reload of the driver repairs",
            ),
        ),
    ],
)
def test_errors_of_the_devices_memory(tool, errors: dict[str, int], faults: tuple[str, ...]):
    tool("neuron-monitor", counters({}, errors) + "\n", GOES_ON)
    started = time.monotonic()
    assert hardware_counters() == ToolReport("neuron-monitor", faults)
    assert time.monotonic() - started < 30


def test_it_asks_for_the_counters_of_a_second(tool, tmp_path: Path):
    more = f"/bin/cat $2 > {tmp_path}/config; echo '{counters({})}'; {GOES_ON}"
    asked = tool("neuron-monitor", more=more)
    hardware_counters()
    assert asked.read_text().startswith("-c ")
    assert json.loads((tmp_path / "config").read_text()) == neuron_tools.ASKED


def test_failed_executions_are_a_note(tool):
    tool("neuron-monitor", counters({}, summary={"numerical": 2, "hardware": 1}) + "\n", GOES_ON)
    said = "2 executions with numerical errors; 1 executions with hardware errors"
    assert hardware_counters() == ToolReport("neuron-monitor", note=said)


def test_a_monitor_without_counters_is_skipped(tool):
    broken = json.loads(counters({}))
    broken["system_data"]["neuron_hw_counters"] = {"neuron_devices": None, "error": "no driver"}
    tool("neuron-monitor", json.dumps(broken) + "\n", GOES_ON)
    assert hardware_counters().skipped == "it has no driver"


def test_a_monitor_that_says_nothing_is_given_up(tool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neuron_tools, "MONITOR_TIMEOUT", 0.2)
    tool("neuron-monitor", more=GOES_ON)
    assert hardware_counters().skipped == "no answer in 0 s"
    tool("neuron-monitor", more="exit 3")
    monkeypatch.setattr(neuron_tools, "MONITOR_TIMEOUT", 20.0)
    assert hardware_counters().skipped == "it ended without a word"


TABLE = """    size(B)    count(elems)    type    time:avg(us)    algbw(GB/s)    busbw(GB/s)
    1048576          262144    fp32              68          14.36          28.27
Avg bus bandwidth:      28.2700GB/s
"""
RESULTS = [{"size(B)": 1024, "busbw(GB/s)": 0.02}, {"size(B)": 1048576, "busbw(GB/s)": 28.27}]


def writes(results: Any) -> str:
    """A script's lines that write the report where the last word says."""
    return f"for last in \"$@\"; do :; done; echo '{json.dumps({'config': {}, 'results': results})}' > $last"


def test_all_cores_sum_up(tool):
    tool("neuron-ls", DEVICES)
    asked = tool("nccom-test", TABLE, writes(RESULTS))
    said = "64 cores' sums are right, 28.3 GiB/s a rank at 1048576 bytes"
    assert collectives() == ToolReport("nccom-test", note=said)
    assert asked.read_text().startswith(
        "-r 64 allr -b 1kb -e 1mb -f 32 -d fp32 --check --non-interactive --report"
    )


@pytest.mark.parametrize("results", [[], None, [1], [{"size(B)": 1}]])
def test_a_report_of_other_keys_is_no_failure(tool, results: Any):
    tool("neuron-ls", DEVICES)
    tool("nccom-test", TABLE, writes(results))
    assert collectives() == ToolReport("nccom-test", note="64 cores' sums are right")


def test_a_wrong_sum_is_a_fault(tool):
    tool("neuron-ls", DEVICES)
    tool("nccom-test", "rank 3: output does not match golden tensor\n1 errors found - test failed\n", "exit 1")
    fault = "collectives with wrong sums (rank 3: output does not match golden tensor)"
    assert collectives() == ToolReport("nccom-test", (fault,))


@pytest.mark.parametrize(
    ("prints", "skipped"),
    [
        (
            "33554432    Failure running neuron-bench - log file /tmp/nccom_test_log.log\n"
            "1 errors found - test failed\n",
            "33554432 Failure running neuron-bench - log file /tmp/nccom_test_log.log",
        ),
        (
            "1024    Failure running neuron-bench - incorrect number of cores\n1 errors found - test failed\n",
            "1024 Failure running neuron-bench - incorrect number of cores",
        ),
        ("NEFF version mismatch\n", "the runtime can't read what the compiler made (NRT_UNSUPPORTED_NEFF"),
        ("error: driver version mismatch: results differ\n", "error: driver version mismatch: results differ"),
        ("usage error: incorrect value of option -d\n", "usage error: incorrect value of option -d"),
        (
            "Neuron DKMS Driver is not running! Read the\n",
            "status 1: Neuron DKMS Driver is not running! Read the",
        ),
    ],
)
def test_a_test_that_could_not_run_is_skipped(tool, prints: str, skipped: str):
    tool("neuron-ls", DEVICES)
    tool("nccom-test", prints, "exit 1")
    report = collectives()
    assert report.faults == ()
    assert (report.skipped or "").startswith(skipped)


def test_broken_hardware_is_a_fault(tool):
    tool("neuron-ls", DEVICES)
    tool("nccom-test", "execution failed: NRT_EXEC_HW_ERR_HBM_UE, outputs mismatch\n", "exit 1")
    (fault,) = collectives().faults
    assert fault.startswith("the device's memory had an error that nothing corrects")
