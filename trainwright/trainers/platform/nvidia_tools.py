"""What nvidia-smi and DCGM say of a GPU, read for what makes it unfit to train on."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

from trainwright.trainers.platform.base import ToolReport
from trainwright.trainers.platform.tools import Unavailable, output_of

SMI_TIMEOUT, DCGM_TIMEOUT = 20.0, 60.0  # seconds

# Of the reasons for lower clocks: those in hardware, which last. The software's own pass within moments.
SLOWDOWNS = {
    "hw_slowdown": "a hardware slowdown of its clocks",
    "hw_thermal_slowdown": "clocks lowered for heat",
    "hw_power_brake_slowdown": "clocks lowered by the power supply",
}
# Yes means that the memory is broken, or is until the GPU is reset.
BROKEN = {
    "remapped_row_pending": "memory rows whose remapping waits for a reset",
    "remapped_row_failure": "memory rows that couldn't be remapped",
    "pending_retirement": "memory pages whose retirement waits for a reset",
    "sram_threshold_exceeded": "more SRAM errors than the maker allows",
}
# Of a quick diagnosis: what a reset or another node would mend, not how the node is set up.
HARDWARE = re.compile("remap|retire|inforom", re.IGNORECASE)


def gpu_state(uuid: str) -> ToolReport:
    """nvidia-smi's report on one GPU: memory errors since the driver was loaded, and lowered clocks.

    As XML, because a query by names fails whole where a driver doesn't know one of them.
    """
    try:
        said = output_of("nvidia-smi", "-q", "-x", "-i", uuid, timeout=SMI_TIMEOUT)
        gpu = ElementTree.fromstring(said).find("gpu")
    except Unavailable as error:
        return ToolReport("nvidia-smi", skipped=str(error))
    except ElementTree.ParseError:
        gpu = None
    if gpu is None:
        return ToolReport("nvidia-smi", skipped="its report can't be read")
    return ToolReport("nvidia-smi", tuple(_gpu_faults(gpu)))


def _gpu_faults(gpu: ElementTree.Element) -> Iterator[str]:
    uncorrected = sum(
        int(count.text)
        for count in gpu.findall("ecc_errors/volatile/*")
        if "uncorrectable" in count.tag and (count.text or "").isdigit() and count.text
    )
    if uncorrected:
        yield f"{uncorrected} uncorrected ECC errors since its driver was loaded"
    for item in gpu.iter():
        # The section was called clocks_throttle_reasons, and its entries after it, up to driver 530.
        name = re.sub("^clocks_(event|throttle)_reason_", "", item.tag)
        if item.tag in BROKEN and item.text == "Yes":
            yield BROKEN[item.tag]
        elif name in SLOWDOWNS and item.text == "Active":
            yield SLOWDOWNS[name]


def dcgm_health() -> ToolReport:
    """What DCGM's watches have seen on this node. Whether they run is the node's own affair."""
    return _dcgm("dcgmi health", "health", "-g", "0", "-c", "-j")


def dcgm_diagnosis() -> ToolReport:
    """DCGM's quick diagnosis of this node's GPUs, which takes some seconds."""
    return _dcgm("dcgmi diag", "diag", "-r", "1", "-j")


def _dcgm(tool: str, *words: str) -> ToolReport:
    try:
        said = json.loads(output_of("dcgmi", *words, timeout=DCGM_TIMEOUT))
    except Unavailable as error:
        return ToolReport(tool, skipped=str(error))
    except ValueError:
        return ToolReport(tool, skipped="its report can't be read")
    if words[0] == "health":
        overall = _find(said, "Overall Health")
        verdict = str(overall.get("value")) if isinstance(overall, dict) else "unknown"
        broken = ("a failure of its GPUs' health in DCGM",) if verdict == "Failure" else ()
        return ToolReport(tool, broken, "" if verdict == "Healthy" else verdict)
    failed = sorted(set(_failed_tests(said)))
    faults = tuple(f"a failed DCGM test: {name}" for name in failed if HARDWARE.search(name))
    return ToolReport(tool, faults, "; ".join(name for name in failed if not HARDWARE.search(name)))


def _find(tree: Any, key: str) -> Any:
    """The first value of `key` at any depth: DCGM's releases wrap their reports differently."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    found = (_find(item, key) for item in tree) if isinstance(tree, list) else ()
    return next((value for value in found if value is not None), None)


def _failed_tests(tree: Any) -> Iterator[str]:
    """Name and warnings of each test of which a GPU's result is Fail."""
    if isinstance(tree, list):
        for item in tree:
            yield from _failed_tests(item)
    elif isinstance(tree, dict):
        results = tree.get("results")
        if "name" in tree and isinstance(results, list):
            for result in results:
                if str(result.get("status", "")).lower().startswith("fail"):
                    yield " ".join([str(tree["name"]), *_warnings(result.get("warnings") or [])])
        else:
            yield from _failed_tests(list(tree.values()))


def _warnings(said: Any) -> list[str]:
    """DCGM 3 gives one string, DCGM 4 a list of objects."""
    if isinstance(said, str):
        return [said]
    return [str(item.get("warning", "")) if isinstance(item, dict) else str(item) for item in said]
