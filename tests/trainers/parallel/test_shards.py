"""The part of a model that each rank makes."""

import resource

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import ModelConfig, ParallelConfig
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.models.storage import Piece, whole_pieces
from trainwright.trainers.parallel.apply import parallelize
from trainwright.trainers.parallel.ranks import AXES, Ranks, open_ranks
from trainwright.trainers.parallel.shards import local_pieces, materialise
from trainwright.trainers.platform.cpu import Cpu

SMALL = ModelConfig(
    vocab_size=48, hidden_size=20, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, head_dim=6
)


def filled_pieces(ranks: Ranks, config: ModelConfig) -> dict[str, Piece]:
    with torch.device("meta"):
        model = Llama(config)
    plan, units = llama_plan(config), llama_units(config)
    parallelize(model, plan, units, ranks, ParallelConfig(), torch.float32, Cpu())
    materialise(model, torch.device("cpu"))
    pieces = local_pieces(model)
    init_weights(pieces, config, seed=3)
    return pieces


def pieces_here(parallel: ParallelConfig, config: ModelConfig) -> dict[str, Piece]:
    with open_ranks(parallel, Cpu()) as ranks:
        return filled_pieces(ranks, config)


# The hidden size 20 is cut in 3 with a remainder.
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"zero": 0}),
        (3, {}),
        (2, {"tp": 2}),
        (4, {"tp": 2}),
        (4, {"tp": 2, "dp_replicate": 2}),
        (4, {"tp": 4}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_those_of_the_whole(run_on_ranks, ranks, parallel, tied):
    config = ModelConfig(**{**vars(SMALL), "tie_word_embeddings": tied})
    model = Llama(config)
    init_weights(whole_pieces(model), config, seed=3)
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    seen = {name: torch.zeros_like(weight) for name, weight in whole.items()}
    for pieces in run_on_ranks(pieces_here, ranks, ParallelConfig(**parallel), config):
        assert pieces.keys() == whole.keys()
        for name, (values, row, column, _) in pieces.items():
            part: tuple[slice, ...] = (slice(row, row + values.shape[0]),)
            if values.dim() > 1:
                part += (slice(column, column + values.shape[1]),)
            assert torch.equal(values, whole[name][part]), name
            seen[name][part] += 1
    for name, times in seen.items():
        assert times.min() >= 1, name


def one_of_512() -> tuple[int, int, float]:
    """Parameters of the model, elements of this rank's part, and how much memory (GiB) its making took."""
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    degrees = Degrees(dp_shard=64, tp=8)
    # torch's fake process group sends nothing, so one rank of many can be looked at alone.
    dist.init_process_group("fake", rank=77, world_size=512, store=FakeStore())
    mesh = init_device_mesh("cpu", degrees, mesh_dim_names=AXES)
    here = Ranks(77, 512, 77, degrees, data_rank=77 // 8, data_ranks=64, tp_rank=77 % 8, mesh=mesh)
    pieces = filled_pieces(here, config)
    dist.destroy_process_group()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(config).parameters())
    return parameters, sum(piece.values.numel() for piece in pieces.values()), (after - before) / 2**20


def test_70_billion_parameters_never_exist_whole(run_on_ranks):
    ((parameters, own, gib),) = run_on_ranks(one_of_512, 1)
    assert parameters > 68e9
    assert own < 1.01 * parameters / 512
    assert gib < 2 * 4 * own / 2**30
