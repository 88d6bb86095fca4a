"""`trainwright health ...`: check the nodes and show what was found."""

import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from trainwright.configs.schema import Recipe
from trainwright.trainers.health.check import CHECKS, Health, examine, require
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.platform.choose import choose_platform


def health(recipe: Recipe) -> None:
    """Check every node of the launch, and print a line for each.

    Raises:
        BadNode, RunFailed, BadRequest: what is wrong, as it would end a run before its first step.
    """
    platform = choose_platform(recipe.platform)
    platform.prepare()
    first_on_node = os.environ.get("LOCAL_RANK", "0") == "0"
    before = platform.tools_before_use() if first_on_node else []
    with platform.explaining(), open_ranks(recipe.parallel, platform) as ranks:
        found = examine(recipe, ranks, platform, thorough=True, before=before)
        if ranks.first:
            show(found)
        ranks.share(None)  # a rank that fails ends the launch, and rank 0 has to have said what it found
        require(found, ranks)


def show(found: Health) -> None:
    """Print tables in a terminal, `key=value` lines everywhere else."""
    _show_rows(list(_rows(found)))
    for node, reports in found.tools.items():
        for tool in dict.fromkeys(reports):
            if tool.skipped or tool.note:
                said = f"skipped ({tool.skipped})" if tool.skipped else tool.note
                print(f"{node}: {tool.tool}: {said}")
    _show_rows([{"probe": one.probe, "verdict": one.verdict, "found": one.found} for one in found.probes])
    failed = [one for one in found.probes if one.ranks]
    for one in failed:
        print(f"{one.probe} failed on rank {', '.join(map(str, one.ranks))}: {one.touches}")
    well = not (found.bad_nodes() or found.refused or found.failed)
    also = f" probes_failed={len(failed)}" if failed else ""
    print(f"health={'ok' if well else 'failed'}{also} seconds={found.seconds:.2f}", flush=True)


def _show_rows(rows: list[dict[str, str]]) -> None:
    if not rows:
        return
    if sys.stdout.isatty():
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        Console().print(table)
    else:
        for row in rows:
            print(
                " ".join(f'{key}="{value}"' if " " in value else f"{key}={value}" for key, value in row.items())
            )


def _rows(found: Health) -> Iterator[dict[str, str]]:
    for node, ranks in found.nodes.items():
        failed = {fault.check for rank in ranks for fault in found.faults[rank]}
        failed |= ({"disk"} if found.refused else set()) | ({"links"} if found.failed else set())
        left_out = set(found.left_out)
        if all(tool.skipped for tool in found.tools[node]):
            left_out.add("vendor")
        said = {
            check: "failed" if check in failed else "none" if check in left_out else "ok" for check in CHECKS
        }
        disk = found.disk_gib[node]
        yield {
            "node": node,
            "ranks": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
            "product": said["product"],
            "links": said["links"],
            "gb_s": "-" if found.gb_s is None else f"{found.gb_s:.3g}",
            "memory": said["memory"],
            "free_gib": f"{found.free_gib[node]:.1f}",
            "clock": said["clock"],
            "clock_s": f"{found.clocks[node].seconds:+.4f}",
            "disk": said["disk"],
            "disk_gib": "-" if disk is None else f"{disk:.1f}",
            "vendor": said["vendor"],
        }
