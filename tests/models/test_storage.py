import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwright.configs.schema import ModelConfig
from trainwright.models.llama import Llama
from trainwright.models.storage import (
    gate_up_block,
    gate_up_rows,
    head_dim,
    kv_heads,
    qkv_rows,
    stored_weights,
)


def divisors(number: int) -> list[int]:
    return [degree for degree in range(1, number + 1) if number % degree == 0]


def test_the_table_names_the_models_parameters(config):
    assert [name for name, _ in stored_weights(config)] == [
        name for name, _ in Llama(config).named_parameters()
    ]


def test_separate_weights_partition_the_stored_rows(config):
    model = Llama(config)
    for stored, separate in stored_weights(config):
        rows = model.get_parameter(stored).shape[0]
        taken = [torch.arange(rows) if own is None else own for _, own, _ in separate]
        assert torch.equal(torch.cat(taken).sort().values, torch.arange(rows)), stored


def test_coalescing_changes_no_separate_name(shape):
    names = [
        sorted(
            separate.name
            for _, weights in stored_weights(ModelConfig(**vars(shape) | {"coalesce": coalesce}))
            for separate in weights
        )
        for coalesce in (True, False)
    ]
    assert names[0] == names[1]


@given(
    groups=st.integers(1, 16),
    per_group=st.integers(1, 8),
    dim=st.sampled_from([2, 8, 64]),
)
def test_a_cut_of_qkv_between_groups_gives_whole_heads_with_their_keys(groups, per_group, dim):
    config = ModelConfig(num_attention_heads=groups * per_group, num_key_value_heads=groups, head_dim=dim)
    q, k, v = qkv_rows(config)
    total = len(q) + len(k) + len(v)
    for tp in divisors(groups):
        for rank, cut in enumerate(torch.arange(total).chunk(tp)):
            own_q, own_k, own_v = (torch.isin(rows, cut).nonzero().flatten() for rows in (q, k, v))
            # The same query heads and KV heads that a cut of the separate weights gives.
            assert torch.equal(own_q, torch.arange(len(q)).chunk(tp)[rank])
            assert torch.equal(own_k, torch.arange(len(k)).chunk(tp)[rank])
            assert torch.equal(own_v, own_k)
    # Within a group: its query heads in order, then its key, then its value.
    group = torch.cat((q.view(groups, -1), k.view(groups, -1), v.view(groups, -1)), dim=1)
    assert torch.equal(group.flatten(), torch.arange(total))


@pytest.mark.parametrize("size", [160, 512, 704, 1376, 1536, 8192, 11008, 14336, 28672])
def test_a_cut_of_gate_up_between_blocks_gives_whole_pairs(size):
    gate, up = gate_up_rows(ModelConfig(intermediate_size=size))
    for tp in divisors(size // gate_up_block(size)):
        for rank, cut in enumerate(torch.arange(2 * size).chunk(tp)):
            own_gate, own_up = (torch.isin(rows, cut).nonzero().flatten() for rows in (gate, up))
            assert torch.equal(own_gate, own_up)
            # Those that a cut of down_proj's columns pairs them with.
            assert torch.equal(own_gate, torch.arange(size).chunk(tp)[rank])


@given(st.integers(1, 1 << 16))
def test_blocks_are_a_power_of_two_and_not_narrow(size):
    block = gate_up_block(size)
    blocks = size // block
    assert size == blocks * block
    assert blocks in (1, 2, 4, 8, 16, 32)
    assert blocks == 1 or block >= 128


@pytest.mark.parametrize(
    ("size", "blocks"), [(704, 4), (1536, 8), (4096, 32), (8192, 32), (11008, 32), (14336, 32), (28672, 32)]
)
def test_well_known_sizes_can_be_cut(size, blocks):
    """A change of these would silently permute the weights of every stored checkpoint."""
    assert size // gate_up_block(size) == blocks


def test_the_stored_rows_depend_on_the_size_alone():
    one = gate_up_rows(ModelConfig(intermediate_size=1536))
    other = gate_up_rows(
        ModelConfig(
            intermediate_size=1536,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=7,
        )
    )
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_what_a_configuration_leaves_out():
    config = ModelConfig(hidden_size=96, num_attention_heads=6)
    assert (head_dim(config), kv_heads(config)) == (16, 6)
    config = ModelConfig(hidden_size=96, num_attention_heads=6, head_dim=32, num_key_value_heads=2)
    assert (head_dim(config), kv_heads(config)) == (32, 2)
