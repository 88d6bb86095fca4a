"""The planning page has the benchmarks' results, and they are near what was measured or published."""

import json
from pathlib import Path

from benchmarks import plan_memory, planning

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_has_the_results():
    page = (DOCS / "planning.md").read_text()
    rows = json.loads(plan_memory.RESULTS.read_text())
    assert page == plan_memory.with_table(page, plan_memory.as_markdown(rows))
    assert page == planning.with_tables(page, planning.tables(json.loads(planning.RESULTS.read_text())))
    assert planning.PLOT.stat().st_size < 100_000


def test_arithmetic_is_what_was_measured():
    rows = json.loads(plan_memory.RESULTS.read_text())
    assert {(row["ranks"], row["words"]) for row in rows} == {
        (ranks, words) for ranks, several in plan_memory.ROWS.items() for words in several
    }
    assert all(abs(row["ratio"] - 1) < 0.15 for row in rows)


def test_published_runs_come_out_and_the_results_are_of_this_code():
    results = json.loads(planning.RESULTS.read_text())
    assert all(0.8 < row["planned"] / row["published"] < 1.2 for row in results["published"])
    assert planning.published()[0] == results["published"][0]


def test_the_clusters_of_the_page_are_those_of_the_files():
    page = (DOCS / "planning.md").read_text()
    for name in ("trn1.32xlarge", "trn2.48xlarge", "p4d", "p5", "p5en", "g6"):
        cluster = planning.recipe_of(f"cluster={name}").cluster
        line = next(line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        cells = [cell.strip() for cell in line.split("|")]
        numbers = [cluster.ranks_per_node, cluster.memory_gib, cluster.peak_tflops, cluster.attainable]
        assert [float(cell) for cell in cells[2:6]] == numbers
        assert float(cells[6].split(";")[0]) == cluster.node_gb_s
        assert float(cells[7]) == cluster.network_gb_s
