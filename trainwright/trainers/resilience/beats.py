"""What the ranks' watchdogs tell each other, through the launcher's store.

Every call may hang where the store's process is stopped, for torch's client has no timeout of its own.
"""

import json
from collections.abc import Callable
from threading import Event
from typing import NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainwright.trainers.parallel import first_failure
from trainwright.trainers.resilience.straggler import Beat, Finding

# A beat is one `set` of 200 bytes that the store doesn't answer: some 3 us to a server that takes tens of
# thousands a second. It gets at most 500 a second: up to 1,000 ranks beat every 2 s, 4,096 every 8 s.
BEAT = 2.0
BEATS_A_SECOND = 500


class Judgement(NamedTuple):
    """The finding of one rank for all, and the line that it said."""

    finding: Finding
    line: str


class Beats:
    """A rank's client of the store. keys: where this process group's beats stand, the same on every rank."""

    def __init__(self, keys: str, rank: int, size: int) -> None:
        self.keys, self.rank, self.size = keys, rank, size
        self.interval = max(BEAT, size / BEATS_A_SECOND)
        self._client: TCPStore | None = None

    def beat(self, beat: Callable[[int], Beat], closed: Event) -> None:
        """Write `beat(1)`, `beat(2)`, ... until `closed`; that the store can't be reached is for others to say.

        It connects again by itself: a rank that is silent for good would be blamed for the next hang.
        """
        number, store = 0, None
        while not closed.is_set():
            number += 1
            try:
                store = store or self._connect()
                store.set(f"{self.keys}/{self.rank}", json.dumps(beat(number)))
            except RuntimeError:
                store = None
            closed.wait(self.interval)

    def claim(self) -> bool:
        """Whether it is this rank that judges."""
        own = str(self.rank)
        return bool(self._store().compare_set(f"{self.keys}/judge", "", own).decode() == own)

    def release(self) -> None:
        """Let another judge: this rank goes on."""
        self._store().delete_key(f"{self.keys}/judge")

    def read(self) -> list[Beat | None]:
        """The newest beat of every rank; None of one that has sent none."""
        store = self._store()
        keys = [f"{self.keys}/{rank}" for rank in range(self.size)]
        if store.check(keys):
            return [Beat(*json.loads(text)) for text in store.multi_get(keys)]
        return [Beat(*json.loads(store.get(key))) if store.check([key]) else None for key in keys]

    def publish(self, judgement: Judgement) -> None:
        """Let all ranks know."""
        self._store().set(f"{self.keys}/judgement", json.dumps(judgement))

    def judgement(self) -> Judgement | None:
        """What the rank that judges has found, if it has."""
        key = f"{self.keys}/judgement"
        if not self._store().check([key]):
            return None
        finding, line = json.loads(self._store().get(key))
        return Judgement(Finding(*finding), line)

    def _store(self) -> TCPStore:
        """The client of the thread that watches; the beats have their own, which may hang by itself."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _connect(self) -> TCPStore:
        store = first_failure.launchers_store()
        if store is None:
            raise RuntimeError("the launcher's store can't be reached")
        return store
