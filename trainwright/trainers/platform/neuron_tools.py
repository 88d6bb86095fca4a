"""What neuron-ls, neuron-monitor and nccom-test say of a node, read for what makes it unfit to train on.

By the tools' user guides of the Neuron SDK 2.32. They don't give the keys of nccom-test's JSON file, which are
taken to be the names of its table's columns.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainwright.trainers.platform.base import ToolReport
from trainwright.trainers.platform.device_errors import known_in
from trainwright.trainers.platform.neuron_cores import listed_devices, neuron_cores, number_at
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS
from trainwright.trainers.platform.tools import Failed, Unavailable, first_line_of, output_of

MONITOR_TIMEOUT, NCCOM_TIMEOUT = 20.0, 300.0  # seconds; nccom-test compiles first

# What neuron-monitor is asked for: by itself it reports every 5 s, and more.
PERIOD = "1s"
ASKED = {
    "period": PERIOD,
    "neuron_runtimes": [{"tag_filter": ".*", "metrics": [{"type": "execution_stats"}]}],
    "system_metrics": [{"type": "neuron_hw_counters"}],
}
# Counters since the driver was loaded. What was corrected is no fault.
BROKEN = {
    "mem_ecc_uncorrected": "uncorrected errors of its memory: replace the node",
    "sram_ecc_uncorrected": "uncorrected errors of its cores' memory: replace the node",
    "mem_ecc_repairable_uncorrected": "memory errors that a reload of the driver repairs",
}
COLLECTIVE = ("allr", "-b", "1kb", "-e", "1mb", "-f", "32", "-d", "fp32", "--check", "--non-interactive")
# A line that says that data are wrong, and not a version, an argument or the like.
WRONG_SUM = re.compile(
    r"^(?=.*\b(?:data|sums?|values?|results?|outputs?|tensors?|elements?|buffers?)\b)"
    r"(?=.*\b(?:golden|mismatch\w*|incorrect|wrong|corrupt\w*|not match)\b)"
    r"(?!.*\b(?:versions?|arguments?|options?|flags?|usage|types?|sizes?|shapes?|number of)\b).*$",
    re.IGNORECASE | re.MULTILINE,
)


def device_listing() -> ToolReport:
    """neuron-ls: how many devices of which size the node has."""
    try:
        devices = listed_devices()
    except Unavailable as error:
        return ToolReport("neuron-ls", skipped=str(error))
    if not devices:
        return ToolReport("neuron-ls", skipped="it lists no device")
    count = sum(number_at(device, "nc_count") for device in devices)
    sizes = sorted({round(number_at(device, "memory_size") / 2**30) for device in devices})
    each = " or ".join(map(str, sizes))
    return ToolReport("neuron-ls", note=f"{len(devices)} devices of {each} GiB, {count} cores")


def hardware_counters() -> ToolReport:
    """neuron-monitor's first report: errors of every device's memory, and of what runs on them."""
    with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
        config = Path(folder) / "monitor.json"
        config.write_text(json.dumps(ASKED))
        try:
            said = json.loads(first_line_of("neuron-monitor", "-c", str(config), timeout=MONITOR_TIMEOUT))
        except Unavailable as error:
            return ToolReport("neuron-monitor", skipped=str(error))
        except ValueError:
            return ToolReport("neuron-monitor", skipped="its report can't be read")
    counters = _at(said, "system_data", "neuron_hw_counters", "neuron_devices")
    if not isinstance(counters, list):
        why = _at(said, "system_data", "neuron_hw_counters", "error") or "no counters of the hardware"
        return ToolReport("neuron-monitor", skipped=f"it has {why}")
    failed = _execution_errors(said)
    return ToolReport("neuron-monitor", tuple(_counted(counters)), "; ".join(failed))


def collectives() -> ToolReport:
    """nccom-test: all-reduces of known numbers among all cores, which nothing else may use meanwhile."""
    try:
        count = neuron_cores()
    except Unavailable as error:
        return ToolReport("nccom-test", skipped=f"neuron-ls: {error}")
    if count < 2:
        return ToolReport("nccom-test", skipped=f"{count} cores have nothing to reduce")
    with tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
        report = Path(folder) / "report.json"
        words = ("-r", str(count), *COLLECTIVE, "--report-to-json-file", str(report))
        try:
            printed = output_of("nccom-test", *words, timeout=NCCOM_TIMEOUT)
        except Failed as error:
            return _failed_collectives(error.output, str(error))
        except Unavailable as error:
            return ToolReport("nccom-test", skipped=str(error))
        if "test failed" in printed:
            return _failed_collectives(printed, "it failed")
        try:
            results = _at(json.loads(report.read_text()), "results")
        except (OSError, ValueError):
            results = None
    return ToolReport("nccom-test", note=f"{count} cores' sums are right{_speed(results)}")


def _at(tree: Any, *keys: str) -> Any:
    """The value below these keys; None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _counted(counters: list[Any]) -> Iterator[str]:
    for device in counters:
        for key, meaning in BROKEN.items():
            if isinstance(device, dict) and (count := number_at(device, key)):
                yield f"device {device.get('neuron_device_index')} with {count} {meaning}"


def _execution_errors(said: Any) -> list[str]:
    """Of whatever runs on the devices: how many executions have failed in the last second, and how."""
    runtimes = _at(said, "neuron_runtime_data")
    counts: dict[str, int] = {}
    for runtime in runtimes if isinstance(runtimes, list) else []:
        summary = _at(runtime, "report", "execution_stats", "error_summary")
        for kind, count in summary.items() if isinstance(summary, dict) else ():
            counts[kind] = counts.get(kind, 0) + (count if isinstance(count, int) else 0)
    return [f"{count} executions with {kind} errors" for kind, count in counts.items() if count]


def _failed_collectives(output: str, why: str) -> ToolReport:
    """A wrong sum is the node's fault; that the test couldn't run may be anybody's, and is said."""
    if known := known_in(output, NEURON_ERRORS):
        said = known.sentence()
        return (
            ToolReport("nccom-test", (said,)) if known.of_the_node else ToolReport("nccom-test", skipped=said)
        )
    if (wrong := WRONG_SUM.search(output)) and "Failure running" not in output:
        line = " ".join(wrong.group().split())[:200]
        return ToolReport("nccom-test", (f"collectives with wrong sums ({line})",))
    lines = [line for line in output.splitlines() if "Failure running" in line or "error" in line.lower()]
    return ToolReport("nccom-test", skipped=" ".join(lines[0].split())[:200] if lines else why)


def _speed(results: Any) -> str:
    """The largest size's bandwidth, if the report says it."""
    rows = [row for row in results if isinstance(row, dict)] if isinstance(results, list) else []
    for key, value in rows[-1].items() if rows else ():
        if key.startswith("busbw") and isinstance(value, int | float):
            return f", {value:.3g} GiB/s a rank at {rows[-1].get('size(B)')} bytes"
    return ""
