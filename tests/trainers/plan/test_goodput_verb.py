import json
import subprocess
import sys
from importlib.resources import files

import pytest

from trainwright.cli import main
from trainwright.configs.compose import load_recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.goodput_outlook import plan
from trainwright.trainers.plan.goodput_parts import Cluster, cluster, measured_in_run, parameter_count, parts
from trainwright.trainers.plan.goodput_parts import Measured as M
from trainwright.trainers.plan.goodput_verb import lines
from trainwright.trainers.plan.wording import spoken

MEASURED = {
    "stall_s": 0.05,
    "slow_s": 0.05,
    "save_s": 1.0,
    "load_s": 0.5,
    "start_s": 20.0,
    "rendezvous_s_per_rank": 0.01,
    "detect_s": 2.0,
    "step_s": 1.0,
    "bytes_per_node": 60e6,
}
FAST = ["plan.runs=20", "plan.days=10"]


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "recovery.json"
    path.write_text(json.dumps(MEASURED))
    return f"plan.measured={path}"


@pytest.fixture
def refusal(capsys):
    def refused(*words):
        assert main(["plan", "goodput", *words]) == 2
        return capsys.readouterr().err

    return refused


def test_the_verb_prints_its_inputs_and_results_and_writes_them(measured, tmp_path, capsys):
    words = [measured, f"plan.dir={tmp_path}", "cluster.nodes=128", "launch.procs_per_node=8", *FAST]
    assert main(["plan", "goodput", *words]) == 0
    printed = capsys.readouterr().out
    for said in (
        "nodes 128, ranks 1,024, parameters 5,475,584; a failure every 48.8 h",
        "a rank's × 1,024 ranks",
        "a hang, a node replaced",
        "1e-3, as Meta's research clusters",
        "effective utilisation: 99.",
        "98.81 % with automatic recovery, 77.83 % by hand",
        f"plan={tmp_path / 'goodput_plan.html'}",
    ):
        assert said in printed, said
    record = json.loads((tmp_path / "goodput_plan.json").read_text())
    assert record["mtbf_s"] == pytest.approx(3600 / (128 * 1.6e-4))
    assert record["utilisation"] == pytest.approx(record["simulated"]["mean"], abs=2e-3)
    page = (tmp_path / "goodput_plan.html").read_text()
    assert page.count("<figure>") == 3
    assert "http" not in page
    assert "nan" not in page.split("<body>")[1]


def test_it_needs_no_torch(measured, tmp_path):
    code = (
        "import sys; from trainwright.cli import main;"
        f"main(['plan', 'goodput', {measured!r}, 'plan.dir={tmp_path}', 'plan.runs=2']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_what_is_not_known_is_one_sentence(refusal, measured, tmp_path):
    assert refusal() == (
        "trainwright: plan.stall_s isn't known (a save holds the loop): give it in seconds, or measure it by "
        "python benchmarks/recovery.py and give plan.measured=benchmarks/results/recovery.json\n"
    )
    assert "can't be read" in refusal(f"plan.measured={tmp_path / 'none.json'}")
    (tmp_path / "else.json").write_text('{"tokens": 1}')
    assert "has none of" in refusal(f"plan.measured={tmp_path / 'else.json'}")
    assert "is no run's folder" in refusal(f"plan.measured={tmp_path}")
    assert "plan.days=0.0 must be a number" in refusal(measured, "plan.days=0")
    (tmp_path / "file").touch()
    assert "can't be written to" in refusal(measured, f"plan.dir={tmp_path / 'file'}", *FAST)


def test_a_subject_that_is_none(capsys):
    assert main(["plan", "memroy"]) == 2
    assert "memroy is not a subject of trainwright plan" in capsys.readouterr().err
    assert main(["plan"]) == 0
    assert "  goodput  " in capsys.readouterr().out


def test_parts_scale_by_their_rules():
    wishes = load_recipe(["plan.start_s=7"]).plan
    seconds = {
        "stall": 0.1,
        "slow": 0.0,
        "save": 2.0,
        "load": 1.0,
        "rendezvous": 0.01,
        "detect": 3.0,
        "step": 0.5,
    }
    on = Cluster(nodes=10, ranks=80, parameters=1_000_000_000, failures_per_node_hour=0)
    found = {key: part.seconds for key, part in parts(wishes, M(seconds, 120e6), on).items()}
    assert found == pytest.approx(
        {
            "stall": 1.0,
            "slow": 0,
            "save": 20,
            "load": 10,
            "start": 7,
            "rendezvous": 0.8,
            "detect": 3,
            "hang": 3,  # none was measured
            "step": 0.5,
        }
    )
    small = Cluster(nodes=1000, ranks=8000, parameters=1_000_000_000, failures_per_node_hour=0)
    found = {key: part.seconds for key, part in parts(wishes, M(seconds, 120e6), small).items()}
    assert (found["stall"], found["save"]) == (0.1, 2.0)  # never less than measured
    wishes.storage_gb_s = 2.0
    found = {key: part.seconds for key, part in parts(wishes, M(seconds, 120e6), small).items()}
    assert (found["stall"], found["save"], found["load"]) == (0.1, 6.0, 6.0)
    with pytest.raises(BadRequest, match="bytes_per_node"):
        parts(wishes, M(seconds), on)


def test_a_hang_takes_its_bound_and_what_was_measured_beyond_it(tmp_path):
    (tmp_path / "recovery.json").write_text(json.dumps(MEASURED | {"hang_s": 6.0}))
    recipe = load_recipe([f"plan.measured={tmp_path / 'recovery.json'}", "resilience.hang_floor_s=60", *FAST])
    down = {kind.name: kind.seconds for kind in plan(recipe).outlook.costs.restarts}
    assert down["a hang"] - down["a crash"] == pytest.approx(60 + 6 - 2)


MODELS = [file.name.removesuffix(".yaml") for file in files("trainwright.configs").joinpath("model").iterdir()]


@pytest.mark.parametrize(
    "words",
    [
        *([f"model={name}"] for name in MODELS),
        ["model.num_key_value_heads=2", "model.tie_word_embeddings=true", "model.head_dim=48"],
    ],
)
def test_parameters_are_those_of_the_model(words: list[str]):
    from trainwright.trainers.parallel.ranks import Ranks
    from trainwright.trainers.plan.rehearsal_step import Blank
    from trainwright.trainers.platform.cpu import Cpu

    recipe = load_recipe([*words, "train.seq_len=64", "data.tokenizer.vocab_size=300"])
    built = Blank(recipe, Ranks()).build_model(Cpu())
    assert parameter_count(recipe.model) == sum(p.numel() for p in built.parameters())


def test_a_runs_own_folder_tells_the_parts(tmp_path):
    events = [
        {"event": "checkpoint_begun", "step": 2, "stall_s": 0.5},
        {"event": "checkpoint", "step": 2, "write_s": 3.0, "bytes": 77},
        {"event": "checkpoint", "step": 4, "write_s": 4.0, "bytes": 77},
    ]
    marks = [
        {"t": 100.0, "at": "begin"},
        {"t": 110.0, "at": "start", "step": 0},
        *({"t": 112.0 + i, "at": "step", "step": i + 1, "step_s": 1.0, "data_s": 0.0} for i in range(2)),
        {"t": 113.0, "at": "stall", "stall_s": 0.0},
        {"t": 114.25, "at": "step", "step": 3, "step_s": 1.25, "data_s": 0.0},
        {"t": 114.25, "at": "written"},
        {"t": 115.0, "at": "step", "step": 4, "step_s": 1.0, "data_s": 0.0},
        {"t": 121.0, "at": "begin"},
        {"t": 135.0, "at": "resume", "step": 2},
        {"t": 136.0, "at": "step", "step": 3, "step_s": 1.0, "data_s": 0.0},
        {"t": 138.0, "at": "stop", "reason": "Preempted: SIGTERM"},
        {"t": 900.0, "at": "begin"},
        {"t": 903.0, "at": "stop", "reason": "RuntimeError: a peer is gone"},
        {"t": 906.0, "at": "begin"},
    ]
    for name, records in (("events", events), ("ledger", marks)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = measured_in_run(tmp_path)
    assert found.bytes_per_node == 77
    assert found.seconds == {
        "stall": 0.5,
        "slow": 0.25,
        "save": 3.5,
        "step": 1.0,
        "detect": 6.0,
        "start": 11.0,
        "load": 3.0,
        "rendezvous": 0.0,
    }


def test_without_failures_and_at_the_ends(measured):
    made = plan(load_recipe([measured, "cluster.failures_per_node_hour=0", "cluster.nodes=4", *FAST]))
    assert made.outlook.utilisation == 1
    assert made.outlook.losses["held by saves"] == 0
    assert any("best interval: never" in line for line in lines(made))
    every = plan(load_recipe([measured, "cluster.failures_per_node_hour=100", "cluster.nodes=4000", *FAST]))
    assert 0 <= every.outlook.utilisation < 0.01
    assert list(lines(every))


def test_nodes_are_those_of_the_launch_unless_given():
    assert cluster(load_recipe(["launch.nodes=2:6", "launch.procs_per_node=4"])).ranks == 24
    assert cluster(load_recipe(["launch.nodes=2", "cluster.nodes=9"])).nodes == 9


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0128, "12.8 ms"), (2.5, "2.5 s"), (250, "4m10s"), (175781, "48.8 h"), (7.5e6, "86d19h")],
)
def test_times_are_read_at_a_glance(seconds, text):
    assert spoken(seconds) == text
