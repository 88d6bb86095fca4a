"""One rank on a GPU: `make test-gpu`. Skipped where there is none."""

import json
from pathlib import Path

import pytest
import torch

from trainwright.configs.compose import load_recipe
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
