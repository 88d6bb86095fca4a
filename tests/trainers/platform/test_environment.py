"""What a run's environment gets, whom it heeds, and when."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainwright.configs.compose import load_recipe
from trainwright.errors import BadRequest
from trainwright.trainers.platform import environment
from trainwright.trainers.platform.environment import apply, device_of, in_force, said, stale
from trainwright.trainers.platform.presets import PRESETS, STALE
from trainwright.trainers.run_folder import config_text

DOCS = Path(__file__).parents[3] / "docs" / "trainium.md"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An environment without any of the variables, which is put back."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [variable.name for preset in PRESETS.values() for variable in preset]
    names += [one.name for all_stale in STALE.values() for one in all_stale]
    for name in (*names, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what the test leaves behind goes, too
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_given", {})


@pytest.mark.parametrize(
    ("files", "device"),
    [
        ([], "cpu"),
        (["nvidiactl", "nvidia-uvm"], "cpu"),
        (["nvidia0", "nvidiactl"], "cuda"),
        (["neuron0", "nvidia0"], "neuron"),
    ],
)
def test_auto_is_told_by_the_devices_files(files: list[str], device: str, tmp_path: Path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(environment, "DEV", tmp_path)
    assert device_of("auto") == device
    assert device_of("cpu") == "cpu"


def test_a_cpu_needs_nothing():
    applied = apply(load_recipe(["platform=cpu"]))
    assert (applied.given, applied.kept, list(said(applied))) == ({}, {}, [])


def test_what_neuron_gets_on_one_node():
    given = apply(load_recipe(["platform=neuron", "compile_cache.dir=/fast"])).given
    assert given == {
        "NEURON_RT_EXEC_TIMEOUT": "1800",
        "TORCH_NEURONX_NEFF_CACHE_DIR": "/fast/graphs",
        "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": "/fast/locks",
        "NKI_COMPILE_CACHE_URL": "/fast/nki",
    }
    assert {name: os.environ[name] for name in given} == given


def test_the_runtime_gives_a_start_as_long_as_the_watchdog_does():
    def timeout(seconds: float) -> str:
        os.environ.pop("NEURON_RT_EXEC_TIMEOUT", None)
        return apply(load_recipe(["platform=neuron", f"resilience.start_up_s={seconds}"])).given[
            "NEURON_RT_EXEC_TIMEOUT"
        ]

    assert [timeout(seconds) for seconds in (10, 3600.5)] == ["600", "3601"]


@pytest.mark.parametrize(("world", "local", "nodes"), [("4", "4", 1), ("8", "4", 2), ("8", None, 1)])
def test_several_nodes_talk_over_efa(world: str, local: str | None, nodes: int, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    given = apply(load_recipe(["platform=neuron"])).given
    assert (given.get("FI_PROVIDER"), given.get("FI_EFA_USE_DEVICE_RDMA")) == (
        ("efa", "1") if nodes > 1 else (None, None)
    )


def test_the_device_rounds_where_the_recipe_says_so():
    words = ["platform=neuron", "precision=bf16_sr", "precision.rounding=hardware", f"seed={2**31 + 5}"]
    given = apply(load_recipe(words)).given
    assert given["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "1"
    assert given["NEURON_RT_STOCHASTIC_ROUNDING_SEED"] == "5"


ROUNDS = ["precision=bf16_sr", "precision.rounding=hardware"]


def test_a_device_that_would_round_unasked_is_refused(monkeypatch):
    monkeypatch.setenv("NEURON_RT_STOCHASTIC_ROUNDING_EN", "1")
    apply(load_recipe(["platform=neuron", *ROUNDS]))
    apply(load_recipe(["platform=cpu"]))
    with pytest.raises(
        BadRequest, match="NEURON_RT_STOCHASTIC_ROUNDING_EN=1 in the environment rounds by chance"
    ):
        apply(load_recipe(["platform=neuron", "precision=bf16_sr"]))


@pytest.mark.parametrize("words", [[], ["precision=bf16_sr"], [*ROUNDS, "seed=7"]])
def test_the_next_run_of_a_sweep_cannot_round_otherwise(words: list[str]):
    first = load_recipe(["platform=neuron", *ROUNDS])
    assert apply(first) == apply(first)
    with pytest.raises(BadRequest, match="of an earlier run stays in this process"):
        apply(load_recipe(["platform=neuron", *words]))


def test_the_next_run_of_a_sweep_has_its_own_folder():
    apply(load_recipe(["platform=cpu", "compile_cache.dir=/one"]))
    assert apply(load_recipe(["platform=cpu", "compile_cache.dir=/two"])).given == {
        "TORCHINDUCTOR_CACHE_DIR": "/two/inductor",
        "TRITON_CACHE_DIR": "/two/triton",
    }
    assert apply(load_recipe(["platform=cpu"])).given == {}
    assert "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("platform", ["cpu", "neuron"])
def test_compiled_graphs_are_on_the_nodes_own_disk(platform: str):
    given = apply(load_recipe([f"platform={platform}", "compile_cache.shared=/fsx/graphs"])).given
    folders = [value for name, value in given.items() if "CACHE" in name]
    own = f"{tempfile.gettempdir()}/trainwright-{os.getuid()}"
    assert len(folders) >= 2
    assert all(folder.startswith(f"{own}/compiled/") for folder in folders)
    assert Path(own).stat().st_mode & 0o777 == 0o700


def test_a_folder_for_inductors_graphs():
    given = apply(load_recipe(["platform=cpu", "compile_cache.dir=cache"])).given
    here = Path("cache").absolute()
    assert given == {"TORCHINDUCTOR_CACHE_DIR": f"{here}/inductor", "TRITON_CACHE_DIR": f"{here}/triton"}


def test_a_cache_is_a_folder():
    with pytest.raises(BadRequest, match=r"compile_cache.dir=s3://mine must be a folder"):
        load_recipe(["compile_cache.dir=s3://mine"])


def test_where_graphs_are_kept_names_no_run():
    named = load_recipe([]).run.name
    assert load_recipe(["compile_cache.dir=/fast"]).run.name == named


def test_what_the_user_has_set_stays_and_is_said(monkeypatch):
    monkeypatch.setenv("NEURON_RT_EXEC_TIMEOUT", "60")
    recipe = load_recipe(["platform=neuron", "compile_cache.dir=/fast"])
    applied = apply(recipe)
    assert os.environ["NEURON_RT_EXEC_TIMEOUT"] == "60"
    assert list(said(applied)) == [
        'environment=neuron given="TORCH_NEURONX_NEFF_CACHE_DIR=/fast/graphs '
        'TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR=/fast/locks NKI_COMPILE_CACHE_URL=/fast/nki" '
        'kept="NEURON_RT_EXEC_TIMEOUT=60"'
    ]
    assert apply(recipe) == applied  # the next run of a sweep


def test_an_allocator_under_its_earlier_name_is_the_users(monkeypatch):
    assert apply(load_recipe(["platform=cuda"])).given == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert apply(load_recipe(["platform=cuda"])).given == {}


def test_variables_that_do_nothing_are_told_with_the_release(monkeypatch):
    for name in ("NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "XLA_DOWNCAST_BF16"):
        monkeypatch.setenv(name, "1")
    assert list(stale("neuron")) == [
        "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS in the environment does nothing since Neuron 2.31: the "
        "device runs beside the host without it",
        "XLA_DOWNCAST_BF16 in the environment does nothing since Neuron 2.30: only torch-xla read it, and "
        "Neuron trains with that no more; use precision=bf16_sr",
    ]
    assert list(stale("cpu")) == []


def test_flags_of_a_variable_that_is_read_may_do_nothing(monkeypatch):
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1 --cache_dir=/fsx")
    assert list(stale("neuron")) == [
        "--cache_dir of NEURON_CC_FLAGS in the environment does nothing since Neuron 2.30: only torch-xla read "
        "it, and Neuron trains with that no more; use compile_cache.dir"
    ]
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1")
    assert list(stale("neuron")) == []


def test_a_run_keeps_what_was_in_force(monkeypatch):
    recipe = load_recipe(["platform=neuron", "compile_cache.dir=/fast"])
    monkeypatch.setenv("FI_PROVIDER", "tcp")
    apply(recipe)
    written = OmegaConf.to_container(OmegaConf.create(config_text(recipe, "a device")))
    assert written["environment"] == in_force("neuron")
    assert written["environment"]["FI_PROVIDER"] == "tcp"
    assert written["environment"]["NEURON_RT_EXEC_TIMEOUT"] == "1800"


VERB = """
import os, sys
SEEN = 'torch' in sys.modules, os.environ['NEURON_RT_EXEC_TIMEOUT'], os.environ['FI_PROVIDER']
def verb(recipe):
    print(*SEEN)
"""
START = """
import sys
from trainwright import cli
cli.VERBS['train'] = cli.Verb('', 'verb:verb', '')
sys.exit(cli.main(['train', 'platform=neuron', 'compile_cache.dir=/fast']))
"""


@pytest.mark.parametrize("rank", ["0", "3"])
def test_it_is_there_before_the_verb_is_imported_and_rank_0_says_so(rank: str, tmp_path: Path):
    (tmp_path / "verb.py").write_text(VERB)
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    there |= {"NEURON_FUSE_SOFTMAX": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", START], env={**os.environ, **there}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *lines, seen = done.stdout.splitlines()
    assert seen == "False 1800 efa"
    assert len(lines) == (rank == "0")
    assert done.stderr.count("NEURON_FUSE_SOFTMAX in the environment does nothing") == (rank == "0")


def test_the_docs_have_every_variable():
    text = DOCS.read_text()
    for name in [*(v.name for v in PRESETS["neuron"]), *(one.name for one in STALE["neuron"])]:
        assert f"`{name}`" in text, name
    for one in STALE["neuron"]:
        assert one.word is None or f"`{one.word}`" in text, one.word
