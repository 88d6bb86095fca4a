import random
from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone

STEPS = 40


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long paragraphs among many single words: ranks hold numbers of targets that differ by some percent."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(1, 7))) for _ in range(200)]
    lengths = draw.choices([1, 150], weights=[100, 1], k=3000)
    paragraphs = (" ".join(draw.choices(words, k=length)) for length in lengths)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path


@pytest.fixture(scope="session")
def base(text: Path) -> list[str]:
    """A recipe that four ranks can share in any way; its schedule doesn't move with train.steps."""
    return [
        "data=text",
        f"data.paths=[{text}]",
        "data.document=blank_line",
        "data.validation.fraction=0.1",
        f"data.cache_dir={text.parent / 'cache'}",
        "data.tokenizer.vocab_size=300",
        "model.vocab_size=300",
        "model.hidden_size=64",
        "model.intermediate_size=512",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=4",
        "model.tie_word_embeddings=false",
        "train.seq_len=48",
        "train.steps=30",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "train.validate_every=10",
        "train.validate_sequences=8",
        "optim.lr=1e-3",
        "optim.min_lr=1e-4",
        "optim.warmup_steps=5",
        f"optim.decay_steps={STEPS}",
        "checkpoint.every=null",
        "monitor.every=10",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        f"run.dir={text.parent / 'runs'}",
    ]


@pytest.fixture(scope="session")
def alone(run_on_ranks: RankPool, base: list[str]) -> Alone:
    """`alone("precision=mixed")`: the metrics of 40 steps on a single process."""
    return Alone(run_on_ranks, base, STEPS)
