from tests.trainers.data.corpora import recipe, write_text
from trainwright.trainers.data.describe import describe


def test_it_says_what_there_is(tmp_path, capsys):
    root = write_text(tmp_path, [f"number {i} the cat sat on the mat\n" * 9 for i in range(20)])
    (root / "bad.txt").write_bytes(b"\xff")
    describe(
        recipe(
            tmp_path,
            "data.on_error=skip",
            "data.max_piece_bytes=200",
            "data.validation.fraction=0.2",
            "train.epochs=2",
        )
    )
    said = capsys.readouterr().out
    assert "1 skipped" in said
    assert "tokens per byte" in said
    assert " tokens, end <|endoftext|>" in said
    assert "lanes: 4" in said
    assert "in 2 epochs" in said
    assert "the cat sat" in said
