"""What nodes share of what they have compiled."""

import os
import tempfile
from pathlib import Path

import pytest

from trainwright import cli
from trainwright.configs.compose import load_recipe
from trainwright.errors import BadRequest
from trainwright.trainers.platform import environment, graph_cache
from trainwright.trainers.platform.graph_cache import make_own_folder, own_folder, sharing


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def shared(folder: Path, *words: str):
    return load_recipe([f"compile_cache.shared={folder}", *words])


def test_it_is_read_before_and_written_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fsx, own = tmp_path / "fsx", tmp_path / "own"
    (fsx / "graphs" / "ab").mkdir(parents=True)
    (fsx / "graphs" / "ab" / "old.neff").write_text("old")
    (fsx / "graphs" / "both").write_text("theirs")
    own.mkdir()
    (own / "both").write_text("ours")
    with sharing(shared(fsx), {"graphs": str(own)}):
        assert contents(own) == {"ab/old.neff": "old", "both": "ours"}
        (own / "new.neff").write_text("new")
        for unfinished in ("new.tmp", "a.lock", ".trainwright-x", "tmp.pid_3"):
            (own / unfinished).touch()
    assert contents(fsx) == {"graphs/ab/old.neff": "old", "graphs/both": "theirs", "graphs/new.neff": "new"}
    read, written = capsys.readouterr().out.splitlines()
    assert read.startswith(f"compile_cache={fsx} read=1 seconds=")
    assert written.startswith(f"compile_cache={fsx} written=1 seconds=")
    with sharing(shared(fsx), {"graphs": str(own)}):
        pass
    assert capsys.readouterr().out == ""


def test_a_run_that_fails_leaves_what_it_has_compiled(tmp_path: Path):
    def fails() -> None:
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "new").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError), sharing(shared(tmp_path / "fsx"), {"graphs": str(tmp_path / "own")}):
        fails()
    assert contents(tmp_path / "fsx") == {"graphs/new": "new"}


def test_one_process_of_a_node_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with sharing(shared(tmp_path / "fsx"), {"graphs": str(tmp_path)}):
        (tmp_path / "new").touch()
    assert not (tmp_path / "fsx").exists()


def test_a_file_that_breaks_off_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def breaks(_file: Path, to: Path) -> None:
        to.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graph_cache.shutil, "copy", breaks)
    fsx = tmp_path / "fsx"
    with sharing(shared(fsx), {"graphs": str(tmp_path / "own")}):
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / "new").touch()
    assert contents(fsx) == {}
    assert f'trouble="{fsx}/graphs/new: No space left on device"' in capsys.readouterr().out


def test_a_shared_folder_that_cannot_be_is_refused(tmp_path: Path):
    (tmp_path / "fsx").touch()
    with (
        pytest.raises(BadRequest, match=r"compile_cache\.shared=.* can't be used"),
        sharing(shared(tmp_path / "fsx"), {"graphs": str(tmp_path)}),
    ):
        pass


def test_nobody_else_writes_to_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own_folder().mkdir()
    own_folder().chmod(0o777)
    make_own_folder()
    assert own_folder().stat().st_mode & 0o777 == 0o700
    mine = os.getuid()
    own_folder().rename(tmp_path / f"trainwright-{mine + 1}")
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(
        BadRequest, match=r"belongs to somebody else: name another folder in compile_cache\.dir"
    ):
        make_own_folder()


def test_a_link_is_not_the_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    own_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadRequest, match="belongs to somebody else"):
        make_own_folder()


def test_a_verb_has_its_graphs_when_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_given", {})
    (tmp_path / "fsx" / "inductor").mkdir(parents=True)
    (tmp_path / "fsx" / "inductor" / "old").write_text("old")
    (tmp_path / "verb.py").write_text(
        "import os, pathlib\n"
        "def verb(recipe):\n"
        "    own = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "    (own / 'new').write_text((own / 'old').read_text())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("", "verb:verb", ""))
    words = [f"compile_cache.shared={tmp_path}/fsx", f"compile_cache.dir={tmp_path}/own", f"run.dir={tmp_path}"]
    assert cli.main(["train", "platform=cpu", *words]) == 0
    assert contents(tmp_path / "fsx") == {"inductor/old": "old", "inductor/new": "old"}
