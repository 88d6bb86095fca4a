import re
from collections import Counter

import pytest

from trainwright.configs.schema import ModelConfig
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.trainers.parallel.plan import styles_of, units_of


@pytest.fixture(params=[True, False], ids=["coalesced", "separate"])
def config(request) -> ModelConfig:
    return ModelConfig(num_hidden_layers=12, num_key_value_heads=2, coalesce=request.param)


def test_a_llamas_plan_covers_every_module_with_weights(config):
    styles = styles_of(Llama(config), llama_plan(config))
    groups, columns = ["self_attn.qkv_proj"], ["mlp.gate_up_proj"]
    if not config.coalesce:
        groups = ["self_attn.k_proj", "self_attn.v_proj"]
        columns = ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"]
    expected = {"embed_tokens": "vocabulary", "norm": "sequence", "lm_head": "vocabulary"}
    for layer in range(12):
        expected |= {f"layers.{layer}.{name}": "column" for name in columns}
        expected |= {f"layers.{layer}.{name}": "kv_groups" for name in groups}
        expected |= {f"layers.{layer}.{name}": "row" for name in ("self_attn.o_proj", "mlp.down_proj")}
        norms = ("input_layernorm", "post_attention_layernorm")
        expected |= {f"layers.{layer}.{name}": "sequence" for name in norms}
    assert styles == expected


def test_a_tied_model_is_covered_too(config):
    config.tie_word_embeddings = True
    assert Counter(styles_of(Llama(config), llama_plan(config)).values())["vocabulary"] == 2


def test_the_plan_of_the_other_way_of_storing_is_refused(config):
    other = ModelConfig(**vars(config) | {"coalesce": not config.coalesce})
    with pytest.raises(ValueError, match=r"misses the module layers\.0\.self_attn\.q"):
        styles_of(Llama(config), llama_plan(other))


def test_a_module_that_the_plan_misses_is_named(config):
    plan = {name: style for name, style in llama_plan(config).items() if name != "layers.*.mlp.down_proj"}
    with pytest.raises(ValueError, match=r"misses the module layers\.0\.mlp\.down_proj"):
        styles_of(Llama(config), plan)


def test_a_module_that_the_model_lacks_is_named(config):
    plan = llama_plan(config) | {"layers.*.mlp.router": "replicate"}
    with pytest.raises(ValueError, match=r"names layers\.\*\.mlp\.router, which the model doesn't have"):
        styles_of(Llama(config), plan)


def test_a_star_is_one_number():
    config = ModelConfig(num_hidden_layers=1)
    plan = llama_plan(config)
    plan = {name.replace("layers.*", "layers.0"): style for name, style in plan.items()}
    assert styles_of(Llama(config), plan)["layers.0.self_attn.o_proj"] == "row"
    with pytest.raises(ValueError, match=r"names \*\.0"):
        styles_of(Llama(config), plan | {"*.0.self_attn.o_proj": "row"})


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_a_llama_is_in_one_unit(config, tied):
    config.tie_word_embeddings = tied
    model = Llama(config)
    units = units_of(model, llama_units(config))
    assert len(units) == 12 + (1 if tied else 2)
    held = [{id(weight) for module in unit for weight in module.parameters()} for unit in units]
    assert Counter(weight for unit in held for weight in unit) == {id(w): 1 for w in model.parameters()}


def test_units_come_in_the_order_of_the_forward_pass(config):
    model = Llama(config)
    first, *layers, last = units_of(model, llama_units(config))
    assert first == [model.embed_tokens]
    assert layers == [[layer] for layer in model.layers]
    assert last == [model.norm, model.lm_head]


@pytest.mark.parametrize("name", ["layers.*.mlp.router", "layers.12", "head"])
def test_a_unit_that_the_model_lacks_is_named(config, name):
    with pytest.raises(ValueError, match=rf"has no module {re.escape(name)}, which its units name"):
        units_of(Llama(config), [*llama_units(config), ["norm", name]])
