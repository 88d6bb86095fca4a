import re

from trainwright.trainers.observers.tracking import flat, run_id


def test_a_run_id_is_narrow_stable_and_tells_names_apart():
    names = ["a b", "a-b", "x" * 200, "x" * 201, "läuft/1"]
    ids = [run_id(name) for name in names]
    assert ids == [run_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", each) for each in ids)


def test_nested_sections_become_dotted_keys():
    assert flat({"seed": 0, "optim": {"lr": 1e-3, "deep": {"x": None}}}) == {
        "seed": 0,
        "optim.lr": 1e-3,
        "optim.deep.x": None,
    }
