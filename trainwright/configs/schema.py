"""The typed schema of a recipe: every key, its type, its default and what it means.

The YAML files beside this module fill it in and nothing else reads YAML. Field names are the keys of
the command line (``train.seq_len=512``). Where a string key takes one of a few words, they stand in the
field's metadata and `trainwright.configs.check` holds the recipe to them.
"""

from dataclasses import dataclass, field
from typing import Any


def one_of(*words: str) -> Any:
    """A string field that takes one of `words`; the first is the default."""
    return field(default=words[0], metadata={"one_of": words})


@dataclass
class RunConfig:
    name: str | None = None  # folder below run.dir; the recipe's name and a short hash unless given
    dir: str = "runs"


@dataclass
class RopeScaling:
    """Llama 3.1's frequency scaling (Transformers' `rope_scaling`, `rope_type: llama3`)."""

    factor: float = 1.0  # 1: no scaling; Llama 3.1's own is 8
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class MoeConfig:
    """A mixture of experts in place of each layer's feed-forward (docs/moe.md), under Transformers' names."""

    num_local_experts: int | None = None  # null: none, each layer has one dense feed-forward
    num_experts_per_tok: int = 2
    load_balancing: str = one_of("aux_loss", "sinkhorn", "balanced", "none")
    router_aux_loss_coef: float = 0.01  # of aux_loss
    router_z_loss_coef: float = 0.001  # of the mean square of the logits' log-sum-exp; 0: none
    norm_topk_prob: bool = True  # a token's gates sum to 1; false: its probabilities among all experts
    sinkhorn_iterations: int = 16
    capacity: float | None = None  # room of an expert over its share of an even load; null: drop nothing


@dataclass
class ModelConfig:
    """A decoder's shape, under Transformers' names."""

    family: str = one_of("llama")
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # num_attention_heads unless given (GQA when fewer)
    head_dim: int | None = None  # hidden_size / num_attention_heads unless given
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    scaled_init: bool = False  # o_proj and down_proj start smaller, by the square root of twice the layers
    sliding_window: int | None = None  # tokens attend to so many, themselves included; null: to all before them
    moe: MoeConfig = field(default_factory=MoeConfig)
    coalesce: bool = True  # store q, k, v as one matrix and gate, up as one; the initial values don't change
    pretrained: str | None = None  # a Hugging Face folder whose weights the run starts from


@dataclass
class SourceConfig:
    """One source of documents and how to cut it into them."""

    format: str = one_of("text", "stdlib", "jsonl", "arrow", "parquet", "hub")
    paths: list[str] = field(default_factory=list)  # files, folders or globs; for hub: the data set's name
    pattern: str = "*"  # which files of a folder
    document: str = one_of("file", "blank_line", "line")  # text: what a document is
    text_key: str = "text"  # jsonl, arrow, parquet, hub: the field that holds the text
    subset: str | None = None  # hub: the data set's configuration
    split: str = "train"  # hub
    streaming: bool = False  # hub: read shards over the network instead of fetching them first
    on_error: str = one_of("refuse", "skip")  # a file that isn't UTF-8, a broken JSON line
    weight: float = 1.0  # share of the tokens among several sources


@dataclass
class TokenizerConfig:
    path: str | None = None  # a tokenizer.json or a folder with one; trained on the data unless given
    vocab_size: int | None = 4096  # of the byte-level BPE that is trained; null: none is, give path
    train_bytes: int = 8_000_000  # how much text it is trained on


@dataclass
class ValidationConfig:
    fraction: float = 0.0  # share of the documents held out of training
    paths: list[str] = field(default_factory=list)  # or files of their own, read like the training source


@dataclass
class DataConfig(SourceConfig):
    mix: dict[str, SourceConfig] = field(default_factory=dict)  # several sources, by name, instead of paths
    max_piece_bytes: int = 65536  # longer documents are cut at whitespace
    lanes: int | None = None  # train.global_batch_size unless given
    document_mask: bool = True  # tokens attend to their own document only
    prefetch: int = 4  # batches made ahead of the step
    cache_dir: str = "~/.cache/trainwright"  # indexes and trained tokenizers
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class TrainConfig:
    seq_len: int = 256
    steps: int | None = 1000
    epochs: int | None = None  # stop after so many passes over the data, if train.steps doesn't come first
    global_batch_size: int = 8  # sequences in an optimizer step
    micro_batch_size: int = 8  # sequences in one forward and backward of one rank
    activation_checkpointing: str = one_of("none", "selective", "full")
    # selective: whose results are kept: matmul, attention, or a projection by its name (qkv_proj, ...)
    recompute_keep: list[str] = field(default_factory=lambda: ["matmul", "attention"])
    compile: bool = False
    validate_every: int | None = None  # steps; also at the end wherever there is validation data
    validate_sequences: int = 64


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up, a constant phase, then decay to `min_lr`."""

    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_steps: int = 0
    constant_steps: int = 0
    schedule: str = one_of("cosine", "linear", "constant")
    decay_steps: int | None = None  # the step at which min_lr is reached; the last step unless given
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: str = one_of("matrices", "all")  # which parameters weight decay acts on
    clip: float | None = 1.0  # the global gradient norm is held below this


@dataclass
class PrecisionConfig:
    # mixed: bf16 compute over fp32 master weights and optimizer state; bf16: those in bf16 too, to nearest;
    # bf16_sr: rounded stochastically
    mode: str = one_of("fp32", "mixed", "bf16", "bf16_sr")
    reduce: str = one_of("fp32", "bf16")  # in which gradients are summed over ranks
    rounding: str = one_of("optimizer", "hardware")  # bf16_sr: what rounds; hardware: the device itself


@dataclass
class ParallelConfig:
    """Degrees of parallelism; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = -1  # -1: what is left
    tp: int = 1
    sp: bool | None = None  # on with tp unless given
    pp: int = 1
    pp_schedule: str = one_of("1f1b", "interleaved_1f1b", "zero_bubble")
    pp_stages: int | None = None  # of each rank: 2 for interleaved_1f1b, 1 for the others, unless given
    ep: int = 1
    zero: int = 3  # 0 to 3; says nothing in one process
    engine: str = one_of("fsdp2")


@dataclass
class CheckpointConfig:
    dir: str | None = None  # a folder or an fsspec URL (s3://bucket/run); the run's own folder unless given
    every: int | str | None = 500  # steps; auto: from the measured stall and cluster's failures; null: the last
    minutes: float | None = None  # besides, whenever so long has gone by since the last
    keep: int = 2  # how many of the newest to keep
    keep_every: int | None = None  # steps: those whose step is a multiple are never deleted


@dataclass
class ResilienceConfig:
    """When a run is taken to hang, and what is done about a batch that kills it."""

    hang_factor: float = 10.0  # a step that takes so many times the running median is a hang
    hang_floor_s: float = 60.0  # but never before so many seconds
    start_up_s: float = 1800.0  # the same for all that comes before the second step: loading, compiling
    slow_factor: float = 1.3  # a rank that works so many times as long as the median rank is named
    pass_over_batch: bool = False  # a batch that has killed the run twice is left out


@dataclass
class StabilityConfig:
    """What in a step's numbers is trouble, and what is done about it (docs/stability.md)."""

    window: int = 20  # steps that r, the running mean of the gradient norm, is taken over
    margin: float = 0.1  # a step whose norm is above r + margin spikes
    relative_margin: float | None = None  # it has to be above r + relative_margin * r, too
    persistent: int = 20  # steps; a spike that is longer is persistent
    rise: float = 3.0  # a warning: r is above so many times its lowest since the warm-up
    drift: float = 3.0  # a warning: the parameter norm moves so many times as fast as it used to
    on_spike: str = one_of("warn", "skip", "rollback", "stop")
    on_persistent: str = one_of("warn", "rollback", "stop")
    on_nonfinite: str = one_of("stop", "skip", "rollback")  # a loss or a norm that is NaN or infinite
    on_rise: str = one_of("warn", "stop")
    on_drift: str = one_of("warn", "stop")
    rollbacks: int = 3  # of a run; instead of another it stops


@dataclass
class HealthConfig:
    """What a node must come up to before the first step; null: not asked."""

    check: bool = True
    bandwidth_gb_s: float | None = None  # of an all-reduce: the bytes of the buffer over its seconds
    memory_gib: float | None = None  # that can be had on each device
    disk_gib: float = 1.0  # free where checkpoints go
    clock_skew_s: float = 5.0  # between any two nodes


@dataclass
class CompileCacheConfig:
    """Where compiled graphs are kept, so that a restart finds them."""

    dir: str | None = None  # on the node's own disk; below the folder for temporary files unless given
    shared: str | None = None  # a folder of all nodes: copied from before a run, and to after it


@dataclass
class LaunchConfig:
    """How `trainwright launch torchrun` starts the ranks of a node."""

    nodes: str = "1"  # a number, or least:most of a run that goes on with fewer
    procs_per_node: int | None = None  # one for each device unless given, on a CPU one
    rendezvous: str | None = None  # host:port of the node where all meet; needed for more than one node
    restarts: int = 20  # in place, without leaving the node
    relaunches: int = 3  # of the whole agent, where restarting in place didn't help
    shutdown_s: float = 100.0  # what ranks have to save in after SIGTERM


@dataclass
class ClusterConfig:
    """The machines that a run is planned for; `cluster=NAME` describes one kind of them (docs/planning.md)."""

    nodes: int | None = None  # those that the run has unless given
    failures_per_node_hour: float = 1.6e-4  # Llama 3's 419 in 54 days on 2,048 nodes (arXiv 2407.21783)
    instance: str | None = None  # what a node is called
    platform: str = one_of("cpu", "cuda", "neuron")  # of its devices
    ranks_per_node: int | None = None
    ranks_per_group: int | None = None  # of a node's those that a faster link joins, as those of a chip
    memory_gib: float | None = None  # of a rank
    reserved_gib: float = 1.0  # of that, what drivers and communication take: an assumption
    peak_tflops: float | None = None  # of a rank: 10^12 dense bf16 operations a second
    attainable: float = 0.5  # the share of that peak that a step's matrix products come to
    overlap: float = 0.8  # of their time, the share beside which data-parallel ranks communicate for nothing
    group_gb_s: float | None = None  # of a rank to others of its group, one way
    node_gb_s: float | None = None  # to others of its node
    network_gb_s: float | None = None  # of a node to others
    reached: float = 0.8  # the share of these that large collectives come to: an assumption
    node_latency_us: float = 5.0  # of a hop inside the node: an assumption
    network_latency_us: float = 20.0  # and between nodes
    usd_per_hour: float | None = None  # of a node
    priced: str | None = None  # how, where and when


@dataclass
class PlanConfig:
    """What `trainwright plan` does; of `goodput`, null: from `measured`, by the rules of docs/recovery.md."""

    dir: str = "."  # where the page and the JSON go
    rehearse: bool = False  # besides build the model and its step for all ranks, without memory (--rehearse)
    measured: str | None = None  # a JSON file of benchmarks/recovery.py, or a run's folder
    stall_s: float | None = None  # that a save holds the loop
    slow_s: float | None = None  # that the steps beside a save take longer, all together
    save_s: float | None = None  # that it is written beside the training
    load_s: float | None = None  # that a checkpoint is read
    start_s: float | None = None  # from a process's start to its first step, without the load
    rendezvous_s: float | None = None  # that all ranks take to find each other
    detect_s: float | None = None  # from a process's death to the start of new ones on all nodes
    hang_s: float | None = None  # likewise from the end of a hang's bound
    step_s: float | None = None  # of a step
    hang_share: float = 0.1  # of failures: nothing dies, resilience.hang_* must tell
    replace_share: float = 0.5  # of failures: a node has to be replaced
    replace_s: float = 120.0  # until a node stands in for another; a fresh machine takes 10 to 20 minutes
    storage_gb_s: float | None = None  # what shared storage takes from all nodes together
    days: float = 54.0  # of a simulated run
    runs: int = 400  # that are simulated


@dataclass
class MonitorConfig:
    every: int = 1  # console: print each N-th step
    tensorboard: bool = True
    wandb: bool = False
    mlflow: bool = False
    project: str = "trainwright"  # W&B's project, MLflow's experiment
    sample_prompt: str | None = None  # text that the model continues at the end of the run
    sample_tokens: int = 120


@dataclass
class Recipe:
    """A whole run."""

    seed: int = 0
    platform: str = one_of("auto", "cpu", "cuda", "neuron")
    resume: str = "auto"  # auto: the newest checkpoint of the run; none: afresh; or a checkpoint's folder
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    compile_cache: CompileCacheConfig = field(default_factory=CompileCacheConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
