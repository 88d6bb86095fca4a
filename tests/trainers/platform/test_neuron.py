"""What the platform knows without a device; what it does with one is in tests/trainers/neuron."""

from pathlib import Path

import pytest
import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform import neuron
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.platform.neuron import LNC, Neuron


def test_it_is_refused_where_torch_neuronx_is_not():
    with pytest.raises(BadRequest, match="platform=neuron: torch finds no neuron device here; use platform=c"):
        choose_platform("neuron")


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
