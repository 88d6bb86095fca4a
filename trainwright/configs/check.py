"""What a recipe must satisfy beyond its types, checked whole before anything is allocated.

Each check yields sentences; all that apply are reported together.
"""

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from trainwright.configs.blocks import gate_up_block
from trainwright.configs.degrees import (
    STAGES,
    Degrees,
    resolve_degrees,
    rows_in_a_batch,
    stages_per_rank,
    world_size,
)
from trainwright.configs.projections import projections
from trainwright.configs.schema import DataConfig, ModelConfig, MoeConfig, Recipe, SourceConfig
from trainwright.errors import BadRequest


def check_recipe(recipe: Recipe, worlds: Sequence[int] | None = None, *, planned: bool = False) -> None:
    """Raise BadRequest with every sentence that a check has to say.

    worlds: each number of ranks that the run may come to have; the launcher's, if there is one, unless given.
    planned: nothing will be read, so the data needn't be there.
    """
    checks = (*(check for check in CHECKS if check is not _sources), _machines) if planned else CHECKS
    said = [sentence for check in checks for sentence in check(recipe)]
    said += check_layout(recipe, worlds)
    if said:
        raise BadRequest("; ".join(said))


def _words(recipe: Recipe) -> Iterator[str]:
    def walk(node: Any, prefix: str) -> Iterator[str]:
        for item in fields(node):
            value, key = getattr(node, item.name), prefix + item.name
            words = item.metadata.get("one_of")
            if words and value not in words:
                yield f"{key} takes {' or '.join(words)}, not {value!r}"
            elif is_dataclass(value):
                yield from walk(value, key + ".")
            elif isinstance(value, dict):
                for name, entry in value.items():
                    yield from walk(entry, f"{key}.{name}.")

    yield from walk(recipe, "")


POSITIVE = [
    "model.vocab_size",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.max_position_embeddings",
    "model.sliding_window",
    "model.moe.num_local_experts",
    "model.moe.num_experts_per_tok",
    "model.moe.sinkhorn_iterations",
    "data.max_piece_bytes",
    "data.lanes",
    "data.prefetch",
    "train.seq_len",
    "train.steps",
    "train.epochs",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.validate_every",
    "train.validate_sequences",
    "optim.decay_steps",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "monitor.every",
    "stability.window",
    "stability.persistent",
    "parallel.dp_replicate",
    "parallel.tp",
    "parallel.pp",
    "parallel.pp_stages",
    "parallel.ep",
    "launch.procs_per_node",
    "cluster.nodes",
    "cluster.ranks_per_node",
    "cluster.ranks_per_group",
    "plan.runs",
]


def _signs(recipe: Recipe) -> Iterator[str]:
    for key in POSITIVE:
        value = attrgetter(key)(recipe)
        if value is not None and value < 1:
            yield f"{key}={value} must be at least 1"


# Key, lowest and highest value; every number must be finite besides.
RANGES = (
    ("model.rms_norm_eps", 0.0, 1.0),
    ("model.rope_theta", 1.0, math.inf),
    ("model.initializer_range", 0.0, math.inf),
    ("model.moe.router_aux_loss_coef", 0.0, math.inf),
    ("model.moe.router_z_loss_coef", 0.0, math.inf),
    ("data.tokenizer.train_bytes", 1, math.inf),
    ("optim.lr", 0.0, math.inf),
    ("optim.min_lr", 0.0, math.inf),
    ("optim.warmup_steps", 0, math.inf),
    ("optim.constant_steps", 0, math.inf),
    ("optim.beta1", 0.0, 0.9999999),
    ("optim.beta2", 0.0, 0.9999999),
    ("optim.eps", 0.0, 1.0),
    ("optim.weight_decay", 0.0, math.inf),
    ("parallel.zero", 0, 3),
    ("monitor.sample_tokens", 0, math.inf),
    ("checkpoint.minutes", 0.01, math.inf),
    ("resilience.hang_factor", 1.0, math.inf),
    ("resilience.hang_floor_s", 1.0, math.inf),
    ("resilience.start_up_s", 0.0, math.inf),
    ("resilience.slow_factor", 1.0, math.inf),
    ("stability.margin", 0.0, math.inf),
    ("stability.relative_margin", 0.0, math.inf),
    ("stability.rise", 1.0, math.inf),
    ("stability.drift", 1.0, math.inf),
    ("stability.rollbacks", 0, math.inf),
    ("health.bandwidth_gb_s", 0.0, math.inf),
    ("health.memory_gib", 0.0, math.inf),
    ("health.disk_gib", 0.0, math.inf),
    ("health.clock_skew_s", 0.0, math.inf),
    ("launch.restarts", 0, math.inf),
    ("launch.relaunches", 0, math.inf),
    ("launch.shutdown_s", 0.0, math.inf),
    ("cluster.failures_per_node_hour", 0.0, math.inf),
    *((f"cluster.{key}", 1e-6, math.inf) for key in ("memory_gib", "peak_tflops", "network_gb_s")),
    *((f"cluster.{key}", 1e-6, math.inf) for key in ("group_gb_s", "node_gb_s")),
    *((f"cluster.{key}", 1e-6, 1.0) for key in ("attainable", "reached")),
    ("cluster.overlap", 0.0, 1.0),
    *((f"cluster.{key}", 0.0, math.inf) for key in ("reserved_gib", "usd_per_hour")),
    *((f"cluster.{key}", 0.0, math.inf) for key in ("node_latency_us", "network_latency_us")),
    *((f"plan.{part}_s", 0.0, math.inf) for part in ("stall", "slow", "save", "load")),
    *((f"plan.{part}_s", 0.0, math.inf) for part in ("start", "rendezvous", "detect", "hang")),
    ("plan.step_s", 1e-6, math.inf),
    ("plan.hang_share", 0.0, 1.0),
    ("plan.replace_share", 0.0, 1.0),
    ("plan.replace_s", 0.0, math.inf),
    ("plan.storage_gb_s", 1e-6, math.inf),
    ("plan.days", 1e-3, math.inf),
)


def _ranges(recipe: Recipe) -> Iterator[str]:
    for key, lowest, highest in RANGES:
        value = attrgetter(key)(recipe)
        if value is None:
            continue
        if not (math.isfinite(value) and lowest <= value <= highest):
            above = "" if highest == math.inf else f" and at most {highest}"
            yield f"{key}={value} must be a number of at least {lowest}{above}"


def _run(recipe: Recipe) -> Iterator[str]:
    name = recipe.run.name
    if name is not None and (name in ("", ".", "..") or "/" in name or os.sep in name):
        yield f"run.name={name} must be the plain name of a folder; run.dir says where it stands"


def _divides(number: int, by: int, number_key: str, by_key: str) -> Iterator[str]:
    yield from _parts(number, by, f"{number_key}={number}", by_key)


def _parts(number: int, by: int, whole: str, by_key: str) -> Iterator[str]:
    """A sentence where `by` doesn't divide `number`, with the nearest values of `by` that would."""
    if by < 1 or number < 1 or number % by == 0:
        return
    fits = [d for d in range(1, number + 1) if number % d == 0]
    near = sorted(sorted(fits, key=lambda d: abs(d - by))[:2])
    yield f"{by_key}={by} doesn't divide {whole}; {' and '.join(map(str, near))} would"


def _saving(recipe: Recipe) -> Iterator[str]:
    every = recipe.checkpoint.every
    if every not in (None, "auto") and (isinstance(every, str) or every < 1):
        yield f"checkpoint.every={every} must be a number of steps of at least 1, or auto, or null"


def _stability(recipe: Recipe) -> Iterator[str]:
    stability, checkpoint = recipe.stability, recipe.checkpoint
    if checkpoint.every is None and checkpoint.minutes is None:
        for key in ("on_spike", "on_persistent", "on_nonfinite"):
            if getattr(stability, key) == "rollback":
                yield f"stability.{key}=rollback has no checkpoint to go back to: give checkpoint.every"


def _compile_cache(recipe: Recipe) -> Iterator[str]:
    cache = recipe.compile_cache
    for key in ("dir", "shared"):
        if "://" in (getattr(cache, key) or ""):
            yield f"compile_cache.{key}={getattr(cache, key)} must be a folder: compilers know of no URLs"


def _model(recipe: Recipe) -> Iterator[str]:
    model: ModelConfig = recipe.model
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if model.head_dim is None:
        yield from _divides(model.hidden_size, heads, "model.hidden_size", "model.num_attention_heads")
    if kv_heads is not None:
        yield from _divides(heads, kv_heads, "model.num_attention_heads", "model.num_key_value_heads")
    head_dim = model.head_dim or model.hidden_size // max(heads, 1)
    if head_dim % 2:
        yield f"the head dimension {head_dim} must be even for rotary embeddings: change model.head_dim"
    scaling = model.rope_scaling
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (
            f"model.rope_scaling.high_freq_factor={scaling.high_freq_factor} must be above "
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor}"
        )
    if recipe.train.seq_len > model.max_position_embeddings:
        yield (
            f"train.seq_len={recipe.train.seq_len} is above "
            f"model.max_position_embeddings={model.max_position_embeddings}; lower one or raise the other"
        )
    if model.pretrained is not None and not Path(model.pretrained).expanduser().is_dir():
        yield f"model.pretrained={model.pretrained} is not a folder"


def _experts(recipe: Recipe) -> Iterator[str]:
    moe = recipe.model.moe
    experts, chosen = moe.num_local_experts, moe.num_experts_per_tok
    if experts is None:
        if moe != MoeConfig():
            yield "model.moe says how experts are used and there are none: give model.moe.num_local_experts"
        return
    if chosen > experts > 0:  # else _signs has said it
        yield (
            f"model.moe.num_experts_per_tok={chosen} is above model.moe.num_local_experts={experts}: a token "
            "goes to an expert once; lower the one or raise the other"
        )
    if moe.capacity is not None and not 1 <= moe.capacity < math.inf:
        yield (
            f"model.moe.capacity={moe.capacity} must be at least 1, room for an even load; null drops nothing "
            "whatever the load"
        )
    if moe.norm_topk_prob and chosen == 1:
        yield (
            "model.moe.norm_topk_prob=true makes the only gate of model.moe.num_experts_per_tok=1 always 1, "
            "from which the router learns nothing: set it to false"
        )
    for axis in ("tp", "pp"):
        if getattr(recipe.parallel, axis) > 1:
            yield (
                f"parallel.{axis}={getattr(recipe.parallel, axis)}: this version has a mixture of experts on "
                f"data-parallel ranks only; set parallel.{axis}=1"
            )


def _batch(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    yield from _divides(
        train.global_batch_size, train.micro_batch_size, "train.global_batch_size", "train.micro_batch_size"
    )
    lanes = recipe.data.lanes
    if lanes and train.global_batch_size % lanes and lanes % train.global_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size} is neither a multiple nor a divisor of "
            f"data.lanes={lanes}; {lanes} would be"
        )
    if train.steps is None and train.epochs is None:
        yield "a run needs an end: give train.steps or train.epochs"


def _schedule(recipe: Recipe) -> Iterator[str]:
    optim = recipe.optim
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}"
    if optim.clip is not None and not optim.clip > 0:
        yield f"optim.clip={optim.clip} must be above 0; optim.clip=null switches clipping off"


def _recompute(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    words = ("matmul", "attention", *projections(recipe.model.coalesce))
    for word in train.recompute_keep:
        if word not in words:
            (nearest,) = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
            yield f"train.recompute_keep takes {', '.join(words)}, not {word!r}; the nearest is {nearest}"
    if train.activation_checkpointing == "selective" and not train.recompute_keep:
        yield "train.recompute_keep is empty: train.activation_checkpointing=full makes everything again"


def _precision(recipe: Recipe) -> Iterator[str]:
    mode, rounding = recipe.precision.mode, recipe.precision.rounding
    if rounding == "hardware" and mode != "bf16_sr":
        yield f"precision.rounding=hardware goes with precision=bf16_sr, not {mode}; drop one of them"
    beta1 = recipe.optim.beta1
    if mode in ("bf16", "bf16_sr") and 1 - beta1 < 2**-8:  # half of what a bf16 number's last bit can be worth
        yield (
            f"optim.beta1={beta1} would lose the first moment's decay, which precision={mode} rounds to "
            "nearest: use at most 0.996, or precision=mixed"
        )


def _sources(recipe: Recipe) -> Iterator[str]:
    data: DataConfig = recipe.data
    named = {f"data.mix.{name}": source for name, source in data.mix.items()} or {"data": data}
    if data.mix and data.paths:
        yield "give data.paths or data.mix, not both"
    for key, source in named.items():
        yield from _source(key, source)
        if source.streaming and recipe.data.validation.fraction:
            yield f"{key}.streaming=true can't hold documents out: give data.validation.paths instead"
    for path in data.validation.paths:
        yield from _missing("data.validation.paths", path)
    if data.validation.fraction and data.validation.paths:
        yield "give data.validation.fraction or data.validation.paths, not both"
    if not 0 <= data.validation.fraction < 1:
        yield f"data.validation.fraction={data.validation.fraction} must be at least 0 and below 1"
    if data.tokenizer.path is not None:
        yield from _missing("data.tokenizer.path", data.tokenizer.path)
    elif data.tokenizer.vocab_size is None:
        yield (
            "data.tokenizer.path is null and data.tokenizer.vocab_size=null trains none: name a tokenizer.json "
            "or a folder with one"
        )
    elif data.tokenizer.vocab_size > recipe.model.vocab_size:
        yield (
            f"model.vocab_size={recipe.model.vocab_size} is smaller than the tokenizer's "
            f"data.tokenizer.vocab_size={data.tokenizer.vocab_size}; raise the one or lower the other"
        )


def _source(key: str, source: SourceConfig) -> Iterator[str]:
    if not 0 < source.weight < math.inf:
        yield f"{key}.weight={source.weight} must be above 0"
    if source.format == "stdlib":
        return
    if not source.paths:
        yield f"{key}.paths is empty: name the files, folders or globs of format {source.format}"
    if source.format != "hub":
        for path in source.paths:
            yield from _missing(f"{key}.paths", path)
    if source.streaming and source.format != "hub":
        yield f"{key}.streaming=true goes with format hub, not {source.format}"


def _missing(key: str, path: str) -> Iterator[str]:
    expanded = Path(path).expanduser()
    is_glob = any(mark in path for mark in "*?[") and not expanded.exists()
    if is_glob and not any(Path(expanded.anchor or ".").glob(str(expanded.relative_to(expanded.anchor)))):
        yield f"{key}: no file matches {path}"
    elif not is_glob and not expanded.exists():
        yield f"{key}: {path} doesn't exist"


def _machines(recipe: Recipe) -> Iterator[str]:
    """Whether a plan is for the devices of its cluster."""
    cluster = recipe.cluster
    if cluster.instance is not None and recipe.platform not in ("auto", cluster.platform):
        yield (
            f"platform={recipe.platform} isn't that of {cluster.instance}, whose devices are "
            f"{cluster.platform}: use platform=auto"
        )


def check_layout(recipe: Recipe, worlds: Sequence[int] | None = None) -> Iterator[str]:
    """What is wrong with the degrees of parallelism; worlds: as in `check_recipe`."""
    parallel = recipe.parallel
    if parallel.ep > 1:
        yield f"parallel.ep={parallel.ep}: this version has no expert parallelism yet; set parallel.ep=1"
    said_world = os.environ.get("WORLD_SIZE", "1")
    if worlds is None and not said_world.isdigit():
        yield f"WORLD_SIZE={said_world} in the environment is no number: unset it or start with torchrun"
        return
    if parallel.dp_shard < 1 and parallel.dp_shard != -1:
        yield f"parallel.dp_shard={parallel.dp_shard} must be at least 1, or -1 for the ranks that are left"
    elif min(parallel.dp_replicate, parallel.tp, parallel.pp) > 0:  # else _signs has said it
        for world in (world_size(),) if worlds is None else worlds:
            if said := list(_ranks(recipe, world)):  # one world that doesn't fit says enough
                yield from said
                break
        yield from _tensor_parallel(recipe)
        yield from _pipeline(recipe)


def _ranks(recipe: Recipe, world: int) -> Iterator[str]:
    """Whether the degrees make `world` ranks, and each has a share of the batch."""
    parallel = recipe.parallel
    rest = parallel.dp_shard == -1
    degrees = {axis: getattr(parallel, axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp")}
    said = " x ".join(
        f"parallel.{axis}={degree}"
        for axis, degree in degrees.items()
        if degree > 1 or (axis == "dp_shard" and not rest)
    )
    fixed = parallel.pp * parallel.dp_replicate * parallel.tp
    needed = fixed * parallel.dp_shard
    if rest and world % fixed:
        yield f"{said} needs a multiple of {fixed} ranks and this run has {world}"
    elif not rest and needed != world:
        fits = f"start {needed}" if world % fixed else f"parallel.dp_shard={world // fixed} would fit"
        yield f"{said} needs {needed} ranks and this run has {world}; {fits}"
    else:
        data_ranks = resolve_degrees(parallel, world).data
        for key in ("train.global_batch_size", "data.lanes"):
            number = attrgetter(key)(recipe)
            if number is not None and 0 < number < data_ranks:
                yield f"{key}={number} must be at least {data_ranks}, the number of data-parallel ranks"
        yield from _reduction(recipe, resolve_degrees(parallel, world))
        yield from _scheduled(recipe, resolve_degrees(parallel, world))


def _reduction(recipe: Recipe, degrees: Degrees) -> Iterator[str]:
    """Micro-batches add up in fp32: where FSDP adds them up in the dtype that travels, that has to be fp32."""
    train, parallel = recipe.train, recipe.parallel
    lanes = recipe.data.lanes or train.global_batch_size
    if recipe.precision.reduce == "fp32" or degrees.data == 1 or lanes < 1 or train.micro_batch_size < 1:
        return
    several = rows_in_a_batch(lanes, train.global_batch_size, degrees.data) > train.micro_batch_size
    if several and (parallel.zero <= 1 or degrees.dp_replicate > 1):
        yield (
            "precision.reduce=bf16 would add up micro-batches in bf16 under parallel.zero=0 and 1 and under "
            "parallel.dp_replicate: raise train.micro_batch_size, or use precision.reduce=fp32"
        )


def _scheduled(recipe: Recipe, degrees: Degrees) -> Iterator[str]:
    """Whether the pipeline's schedule can take each rank's micro-batches, and how gradients are reduced."""
    train, pp, schedule = recipe.train, degrees.pp, recipe.parallel.pp_schedule
    lanes = recipe.data.lanes or train.global_batch_size
    if pp == 1 or min(lanes, train.global_batch_size, train.micro_batch_size) < 1:
        return
    if schedule not in STAGES:  # _words has said it
        return
    rows = rows_in_a_batch(lanes, train.global_batch_size, degrees.data)
    has = math.ceil(rows / train.micro_batch_size)
    fits = [
        size
        for size in range(1, rows + 1)
        if train.global_batch_size % size == 0 and _takes(schedule, pp, math.ceil(rows / size))
    ]
    if not _takes(schedule, pp, has):
        needs = f"at least {pp} micro-batches"
        if schedule != "1f1b":
            needs += f", m of them where m // {pp} divides m"
        change = (
            f"train.micro_batch_size={max(fits)} would do"
            if fits
            else f"train.global_batch_size={pp * degrees.data} with train.micro_batch_size=1 would do"
        )
        yield (
            f"parallel.pp={pp} with parallel.pp_schedule={schedule} takes {needs}; each "
            f"data-parallel rank has {has}; {change}"
        )
    if schedule == "zero_bubble" and degrees.data > 1 and recipe.parallel.zero > 1:
        yield (
            f"parallel.pp_schedule=zero_bubble keeps gradients whole until the step's end, which "
            f"parallel.zero={recipe.parallel.zero} doesn't: set parallel.zero=1 or 0"
        )


def _takes(schedule: str, pp: int, micro_batches: int) -> bool:
    """Whether a schedule of `pp` ranks can take so many micro-batches.

    With fewer than ranks nothing is a pipeline. The interleaved ones go in micro_batches // pp rounds of equal
    length, which is PyTorch's condition.
    """
    return micro_batches >= pp and (schedule == "1f1b" or micro_batches % (micro_batches // pp) == 0)


def _pipeline(recipe: Recipe) -> Iterator[str]:
    """Whether the model can be cut into the pipeline's stages."""
    parallel, model = recipe.parallel, recipe.model
    if parallel.pp == 1 or parallel.pp_schedule not in STAGES:  # _words has said it
        return
    schedule = f"parallel.pp_schedule={parallel.pp_schedule}"
    stages = stages_per_rank(parallel)
    if parallel.pp_schedule == "1f1b" and stages > 1:
        yield f"parallel.pp_stages={stages} doesn't go with {schedule}, which has 1; use interleaved_1f1b"
    if parallel.pp_schedule == "interleaved_1f1b" and stages == 1:
        yield f"{schedule} has at least 2 stages a rank: raise parallel.pp_stages=1, or use 1f1b"
    if model.num_hidden_layers < parallel.pp * stages:
        yield (
            f"model.num_hidden_layers={model.num_hidden_layers} is less than the {parallel.pp * stages} stages "
            f"of parallel.pp={parallel.pp} with {stages} each: lower parallel.pp or parallel.pp_stages"
        )
    if model.tie_word_embeddings:
        yield (
            "model.tie_word_embeddings=true is one table for the first and the last stage, which "
            f"parallel.pp={parallel.pp} has on different ranks: set it to false, or parallel.pp=1"
        )
    if parallel.pp_schedule == "zero_bubble" and recipe.train.compile:
        yield f"train.compile doesn't go with {schedule}, which parts the backward: use another schedule"


def _tensor_parallel(recipe: Recipe) -> Iterator[str]:
    """Whether `parallel.tp` ranks can have equal parts of everything that they part."""
    model, tp = recipe.model, recipe.parallel.tp
    for key in ("num_attention_heads", "vocab_size"):
        yield from _divides(getattr(model, key), tp, f"model.{key}", "parallel.tp")
    kv_heads = model.num_key_value_heads or 0
    if kv_heads > 0 and tp % kv_heads:  # a multiple of them is fine: ranks then share each
        yield from _divides(kv_heads, tp, "model.num_key_value_heads", "parallel.tp")
    size = model.intermediate_size
    if model.coalesce and size > 0:
        blocks = size // gate_up_block(size)
        whole = f"the {blocks} blocks that model.intermediate_size={size} is stored in"
        yield from _parts(blocks, tp, whole, "parallel.tp")
    else:
        yield from _divides(size, tp, "model.intermediate_size", "parallel.tp")
    if recipe.parallel.sp is not False:
        yield from _divides(recipe.train.seq_len, tp, "train.seq_len", "parallel.tp")


CHECKS = (
    _words,
    _signs,
    _ranges,
    _saving,
    _stability,
    _compile_cache,
    _run,
    _model,
    _experts,
    _batch,
    _recompute,
    _schedule,
    _precision,
    _sources,
)
