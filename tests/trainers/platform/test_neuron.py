"""What the platform knows without a device; what it does with one is in tests/trainers/neuron."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform import environment, neuron
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.platform.neuron import Neuron
from trainwright.trainers.platform.neuron_cores import LNC


def placeholder(folder: Path) -> None:
    """As PyPI's packages of the vendor's names."""
    (folder / "torch_neuronx.py").write_text("raise RuntimeError('WRONG PACKAGE.\\nInstall the other one')")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "ModuleNotFoundError: No module named 'torch_neuronx'"),
        (placeholder, "RuntimeError: WRONG PACKAGE. Ins"),
    ],
)
@pytest.mark.parametrize("platform", ["neuron", "auto"])
def test_it_is_refused_with_why_torch_does_not_know_it(
    there: Callable[[Path], None] | None,
    said: str,
    platform: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "neuron0").touch()
    monkeypatch.setattr(environment, "DEV", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if there:
        there(tmp_path)
    sentence = f"platform={platform}: torch finds no neuron device here ({said}"
    with pytest.raises(BadRequest, match=re.escape(sentence) + ".*; use platform=cpu"):
        choose_platform(platform)


def test_a_number_of_cores_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(LNC, "two")
    with pytest.raises(BadRequest, match="NEURON_LOGICAL_NC_CONFIG=two in the environment must be 1 or 2"):
        Neuron.__new__(Neuron).prepare()


@pytest.mark.parametrize(
    ("instance", "cores", "dtype", "peak"),
    [
        ("trn2.48xlarge", None, torch.bfloat16, 667e12 / 4),
        ("trn2.48xlarge", "1", torch.bfloat16, 667e12 / 8),
        ("trn2.48xlarge", "2", torch.float32, 181e12 / 4),
        ("trn3pre.48xlarge", None, torch.bfloat16, None),
        ("Standard PC", None, torch.bfloat16, None),
        (None, None, torch.bfloat16, None),
    ],
)
def test_a_peak_is_a_logical_cores_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    instance: str | None,
    cores: str | None,
    dtype: torch.dtype,
    peak: float | None,
):
    named = tmp_path / "product_name"
    if instance is not None:
        named.write_text(f"{instance}\n")
    monkeypatch.setattr(neuron, "INSTANCE", named)
    monkeypatch.delenv(LNC, raising=False)
    if cores is not None:
        monkeypatch.setenv(LNC, cores)
    assert Neuron.__new__(Neuron).peak_flops(dtype) == peak
