import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.checkpoint.saving import save_now
from trainwright.configs.schema import CheckpointConfig
from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.checkpoint import save as saving
from trainwright.trainers.checkpoint.load import newest_whole, read_progress, read_state
from trainwright.trainers.checkpoint.manifest import fault
from trainwright.trainers.checkpoint.place import Place, place
from trainwright.trainers.checkpoint.save import Saver, forget_from, step_name, step_names
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.progress import Progress


def save(folder: Path | str, step: int, **policy: Any) -> Place:
    state = {"model": {"w": torch.full((3,), float(step))}}
    return save_now(folder, state, Progress(step, 7 * step, np.array([[step]])), **policy)


def weights(path: Place) -> list[float]:
    state = {"model": {"w": torch.zeros(3)}}
    read_state(path, state, alone=True)
    return state["model"]["w"].tolist()


def steps(folder: Path) -> list[int]:
    return [int(name.removeprefix("step_")) for name in step_names(place(folder))]


def test_what_was_saved_comes_back(tmp_path: Path):
    path = save(tmp_path, 5)
    assert weights(path) == [5.0, 5.0, 5.0]
    progress = read_progress(path)
    assert (progress.step, progress.tokens, progress.cursor.tolist()) == (5, 35, [[5]])


def test_the_newest_stay(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert steps(tmp_path) == [3, 4]


def test_every_mth_stays_too(tmp_path: Path):
    for step in range(1, 9):
        save(tmp_path, step, keep=1, keep_every=3)
    assert steps(tmp_path) == [3, 6, 8]


def test_a_damaged_later_one_goes_before_a_good_one(tmp_path: Path):
    for step in (100, 200):
        save(tmp_path, step)
    save(tmp_path, 150, keep=1, damaged=("step_00000200",))
    assert steps(tmp_path) == [150]


def test_suspect_ones_take_no_place_of_older_ones(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (4, 5, 6):
        save(tmp_path, step, suspect_from=4)
    assert steps(tmp_path) == [2, 3, 5, 6]
    save(tmp_path, 7)
    assert steps(tmp_path) == [6, 7]


def test_those_from_a_step_on_can_be_forgotten(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    forget_from(place(tmp_path), 4, Ranks())
    assert steps(tmp_path) == [1, 2, 3]
    forget_from(place(tmp_path), 2, Ranks())
    assert steps(tmp_path) == [1]
    forget_from(place(tmp_path / "none"), 1, Ranks())


def test_the_newest_may_be_sought_among_those_before_a_step(tmp_path: Path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)

    def newest(before: int) -> Place | None:
        return newest_whole(place(tmp_path), Ranks(), lambda *_: None, before=before)

    assert [newest(before) for before in (3, 2, 1)] == [two, one, None]


def test_what_is_torn_or_damaged_takes_no_place_of_a_good_one(tmp_path: Path):
    for step in (100, 120, 140):
        save(tmp_path, step, keep=3)
    (tmp_path / "step_00000140" / "manifest.json").unlink()
    save(tmp_path, 160, keep=2, damaged=("step_00000120",))
    assert steps(tmp_path) == [100, 160]


def test_what_killed_saves_have_left_is_tidied_up(tmp_path: Path):
    path = save(tmp_path, 3)
    for name in ("step_00000004.partial", "step_00000003.replaced"):
        (tmp_path / name).mkdir()
    assert newest_whole(place(tmp_path), Ranks(), lambda *_: None) == path
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_that_cannot_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 3)

    def refuse(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Place, "sha256", refuse)
    with pytest.raises(RunFailed, match=r"step_00000003 can't be read .*Input/output error"):
        newest_whole(place(tmp_path), Ranks(), lambda *_: None)


def test_a_store_that_does_not_answer_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch):
    class Gone(Exception):
        """Like botocore's, no OSError."""

    def gone(*args: object, **kwargs: object) -> None:
        raise Gone("no route")

    url = "memory://bucket/gone"
    path = save(url, 3)
    for name in ("info", "_open", "ls"):
        with monkeypatch.context() as patch:
            patch.setattr(type(path.fs), name, gone)
            with pytest.raises((RunFailed, OSError), match="Gone: no route"):
                newest_whole(place(url), Ranks(), lambda *_: None)
            if name == "_open":
                with pytest.raises(OSError, match="Gone: no route"):
                    save(url, 4)
    assert newest_whole(place(url), Ranks(), lambda *_: None) == path
    place(url).remove()


def test_a_save_that_fails_when_it_was_complete_keeps_it(monkeypatch: pytest.MonkeyPatch):
    """On an object store nothing is renamed, so the folder is the checkpoint's own."""
    url = "memory://bucket/late"
    save(url, 3, keep=1)
    write = saving.write_manifest

    def late(*args: Any) -> None:
        write(*args)
        raise OSError("the peers are gone")

    monkeypatch.setattr(saving, "write_manifest", late)
    with pytest.raises(OSError, match="peers are gone"):
        save(url, 4, keep=1)
    found = newest_whole(place(url), Ranks(), lambda *_: None)
    assert found is not None
    assert weights(found) == [4.0, 4.0, 4.0]
    assert step_names(place(url)) == [step_name(3), step_name(4)]
    place(url).remove()


def test_an_unknown_protocol_is_a_bad_request():
    with pytest.raises(BadRequest, match=r"checkpoint\.dir=foo://x can't be used"):
        place("foo://x", "checkpoint.dir")


def test_the_same_step_may_be_saved_again(tmp_path: Path):
    save(tmp_path, 3)
    path = save(tmp_path, 3)
    assert fault(path, Ranks()) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000003"]


def test_a_save_killed_while_it_replaced_a_checkpoint_leaves_that_one(tmp_path: Path):
    path = save(tmp_path, 3)
    (tmp_path / path.name).rename(tmp_path / f"{path.name}.replaced")
    assert newest_whole(place(tmp_path), Ranks(), lambda *_: None) == path
    assert weights(path) == [3.0, 3.0, 3.0]


def test_training_goes_on_while_the_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is saved is the state as it was; until the manifest is written nothing counts."""
    let_go = threading.Event()
    write = saving.write_manifest
    monkeypatch.setattr(saving, "write_manifest", lambda *args: let_go.wait(60) and write(*args))
    saver = Saver(place(tmp_path), "seed: 0\n", Ranks(), Cpu(), CheckpointConfig())
    weight = torch.full((3,), 1.0)
    saver.copy({"model": {"w": weight}})
    saver.begin(Progress(1, 7, np.array([[1]])))
    weight.fill_(2.0)
    assert saver.busy
    assert saver.ended() is None
    assert steps(tmp_path) == []
    let_go.set()
    saved = saver.ended(wait=True)
    assert saved is not None
    assert (saved.step, saved.wrong, saver.busy) == (1, None, False)
    assert saved.bytes > 0
    assert weights(saved.path) == [1.0, 1.0, 1.0]


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, 1)


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "its manifest can't be read"),
        (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
        (lambda path: (path / "progress.json").write_text("{}"), "progress.json is damaged"),
        (lambda path: (path / "state" / "__0_0.distcp").write_bytes(b""), "state/__0_0.distcp is damaged"),
    ],
)
def test_damage_is_named_and_passed_over(harm: Callable[[Path], object], wrong: str, tmp_path: Path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    harm(tmp_path / bad.name)
    said = []
    assert newest_whole(place(tmp_path), Ranks(), lambda *fault: said.append(fault)) == good
    assert said == [(bad, wrong)]


def test_a_store_of_objects_keeps_checkpoints_too():
    """Where nothing can be renamed, the manifest alone says that all is there."""
    url = "memory://bucket/run"
    for step in (1, 2, 3):
        save(url, step)
    folder = place(url)
    assert step_names(folder) == [step_name(2), step_name(3)]
    assert str(folder / step_name(3)) == "memory:///bucket/run/step_00000003"
    folder.fs.rm_file((folder / step_name(3) / "manifest.json").path)
    found = newest_whole(folder, Ranks(), lambda *_: None)
    assert found == folder / step_name(2)
    assert weights(found) == [2.0, 2.0, 2.0]
    save(url, 3)  # what was left of it there doesn't get in the way
    assert fault(folder / step_name(3), Ranks()) is None
    folder.remove()
