import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright import cli
from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import LaunchConfig
from trainwright.errors import BadRequest
from trainwright.launch import reasons, torchrun

PROCS = "launch.procs_per_node=2"


def trainwright(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainwright", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_help_names_the_targets_with_an_example(capsys: pytest.CaptureFixture[str]):
    for words in (["launch"], ["launch", "--help"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        for name, target in cli.TARGETS.items():
            assert f"  {name}  {target.help}\n" in shown
            assert f"  {target.example}\n" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurn"], "slurn is not a target of trainwright launch: torchrun is"),
        (["torchrun", "train.stpes=3"], "train.stpes is not a key of a recipe; the nearest is train.steps"),
        (
            ["torchrun", "launch.nodes=3:2"],
            "launch.nodes=3:2 must be a number of at least 1, or least:most as in 2:4",
        ),
        (
            ["torchrun", "launch.nodes=2"],
            "launch.nodes=2 needs launch.rendezvous=HOST:PORT, the same on all nodes: one of them and a port "
            "that is free there",
        ),
        (
            ["torchrun", PROCS, "launch.rendezvous=node0"],
            "launch.rendezvous=node0 must be HOST:PORT, as in node0:29400",
        ),
        (["torchrun", PROCS, "parallel.tp=4"], "parallel.tp=4 needs a multiple of 4 ranks and this run has 2"),
        (  # the least of the nodes makes a world too
            ["torchrun", PROCS, "launch.nodes=1:2", "launch.rendezvous=a:1", "parallel.tp=4"],
            "parallel.tp=4 needs a multiple of 4 ranks and this run has 2",
        ),
        (
            ["torchrun", PROCS, "seed=1,2", "--multirun"],
            "trainwright launch starts one run: leave --multirun out and launch each of the sweep",
        ),
    ],
)
def test_a_bad_request_is_one_sentence_before_anything_starts(
    words: list[str], sentence: str, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "7")  # an outer launcher's, as in a PyTorchJob's pods
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["launch", *words]) == 2
    assert capsys.readouterr().err == f"trainwright: {sentence}\n"


def test_a_platform_reads_why_a_recipe_was_refused(tmp_path: Path, monkeypatch):
    place = reasons.Place(str(tmp_path / "failure"), "SM_OUTPUT_FAILURE", None, False, 1024)
    monkeypatch.setattr(reasons, "PLACES", (place,))
    assert cli.main(["launch", "torchrun", PROCS, "parallel.tp=4"]) == 2
    said = "parallel.tp=4 needs a multiple of 4 ranks and this run has 2 (bad request)"
    assert (tmp_path / "failure").read_text() == said


def test_hydras_own_habits_work(tmp_path: Path):
    printed = trainwright("launch", "torchrun", PROCS, "--cfg", "job", "--package", "launch", cwd=tmp_path)
    assert "procs_per_node: 2" in printed.stdout
    shown = trainwright("launch", "torchrun", "--help", cwd=tmp_path)
    assert "trainwright launch torchrun" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_supervisor_needs_no_torch():
    code = "import sys, trainwright.launch.torchrun, trainwright.configs.compose; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_torchruns_words():
    recipe = load_recipe(["launch.nodes=2:4", "launch.rendezvous=localhost:29400", "run.name=mine"])
    words = torchrun.command(recipe, "localhost:29400", 8, ["run.dir=${oc.env:HOME}"])
    own, worker = words[3:-4], words[-4:]
    assert own == [
        "--nnodes=2:4",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:29400",
        "--rdzv-id=mine",
        "--rdzv-conf=join_timeout=1800,last_call_timeout=30,keep_alive_interval=5",
        "--max-restarts=20",
        "--monitor-interval=0.2",
        "--shutdown-timeout=100",
        "--local-addr=127.0.0.1",
    ]
    assert worker == ["-m", "trainwright", "train", "run.dir=$${oc.env:HOME}"]  # torchrun makes one $ of two


def test_the_environment_of_torchrun(monkeypatch):
    for name in ("PET_NNODES", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANKS_OF_MINE", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = torchrun.environment("a:1", procs=4096)
    assert made["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert made["RANKS_OF_MINE"] == "7"
    assert not {"PET_NNODES", "RANK", "WORLD_SIZE", "MASTER_ADDR"} & made.keys()
    assert made["OMP_NUM_THREADS"] == "1"  # torchrun would, and warn
    assert "OMP_NUM_THREADS" not in torchrun.environment("a:1", procs=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert torchrun.environment("a:1", procs=8)["OMP_NUM_THREADS"] == "3"


def test_every_world_of_a_range_is_known():
    recipe = load_recipe(["launch.nodes=2:4", "launch.rendezvous=a:1", "launch.procs_per_node=8"])
    assert torchrun.worlds(recipe) == [32, 24, 16]


def test_the_devices_are_counted_elsewhere(monkeypatch):
    assert torchrun.devices(load_recipe(["platform=cpu"])) == 1
    asked = []

    def run(words, **options):
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "8\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    recipe = load_recipe([])
    assert [torchrun.devices(recipe), torchrun.devices(recipe)] == [8, 8]
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["0", "a", "2:1", "1:2:3", "-1", ""])
def test_what_is_no_number_of_nodes(text: str):
    with pytest.raises(BadRequest, match=r"launch\.nodes="):
        torchrun.nodes(LaunchConfig(nodes=text, rendezvous="a:1"))


def test_who_can_meet_where():
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        host.listen()
        assert torchrun.answered(f"127.0.0.1:{host.getsockname()[1]}")
    assert torchrun.answered("localhost:1")  # this node would host it
    assert not torchrun.answered("192.0.2.1:1")  # an address that is nobody's (RFC 5737)
    assert not torchrun.answered("no.such.host.invalid:1")


def test_a_loopback_address_is_for_this_machine_alone():
    assert torchrun.own_address("127.0.0.1:29400") == "127.0.0.1"
    assert torchrun.own_address("no.such.host.invalid:29400") is None


def test_neurons_cores_are_counted_by_its_own_tool(tmp_path: Path, monkeypatch):
    tool = tmp_path / "neuron-ls"
    tool.write_text('#!/bin/sh\necho \'[{"nc_count": 4}, {"nc_count": 4}]\'\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    recipe = load_recipe(["platform=neuron"])
    assert torchrun.devices(recipe) == 8
    recipe.launch.procs_per_node = None
    tool.write_text("#!/bin/sh\necho '[]'\n")
    with pytest.raises(BadRequest, match="neuron-ls lists no core of this node: load its driver"):
        torchrun.devices(recipe)
    tool.unlink()
    with pytest.raises(BadRequest, match=r"neuron-ls can't count this node's cores \(not installed\)"):
        torchrun.devices(recipe)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "two")
    with pytest.raises(BadRequest, match="NEURON_LOGICAL_NC_CONFIG=two in the environment must be 1 or 2"):
        torchrun.devices(recipe)
