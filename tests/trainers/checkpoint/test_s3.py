"""Checkpoints on S3: the real client against a local server of the same interface."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainers.parallel.runs import read
from trainwright.cli import main
from trainwright.trainers.checkpoint.place import place

s3fs = pytest.importorskip("s3fs", reason="needs requirements/s3.txt")
server = pytest.importorskip("moto.server", reason="needs requirements/s3.txt")

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    threaded = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    threaded.start()
    host, port = threaded.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    s3fs.S3FileSystem.clear_instance_cache()  # of an earlier server
    name = f"runs-{port}"  # the servers of a process share what they hold
    place(f"s3://{name}").fs.mkdir(name)
    yield f"s3://{name}/here"
    threaded.stop()


def test_a_run_saves_to_s3_and_goes_on_from_there(tiny: list[str], tmp_path: Path, bucket: str):
    words = [*tiny, f"checkpoint.dir={bucket}"]
    assert main(["train", *words, "run.name=whole"]) == 0
    assert main(["train", *words, "train.steps=10"]) == 0
    folder = place(bucket) / "tiny"
    assert folder.names() == ["step_00000005", "step_00000010"]
    assert not (tmp_path / "runs" / "tiny" / "checkpoints").exists()

    newest = folder / "step_00000010" / "state" / "__0_0.distcp"
    data = bytearray(newest.fs.cat_file(newest.path))
    data[len(data) // 2] ^= 1
    newest.fs.pipe_file(newest.path, bytes(data))
    assert main(["train", *words]) == 0
    assert folder.names() == ["step_00000010", "step_00000012"]
    assert read(tmp_path / "runs" / "tiny") == read(tmp_path / "runs" / "whole")


def test_a_fresh_start_leaves_no_old_checkpoints_there(
    tiny: list[str], tmp_path: Path, bucket: str, capsys: pytest.CaptureFixture[str]
):
    words = [*tiny, f"checkpoint.dir={bucket}"]
    assert main(["train", *words]) == 0
    assert main(["train", *words, "resume=none"]) == 2
    assert "give another run.name or delete them" in capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
