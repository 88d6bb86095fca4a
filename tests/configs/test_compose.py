import pytest

from trainwright.configs.compose import load_recipe, recipe_keys
from trainwright.errors import BadRequest


def refusal(*overrides: str) -> str:
    with pytest.raises(BadRequest) as caught:
        load_recipe(overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_overrides_and_groups_reach_the_recipe():
    recipe = load_recipe(["model=llama_34m", "data.tokenizer.vocab_size=8192", "optim.lr=0.5"])
    assert recipe.model.hidden_size == 512
    assert recipe.optim.lr == 0.5


def test_a_whole_recipe_stands_over_the_default_one():
    recipe = load_recipe(["recipe=llama_34m"])
    assert (recipe.model.hidden_size, recipe.train.seq_len) == (512, 512)
    assert load_recipe(["recipe=llama_34m", "train.seq_len=128"]).train.seq_len == 128


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("train.stpes=3", "train.steps"),
        ("train.lr=1", "optim.lr"),
        ("seq_len=8", "train.seq_len"),
        ("parallel.tpp=2", "parallel.tp"),
        ("data.mix.web.wieght=2", "data.mix.NAME.weight"),
        ("+train.stpes=3", "train.steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(typed: str, nearest: str):
    sentence = refusal(typed)
    assert sentence.startswith(typed.split("=")[0].lstrip("+"))
    assert sentence.endswith(f"the nearest is {nearest}")


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("model=llama_5", "model=llama_5m"), ("recipe=defalt", "recipe=default"), ("data=jsnl", "data=jsonl")],
)
def test_an_unknown_option_names_the_nearest(typed: str, nearest: str):
    assert refusal(typed).endswith(f"the nearest is {nearest}")


def test_a_value_of_the_wrong_type_names_the_key_and_the_type():
    assert refusal("train.steps=many") == "train.steps takes a value of type integer, not 'many'"


def test_a_list_and_a_sweep_say_how_they_are_written():
    assert refusal("data.paths=book.txt") == "data.paths takes a list: data.paths=[book.txt]"
    assert "add --multirun" in refusal("optim.lr=1,2")


def test_null_for_a_number_is_no_list():
    assert refusal("optim.lr=null") == "optim.lr doesn't take null: give it a value"


def test_llama3_scaling_is_set_key_by_key():
    assert load_recipe(["model.rope_scaling.factor=8"]).model.rope_scaling.factor == 8.0


def test_a_word_that_is_no_override_is_named():
    assert refusal("steps") == "'steps' is not of the form key=value"


def test_the_default_name_follows_what_is_computed_and_nothing_else():
    name = load_recipe([]).run.name
    assert name is not None
    assert name.startswith("default-")
    assert load_recipe(["run.dir=elsewhere", "monitor.every=7", "checkpoint.keep=9"]).run.name == name
    assert load_recipe(["optim.lr=0.1"]).run.name != name
    assert load_recipe(["train.steps=7"]).run.name != name


def test_every_key_of_the_schema_is_listed_once():
    keys = list(recipe_keys())
    assert len(keys) == len(set(keys))
    assert {"seed", "train.steps", "model.rope_scaling.factor", "data.mix.NAME.weight"} <= set(keys)
