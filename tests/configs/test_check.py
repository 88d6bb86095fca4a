from pathlib import Path

import pytest

from trainwright.configs.compose import load_recipe
from trainwright.errors import BadRequest


def refusal(*overrides: str) -> str:
    with pytest.raises(BadRequest) as caught:
        load_recipe(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["train.micro_batch_size=3"],
            "train.micro_batch_size=3 doesn't divide train.global_batch_size=8; 2 and 4 would",
        ),
        (
            ["model.num_key_value_heads=3"],
            "model.num_key_value_heads=3 doesn't divide model.num_attention_heads=4; 2 and 4 would",
        ),
        (
            ["parallel.tp=2", "parallel.pp=2"],
            "parallel.tp=2 x parallel.pp=2 needs a multiple of 4 ranks and this run has 1",
        ),
        (["platform=tpu"], "platform takes auto or cpu or cuda, not 'tpu'"),
        (["run.name=../x"], "run.name=../x must be the plain name of a folder; run.dir says where it stands"),
        (["optim.lr=nan"], "optim.lr=nan must be a number of at least 0.0"),
        (["optim.beta1=2"], "optim.beta1=2.0 must be a number of at least 0.0 and at most 0.9999999"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.steps=null"], "a run needs an end: give train.steps or train.epochs"),
        (["optim.min_lr=1"], "optim.min_lr=1.0 is above optim.lr=0.003"),
        (["optim.clip=0"], "optim.clip=0.0 must be above 0; optim.clip=null switches clipping off"),
        (
            ["train.seq_len=2048"],
            "train.seq_len=2048 is above model.max_position_embeddings=1024; lower one or raise the other",
        ),
        (
            ["model.vocab_size=1000"],
            "model.vocab_size=1000 is smaller than the tokenizer's data.tokenizer.vocab_size=4096; "
            "raise the one or lower the other",
        ),
        (
            ["model.rope_scaling.high_freq_factor=1"],
            "model.rope_scaling.high_freq_factor=1.0 must be above model.rope_scaling.low_freq_factor=1.0",
        ),
        (["data=text"], "data.paths is empty: name the files, folders or globs of format text"),
        (["data=text", "data.paths=[no.txt]"], "data.paths: no.txt doesn't exist"),
        (["data=text", "data.paths=['no*.txt']"], "data.paths: no file matches no*.txt"),
        (["data.tokenizer.path=no.json"], "data.tokenizer.path: no.json doesn't exist"),
        (["data.validation.fraction=1"], "data.validation.fraction=1.0 must be at least 0 and below 1"),
        (
            ["data.lanes=3"],
            "train.global_batch_size=8 is neither a multiple nor a divisor of data.lanes=3; 3 would be",
        ),
    ],
)
def test_a_recipe_that_cannot_run_says_why_and_what_would(overrides: list[str], sentence: str):
    assert refusal(*overrides) == sentence


def test_all_that_is_wrong_is_said_at_once():
    assert refusal("train.steps=0", "optim.clip=0").count(";") == 2


def test_sources_of_a_mix_are_checked_by_name(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    good = [f"data.mix.a.paths=[{tmp_path / 'a.txt'}]"]
    load_recipe(["data=mix", *good])
    assert refusal("data=mix", *good, "data.mix.a.weight=0") == "data.mix.a.weight=0.0 must be above 0"
    assert refusal("data=mix", "data.mix.b.paths=[no]") == "data.mix.b.paths: no doesn't exist"


def test_world_size_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert refusal("parallel.tp=2") == "parallel.tp=2 needs a multiple of 2 ranks and this run has 3"
