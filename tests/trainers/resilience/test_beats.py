"""Beats through a store that isn't always there."""

import json
from threading import Event

import pytest

from trainwright.trainers.parallel import first_failure
from trainwright.trainers.resilience.beats import Beats
from trainwright.trainers.resilience.straggler import Beat


class Store:
    """Takes so many beats, and then its connection breaks."""

    def __init__(self, beats: int, closed: Event, last: bool = False):
        self.left, self.closed, self.last, self.numbers = beats, closed, last, []

    def set(self, key: str, text: str):
        if self.left == 0:
            raise RuntimeError("Broken pipe")
        self.left -= 1
        self.numbers.append(json.loads(text)[0])
        if self.last and self.left == 0:
            self.closed.set()


def test_beats_go_on_over_a_new_connection(monkeypatch: pytest.MonkeyPatch):
    closed = Event()
    stores = [Store(2, closed), Store(3, closed, last=True)]
    there = iter([None, stores[0], None, stores[1]])
    monkeypatch.setattr(first_failure, "launchers_store", lambda: next(there))
    beats = Beats("keys", rank=1, size=2)
    beats.interval = 0.01
    beats.beat(lambda number: Beat(number, 0.0, 1, "data", False, "here", 1.0), closed)
    assert [store.numbers for store in stores] == [[2, 3], [6, 7, 8]]
