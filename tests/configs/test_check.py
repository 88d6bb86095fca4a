from pathlib import Path

import pytest

from trainwright.configs.compose import load_recipe
from trainwright.errors import BadRequest

PP_2 = ["parallel.pp=2", "model.tie_word_embeddings=false", "train.micro_batch_size=2"]
INTERLEAVED = [*PP_2, "parallel.pp_schedule=interleaved_1f1b"]


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
        (PP_2, "parallel.pp=2 needs a multiple of 2 ranks and this run has 1"),
        (
            ["parallel.ep=2"],
            "parallel.ep=2: this version has no expert parallelism yet; set parallel.ep=1",
        ),
        (["parallel.tp=2"], "parallel.tp=2 needs a multiple of 2 ranks and this run has 1"),
        (
            ["parallel.dp_shard=0"],
            "parallel.dp_shard=0 must be at least 1, or -1 for the ranks that are left",
        ),
        (["platform=tpu"], "platform takes auto or cpu or cuda or neuron, not 'tpu'"),
        (["run.name=../x"], "run.name=../x must be the plain name of a folder; run.dir says where it stands"),
        (["model.moe.num_local_experts=0"], "model.moe.num_local_experts=0 must be at least 1"),
        (
            ["model.moe.load_balancing=none"],
            "model.moe says how experts are used and there are none: give model.moe.num_local_experts",
        ),
        (
            ["model.moe.num_local_experts=1"],
            "model.moe.num_experts_per_tok=2 is above model.moe.num_local_experts=1: "
            "a token goes to an expert once; lower the one or raise the other",
        ),
        (
            ["model.moe.num_local_experts=4", "model.moe.capacity=0.5"],
            "model.moe.capacity=0.5 must be at least 1, room for an even load; "
            "null drops nothing whatever the load",
        ),
        (
            ["model.moe.num_local_experts=4", "model.moe.num_experts_per_tok=1"],
            "model.moe.norm_topk_prob=true makes the only gate of model.moe.num_experts_per_tok=1 always 1, "
            "from which the router learns nothing: set it to false",
        ),
        (
            ["model.moe.num_local_experts=4", "parallel.tp=2"],
            "parallel.tp=2: this version has a mixture of experts on data-parallel ranks only; "
            "set parallel.tp=1; parallel.tp=2 needs a multiple of 2 ranks and this run has 1",
        ),
        (["optim.lr=nan"], "optim.lr=nan must be a number of at least 0.0"),
        (["optim.beta1=2"], "optim.beta1=2.0 must be a number of at least 0.0 and at most 0.9999999"),
        (["plan.hang_share=2"], "plan.hang_share=2.0 must be a number of at least 0.0 and at most 1.0"),
        (["plan.stall_s=-1"], "plan.stall_s=-1.0 must be a number of at least 0.0"),
        (["resilience.hang_floor_s=0"], "resilience.hang_floor_s=0.0 must be a number of at least 1.0"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["train.steps=null"], "a run needs an end: give train.steps or train.epochs"),
        (["optim.min_lr=1"], "optim.min_lr=1.0 is above optim.lr=0.003"),
        (
            ["stability.on_spike=abort"],
            "stability.on_spike takes warn or skip or rollback or stop, not 'abort'",
        ),
        (["stability.on_nonfinite=warn"], "stability.on_nonfinite takes stop or skip or rollback, not 'warn'"),
        (["stability.margin=-1"], "stability.margin=-1.0 must be a number of at least 0.0"),
        (["stability.window=0"], "stability.window=0 must be at least 1"),
        (
            ["stability.on_persistent=rollback", "checkpoint.every=null"],
            "stability.on_persistent=rollback has no checkpoint to go back to: give checkpoint.every",
        ),
        (
            ["precision=bf16", "precision.rounding=hardware"],
            "precision.rounding=hardware goes with precision=bf16_sr, not bf16; drop one of them",
        ),
        (
            ["precision=bf16_sr", "optim.beta1=0.997"],
            "optim.beta1=0.997 would lose the first moment's decay, which precision=bf16_sr rounds to nearest: "
            "use at most 0.996, or precision=mixed",
        ),
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
        (
            ["data.tokenizer.vocab_size=null"],
            "data.tokenizer.path is null and data.tokenizer.vocab_size=null trains none: "
            "name a tokenizer.json or a folder with one",
        ),
        (
            ["train.recompute_keep=[attention,qkv]"],
            "train.recompute_keep takes matmul, attention, qkv_proj, o_proj, gate_up_proj, down_proj, "
            "not 'qkv'; the nearest is qkv_proj",
        ),
        (
            ["train.recompute_keep=[gate_up_proj]", "model.coalesce=false"],
            "train.recompute_keep takes matmul, attention, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
            "down_proj, not 'gate_up_proj'; the nearest is gate_proj",
        ),
        (
            ["train.recompute_keep=[]", "train.activation_checkpointing=selective"],
            "train.recompute_keep is empty: train.activation_checkpointing=full makes everything again",
        ),
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


@pytest.mark.parametrize(
    ("ranks", "overrides", "sentence"),
    [
        (3, ["parallel.tp=2"], "parallel.tp=2 needs a multiple of 2 ranks and this run has 3"),
        (
            6,
            [*PP_2, "parallel.tp=2"],
            "parallel.pp=2 x parallel.tp=2 needs a multiple of 4 ranks and this run has 6",
        ),
        (
            2,
            ["parallel.pp=2", "model.tie_word_embeddings=false", "train.micro_batch_size=8"],
            "parallel.pp=2 with parallel.pp_schedule=1f1b takes at least 2 micro-batches; each "
            "data-parallel rank has 1; train.micro_batch_size=4 would do",
        ),
        (
            16,
            PP_2,
            "parallel.pp=2 with parallel.pp_schedule=1f1b takes at least 2 micro-batches; each "
            "data-parallel rank has 1; train.global_batch_size=16 with train.micro_batch_size=1 would do",
        ),
        (
            3,
            [*INTERLEAVED, "parallel.pp=3", "train.global_batch_size=7", "train.micro_batch_size=1"],
            "parallel.pp=3 with parallel.pp_schedule=interleaved_1f1b takes at least 3 micro-batches, "
            "m of them where m // 3 divides m; each data-parallel rank has 7; train.global_batch_size=3 with "
            "train.micro_batch_size=1 would do",
        ),
        (
            4,
            [*PP_2, "parallel.pp_schedule=zero_bubble"],
            "parallel.pp_schedule=zero_bubble keeps gradients whole until the step's end, which "
            "parallel.zero=3 doesn't: set parallel.zero=1 or 0",
        ),
        (
            2,
            [*PP_2, "parallel.pp_stages=2"],
            "parallel.pp_stages=2 doesn't go with parallel.pp_schedule=1f1b, which has 1; use interleaved_1f1b",
        ),
        (
            2,
            [*INTERLEAVED, "parallel.pp_stages=1"],
            "parallel.pp_schedule=interleaved_1f1b has at least 2 stages a rank: raise parallel.pp_stages=1, "
            "or use 1f1b",
        ),
        (
            2,
            [*INTERLEAVED, "parallel.pp_stages=4"],
            "model.num_hidden_layers=6 is less than the 8 stages of parallel.pp=2 with 4 each: lower "
            "parallel.pp or parallel.pp_stages",
        ),
        (
            2,
            [*PP_2, "model.tie_word_embeddings=true"],
            "model.tie_word_embeddings=true is one table for the first and the last stage, which "
            "parallel.pp=2 has on different ranks: set it to false, or parallel.pp=1",
        ),
        (
            2,
            [*PP_2, "parallel.pp_schedule=zero_bubble", "train.compile=true"],
            "train.compile doesn't go with parallel.pp_schedule=zero_bubble, which parts the backward: use "
            "another schedule",
        ),
        (
            6,
            ["parallel.dp_replicate=2", "parallel.tp=2"],
            "parallel.dp_replicate=2 x parallel.tp=2 needs a multiple of 4 ranks and this run has 6",
        ),
        (
            8,
            ["parallel.dp_shard=2", "parallel.tp=2"],
            "parallel.dp_shard=2 x parallel.tp=2 needs 4 ranks and this run has 8; "
            "parallel.dp_shard=4 would fit",
        ),
        (
            2,
            ["parallel.dp_shard=1"],
            "parallel.dp_shard=1 needs 1 ranks and this run has 2; parallel.dp_shard=2 would fit",
        ),
        (
            5,
            ["parallel.dp_shard=2", "parallel.tp=2"],
            "parallel.dp_shard=2 x parallel.tp=2 needs 4 ranks and this run has 5; start 4",
        ),
        (
            16,
            [],
            "train.global_batch_size=8 must be at least 16, the number of data-parallel ranks",
        ),
        (
            8,
            ["parallel.dp_replicate=2", "parallel.zero=0", "data.lanes=4"],
            "data.lanes=4 must be at least 8, the number of data-parallel ranks",
        ),
        (
            4,
            [
                "parallel.tp=4",
                "model.num_attention_heads=12",
                "model.num_key_value_heads=6",
                "model.hidden_size=240",
            ],
            "parallel.tp=4 doesn't divide model.num_key_value_heads=6; 2 and 3 would",
        ),
        (
            3,
            [
                "parallel.tp=3",
                "model.num_attention_heads=6",
                "model.head_dim=64",
                "model.num_key_value_heads=3",
            ],
            "parallel.tp=3 doesn't divide model.vocab_size=4096; 2 and 4 would; "
            "parallel.tp=3 doesn't divide the 4 blocks that model.intermediate_size=704 is stored in; "
            "2 and 4 would; "
            "parallel.tp=3 doesn't divide train.seq_len=256; 2 and 4 would",
        ),
        (
            3,
            [
                "parallel.tp=3",
                "model.vocab_size=4098",
                "model.coalesce=false",
                "parallel.sp=false",
                "model.num_key_value_heads=null",
            ],
            "parallel.tp=3 doesn't divide model.num_attention_heads=4; 2 and 4 would; "
            "parallel.tp=3 doesn't divide model.intermediate_size=704; 2 and 4 would",
        ),
        (
            2,
            ["precision.reduce=bf16", "parallel.zero=1", "train.micro_batch_size=2"],
            "precision.reduce=bf16 would add up micro-batches in bf16 under parallel.zero=0 and 1 and under "
            "parallel.dp_replicate: raise train.micro_batch_size, or use precision.reduce=fp32",
        ),
    ],
)
def test_a_layout_that_does_not_fit_its_ranks_says_what_would(
    ranks: int, overrides: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert refusal(*overrides) == sentence


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["parallel.sp=true"]),
        (1, ["parallel.dp_shard=1"]),
        (8, []),
        (8, ["parallel.dp_replicate=2", "parallel.tp=2"]),
        (8, ["parallel.dp_replicate=2", "parallel.dp_shard=2", "parallel.tp=2"]),
        (2, ["parallel.tp=2", "parallel.sp=false", "train.seq_len=255"]),
        (16, ["parallel.tp=2"]),
        (2, ["precision.reduce=bf16", "train.micro_batch_size=2"]),
        (2, ["precision.reduce=bf16", "parallel.zero=0", "train.micro_batch_size=4"]),
        (2, PP_2),
        (8, [*PP_2, "parallel.tp=2"]),
        (2, INTERLEAVED),
        (4, [*PP_2, "parallel.pp_schedule=zero_bubble", "parallel.zero=1"]),
        (2, [*PP_2, "parallel.pp_schedule=zero_bubble", "parallel.pp_stages=3"]),
    ],
)
def test_layouts_that_fit_their_ranks(ranks: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    load_recipe(overrides)


@pytest.mark.parametrize(("mode", "beta1"), [("bf16", 0.996), ("bf16_sr", 0.9), ("mixed", 0.999)])
def test_first_moments_that_can_decay(mode: str, beta1: float):
    load_recipe([f"precision={mode}", f"optim.beta1={beta1}"])


def test_a_world_size_that_is_no_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert refusal() == "WORLD_SIZE=two in the environment is no number: unset it or start with torchrun"
