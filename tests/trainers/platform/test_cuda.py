"""One rank on a GPU: `make test-gpu`. Skipped where there is none."""

import json
from pathlib import Path

import pytest
import torch

from trainwright.configs.compose import load_recipe
from trainwright.trainers.health.check import examine
from trainwright.trainers.health.device import memory_fault, products
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.cuda import Cuda
from trainwright.trainers.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def losses(tiny: list[str], name: str, *overrides: str) -> list[float]:
    recipe = load_recipe([*tiny, f"run.name={name}", *overrides])
    train(recipe)
    lines = (Path(recipe.run.dir) / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("masks", ["true", "false"])
def test_a_gpu_gives_the_curve_of_a_cpu(tiny: list[str], masks: str):
    words = [f"data.document_mask={masks}"]
    expected = losses(tiny, "cpu", "platform=cpu", *words)
    assert losses(tiny, "gpu", "platform=cuda", *words) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("words", [["train.activation_checkpointing=selective"], ["train.compile=true"]])
def test_mixed_precision_stays_near_it(tiny: list[str], words: list[str]):
    expected = losses(tiny, "cpu", "platform=cpu")
    found = losses(tiny, "gpu", "platform=cuda", "precision=mixed", *words)
    assert found == pytest.approx(expected, rel=2e-2)


def test_a_gpu_computes_the_same_bits_each_time():
    for digests in products(Cuda()).values():
        assert len(set(digests)) == 1


def test_its_memory_holds_and_is_given_back():
    gpu = Cuda()
    free = gpu.free_memory()
    assert memory_fault(gpu, 1.0, free) is None
    assert gpu.free_memory() > free - 2**28
    assert "GiB of free memory" in str(memory_fault(gpu, 1e4, free))


def test_a_sound_gpu_passes_the_health_check(tiny: list[str]):
    recipe = load_recipe([*tiny, "platform=cuda", "health.memory_gib=1"])
    found = examine(recipe, Ranks(), Cuda(), thorough=True)
    assert (found.bad_nodes(), found.refused, found.failed) == ({}, None, None)
    (reports,) = found.tools.values()
    assert [report.tool for report in reports] == ["nvidia-smi", "dcgmi health", "dcgmi diag"]
