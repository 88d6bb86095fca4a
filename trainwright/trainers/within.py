"""Asking what may never answer: a store whose process is stopped, a disk, a device's library."""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


class Unanswered(RuntimeError):
    """Something that should be quick hangs."""


def within(seconds: float, act: Callable[[], T]) -> T:
    """What `act` returns.

    Raises:
        Unanswered: it hasn't returned after so many seconds; the thread that it is in stays behind.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((act(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise Unanswered(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast(T, answer)
