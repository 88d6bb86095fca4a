"""Of the ranks of a run that fails, one says why, and all that end by themselves end with its status.

A failing rank claims the right to speak in the launcher's store, which is there before the process group,
beside it, after it has broken and, where torchrun hosts it, after rank 0 has ended. Whoever claims first is the
one: when a rank breaks, the others only lose it, later, and so they wait a moment before they claim.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainwright import verdict
from trainwright.errors import INTERRUPTED, BadNode, TrainwrightError
from trainwright.trainers.node import node_name
from trainwright.trainers.parallel.ranks import this_round
from trainwright.trainers.platform.launched import LOST
from trainwright.trainers.within import within

REACH = 5.0  # seconds to reach the store, and those that it has to answer: its process may be stopped
PATIENCE = (
    2.0  # seconds that a rank which lost its peers leaves to the one with the cause, and any to the speaker
)


class Failure(NamedTuple):
    """Why the run failed: the exit status and one line, which names the rank."""

    status: int
    line: str


def say_once(error: BaseException, debug: bool = False) -> int:
    """Say on stderr why the run failed, unless another rank does, and return this rank's exit status.

    An interrupt is said by rank 0 and by no other, whichever it hit first.
    """
    # A launcher ends all ranks as soon as one has ended. This one ends by itself, with its own status.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    lost = lost_peers(error) and not isinstance(error, KeyboardInterrupt)
    failure = Failure(_status(error), f"{who()}: {_sentence(error, lost)}")
    shown = f"trainwright: {failure.line}\n"
    if debug or not (lost or isinstance(error, TrainwrightError)):
        shown = f"trainwright: {who()}:\n{''.join(traceback.format_exception(error))}"
    store = launchers_store()
    said = _said_by_another(store, PATIENCE if lost else 0.0)
    first = said or failure
    if failure.status == BadNode.status:
        first = failure
    elif first.status == BadNode.status:  # another node has to leave, not this rank's
        first = Failure(failure.status, first.line)
    if first.status == INTERRUPTED:
        shown = "trainwright: interrupted\n" if os.environ["RANK"] == "0" else ""
    elif said is not None:
        shown = ""
    sys.stderr.write(shown)
    sys.stderr.flush()
    if said is None:
        _tell(store, failure)
    for_torchrun(first)
    verdict.leave(first.status, first.line)
    return first.status


def say(failure: Failure, alone: bool = False) -> Failure:
    """Say it on stderr, unless another rank has said why the run fails, and return what has been said.

    alone: don't ask the others, because the store is what hangs.
    """
    store = None if alone else launchers_store()
    said = _said_by_another(store, 0.0)
    if said is None:
        sys.stderr.write(f"trainwright: {failure.line}\n")
        sys.stderr.flush()
        _tell(store, failure)
    return said or failure


def lost_peers(error: BaseException) -> bool:
    """Whether it began with a collective that broke because another rank is gone or late."""
    root = _root(error)
    return isinstance(root, RuntimeError) and bool(LOST.search(str(root)))


def _root(error: BaseException) -> BaseException:
    """The exception that came first, of those that were raised while another was dealt with."""
    while earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = earlier
    return error


def _status(error: BaseException) -> int:
    if isinstance(error, TrainwrightError):
        return error.status
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def who() -> str:
    """The rank, with its host where there are several."""
    rank = f"rank {os.environ['RANK']}"
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return rank if one_host else f"{rank} on {node_name()}"


def _sentence(error: BaseException, lost: bool) -> str:
    if isinstance(error, TrainwrightError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if not lost:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    # NCCL says what happened in the last line, gloo between the place in its source and advice.
    said = (str(_root(error)).strip() or "no reason given").splitlines()[-1]
    said = re.sub(r"^\[\S+\] ", "", said).split(". This is typically")[0]
    return (
        "lost the other ranks, which usually means that one of them was killed, for example because its "
        f"machine ran out of memory: {said}"
    )


def launchers_store() -> TCPStore | None:
    """A client of its own: the process group's may be broken, or be waited on in another thread."""
    with suppress(OSError, RuntimeError, ValueError, KeyError):
        address = _address()
        # TCPStore prints pages of C++ frames where nobody answers.
        socket.create_connection(address, timeout=REACH).close()
        return within(REACH, lambda: _client(*address))
    return None


def _client(host: str, port: int) -> TCPStore:
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=REACH), wait_for_workers=False)


def _address() -> tuple[str, int]:
    """Where the launcher's store is: torchrun's, if our supervisor names it, else the ranks' own."""
    if endpoint := os.environ.get("TRAINWRIGHT_RENDEZVOUS"):
        host, _, port = endpoint.rpartition(":")
        return host.strip("[]"), int(port)
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _key(name: str) -> str:
    """A key of this round of this run: runs may share a store, and a restarted one may speak again."""
    return f"trainwright/first_failure/{os.environ.get('TORCHELASTIC_RUN_ID', '0')}/{this_round()}/{name}"


def _said_by_another(store: TCPStore | None, patience: float) -> Failure | None:
    """What another rank has said; None where this rank is the one to speak.

    patience: how many seconds to leave to the others before claiming.
    """
    if store is None:
        return None
    # A store that goes away or hangs, or a claimant killed before it spoke: better said twice than by nobody.
    with suppress(RuntimeError):
        return within(patience + PATIENCE + REACH, lambda: _ask(store, patience))
    return None


def _ask(store: TCPStore, patience: float) -> Failure | None:
    _appears(store, _key("claimed"), patience)
    rank = os.environ["RANK"]
    if store.compare_set(_key("claimed"), "", rank).decode() == rank:
        return None
    if _appears(store, _key("said"), PATIENCE):
        return Failure(*json.loads(store.get(_key("said"))))
    return None


def _appears(store: TCPStore, key: str, seconds: float) -> bool:
    """Wait for `key`; the store's own wait prints warnings when it has waited in vain."""
    until = time.monotonic() + seconds
    while not (there := store.check([key])) and time.monotonic() < until:
        time.sleep(0.02)
    return there


def _tell(store: TCPStore | None, failure: Failure) -> None:
    """Let the others end, now that this rank has spoken."""
    if store is not None:
        with suppress(RuntimeError):
            within(REACH, lambda: store.set(_key("said"), json.dumps(failure)))


def for_torchrun(failure: Failure) -> None:
    """Leave the line where torchrun looks for what its summary says of this rank."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        when = {"timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": failure.line, "extraInfo": when}}, file)
