import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.flops import training_flops_per_token


def test_the_formula_agrees_with_a_count_of_the_operations():
    recipe, batch = tiny_recipe(), tiny_batch()
    model = Llama(recipe.model)
    init_weights(whole_pieces(model), recipe.model, 0)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counted,
    ):
        model(batch.tokens, None, batch.targets).backward()
    per_token = counted.get_total_flops() / batch.tokens.numel()
    assert abs(per_token / training_flops_per_token(recipe.model, 16) - 1) < 0.01
