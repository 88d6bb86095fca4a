"""What nvidia-smi and dcgmi print, from executables of that name on PATH that print it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainwright.trainers.platform import nvidia_tools
from trainwright.trainers.platform.base import ToolReport
from trainwright.trainers.platform.nvidia_tools import dcgm_diagnosis, dcgm_health, gpu_state

# The parts of `nvidia-smi -q -x` (driver 550) that are read, and some around them.
SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
    <driver_version>550.90.07</driver_version>
    <attached_gpus>1</attached_gpus>
    <gpu id="00000000:53:00.0">
        <product_name>NVIDIA H100 80GB HBM3</product_name>
        <clocks_event_reasons>
            <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
            <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
            <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
            <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
        </clocks_event_reasons>
        <ecc_errors>
            <volatile>
                <sram_correctable>4</sram_correctable>
                <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
                <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
                <dram_correctable>7</dram_correctable>
                <dram_uncorrectable>0</dram_uncorrectable>
            </volatile>
            <aggregate>
                <dram_uncorrectable>9</dram_uncorrectable>
                <sram_threshold_exceeded>No</sram_threshold_exceeded>
            </aggregate>
        </ecc_errors>
        <retired_pages>
            <pending_retirement>N/A</pending_retirement>
        </retired_pages>
        <remapped_rows>
            <remapped_row_unc>1</remapped_row_unc>
            <remapped_row_pending>No</remapped_row_pending>
            <remapped_row_failure>No</remapped_row_failure>
        </remapped_rows>
    </gpu>
</nvidia_smi_log>
"""
UNCORRECTED = ("<dram_uncorrectable>0<", "<dram_uncorrectable>2<")
PENDING = ("<remapped_row_pending>No<", "<remapped_row_pending>Yes<")
FAILURE = ("<remapped_row_failure>No<", "<remapped_row_failure>Yes<")
HOT = ("hw_thermal_slowdown>Not Active<", "hw_thermal_slowdown>Active<")
OLD = ("clocks_event_reason", "clocks_throttle_reason")
NO_ECC = ("<dram_uncorrectable>0<", "<dram_uncorrectable>N/A<")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`tool(name, prints, script)`: an executable on PATH, which has no other."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, prints: str = "", more: str = "") -> Path:
        (tmp_path / "said").write_text(prints)
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n{more}\nexec /bin/cat {tmp_path}/said\n')
        path.chmod(0o755)
        return tmp_path / "asked"

    return make


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ([], ()),
        ([NO_ECC], ()),
        ([UNCORRECTED], ("2 uncorrected ECC errors since its driver was loaded",)),
        ([PENDING], ("memory rows whose remapping waits for a reset",)),
        ([HOT], ("clocks lowered for heat",)),
        ([HOT, OLD], ("clocks lowered for heat",)),
        ([FAILURE, HOT], ("clocks lowered for heat", "memory rows that couldn't be remapped")),
    ],
)
def test_what_nvidia_smi_says_of_a_gpu(tool, changes: list[tuple[str, str]], faults: tuple[str, ...]):
    said = SMI
    for old, new in changes:
        assert old in said
        said = said.replace(old, new)
    asked = tool("nvidia-smi", said)
    assert gpu_state("GPU-1") == ToolReport("nvidia-smi", faults)
    assert asked.read_text() == "-q -x -i GPU-1\n"


def test_a_tool_that_is_not_there_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for report in gpu_state("GPU-1"), dcgm_health(), dcgm_diagnosis():
        assert (report.faults, report.skipped) == ((), "not installed")


def test_a_tool_that_fails_or_says_nonsense_is_skipped(tool):
    tool("nvidia-smi", more="echo No devices were found >&2; exit 6")
    assert gpu_state("GPU-1").skipped == "status 6: No devices were found"
    for nonsense in "", "<a>", "<a/>":
        tool("nvidia-smi", nonsense)
        assert gpu_state("GPU-1").skipped == "its report can't be read"
    tool("dcgmi", "Error: health watches not enabled")
    assert dcgm_health().skipped == "its report can't be read"


def test_a_tool_that_hangs_is_given_up(tool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nvidia_tools, "SMI_TIMEOUT", 0.2)
    tool("nvidia-smi", more="exec /bin/sleep 60")
    started = time.monotonic()
    assert gpu_state("GPU-1").skipped == "no answer in 0 s"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("verdict", "faults", "note"),
    [
        ("Healthy", (), ""),
        ("Warning", (), "Warning"),
        ("Failure", ("a failure of its GPUs' health in DCGM",), "Failure"),
    ],
)
def test_what_dcgm_has_watched(tool, verdict: str, faults: tuple[str, ...], note: str):
    asked = tool("dcgmi", json.dumps({"body": {"Overall Health": {"value": verdict}}, "header": ["Report"]}))
    assert dcgm_health() == ToolReport("dcgmi health", faults, note)
    assert asked.read_text() == "health -g 0 -c -j\n"


def diagnosis(wrapped_in: str, *tests: dict[str, Any]) -> str:
    return json.dumps({wrapped_in: {"test_categories": [{"category": "Deployment", "tests": list(tests)}]}})


def test_of_a_diagnosis_only_what_is_broken_is_a_fault(tool):
    tool(
        "dcgmi",
        diagnosis(
            "DCGM GPU Diagnostic",
            {"name": "Denylist", "results": [{"gpu_ids": "0,1", "status": "PASS"}]},
            {"name": "Persistence Mode", "results": [{"gpu_ids": "0", "status": "Fail", "warnings": "off"}]},
            {"name": "Page Retirement/Row Remap", "results": [{"gpu_ids": "1", "status": "Fail"}]},
        ),
    )
    faults = ("a failed DCGM test: Page Retirement/Row Remap",)
    assert dcgm_diagnosis() == ToolReport("dcgmi diag", faults, "Persistence Mode off")


def test_a_diagnosis_of_dcgm_4(tool):
    warning = {"error_id": 83, "warning": "Row remap failure on GPU 0"}
    results = [{"entity_id": 0, "status": "Fail", "warnings": [warning]}, {"entity_id": 1, "status": "Pass"}]
    asked = tool("dcgmi", diagnosis("DCGM Diagnostic", {"name": "software", "results": results}))
    assert dcgm_diagnosis().faults == ("a failed DCGM test: software Row remap failure on GPU 0",)
    assert asked.read_text() == "diag -r 1 -j\n"
