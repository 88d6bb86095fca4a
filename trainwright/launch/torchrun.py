"""`trainwright launch torchrun`: this node's part of a run, by torchrun under a supervisor."""

import math
import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from trainwright.configs.schema import LaunchConfig, Recipe
from trainwright.errors import BadRequest
from trainwright.launch.endings import MEANING
from trainwright.launch.last_words import LastWords
from trainwright.launch.reasons import tell_platforms
from trainwright.launch.supervisor import Command, Limits, supervise
from trainwright.trainers.platform.environment import device_of
from trainwright.trainers.platform.launched import HEARD, ranks_of_node

TORCHRUN = (sys.executable, "-m", "trainwright.launch.agent")
WORKER = ("-m", "trainwright", "train")
MONITOR = 0.2  # seconds between torchrun's looks at its workers
RENDEZVOUS = {
    "join_timeout": 1800,  # seconds that a node waits for the others, or for one that takes a lost one's place
    "last_call_timeout": 30,  # that they wait for more nodes, once they are enough
    "keep_alive_interval": 5,  # three of them without a word, and a node counts as lost
}
OURS = {
    # Workers of a new round would read in the shared store where those of the last one listened.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
LOOPBACK = re.compile(r"localhost|127\.|::1|\[::1\]")

# Of an outer launcher: PET_* are torchrun's own options, the others would be taken for those of a worker.
NOT_HANDED_ON = re.compile(r"PET_|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")


def launch(recipe: Recipe, words: Sequence[str]) -> int:
    """Run `recipe`, which `words` describe, on this node, and return the exit status for the orchestrator."""
    wishes = recipe.launch
    procs = devices(recipe)

    def torchrun() -> Command:
        endpoint = wishes.rendezvous or f"localhost:{_free_port()}"
        return Command(command(recipe, endpoint, procs, words), environment(endpoint, procs))

    def ready() -> bool:
        return wishes.rendezvous is None or answered(wishes.rendezvous)

    limits = Limits(wishes.relaunches, wishes.shutdown_s, RENDEZVOUS["join_timeout"])
    failures = HEARD.get(device_of(recipe.platform))
    hear = partial(LastWords, failures=failures, again=recipe.resilience.pass_over_batch) if failures else None
    ending = supervise(torchrun, ready, limits, hear)
    if ending.status:
        reason = tell_why(*ending)
        print(f"trainwright: the run ended with status {ending.status}: {reason}", file=sys.stderr)
    return ending.status


def tell_why(status: int, line: str) -> str:
    """Leave the reason where platforms read it, and return it."""
    reason = f"{line} ({MEANING[status]})"
    tell_platforms(reason)
    return reason


def worlds(recipe: Recipe) -> list[int]:
    """Every number of ranks that the run may have, the largest first.

    Raises:
        BadRequest: the nodes are no number or range, or there is no place for them to meet.
    """
    least, most = nodes(recipe.launch)
    procs = devices(recipe)
    return [number * procs for number in range(most, least - 1, -1)]


def nodes(wishes: LaunchConfig) -> tuple[int, int]:
    """The least and the most nodes that the run goes on with.

    Raises:
        BadRequest: `launch.nodes` or `launch.rendezvous` can't be used.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", wishes.nodes)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise BadRequest(f"launch.nodes={wishes.nodes} must be a number of at least 1, or least:most as in 2:4")
    if most > 1 and wishes.rendezvous is None:
        raise BadRequest(
            f"launch.nodes={wishes.nodes} needs launch.rendezvous=HOST:PORT, the same on all nodes: one of "
            "them and a port that is free there"
        )
    if wishes.rendezvous is not None and not re.fullmatch(r".+:\d{1,5}", wishes.rendezvous):
        raise BadRequest(f"launch.rendezvous={wishes.rendezvous} must be HOST:PORT, as in node0:29400")
    return least, most


def devices(recipe: Recipe) -> int:
    """How many ranks this node gets: those that were asked for, else one for each accelerator, else one.

    Raises:
        BadRequest, RunFailed: they can't be counted.
    """
    if recipe.launch.procs_per_node is None:
        recipe.launch.procs_per_node = ranks_of_node(recipe.platform)
    return recipe.launch.procs_per_node


def command(recipe: Recipe, endpoint: str, procs: int, words: Sequence[str]) -> list[str]:
    """The words of torchrun."""
    wishes = recipe.launch
    address = own_address(endpoint)
    return [
        *TORCHRUN,
        f"--nnodes={wishes.nodes}",
        f"--nproc-per-node={procs}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={recipe.run.name}",
        "--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in RENDEZVOUS.items()),
        f"--max-restarts={wishes.restarts}",
        f"--monitor-interval={MONITOR}",
        f"--shutdown-timeout={math.ceil(wishes.shutdown_s)}",
        *([f"--local-addr={address}"] if address else []),
        *WORKER,
        *(word.replace("$", "$$") for word in words),  # torchrun takes words for templates
    ]


def environment(endpoint: str, procs: int) -> dict[str, str]:
    """What torchrun and its workers find in the environment."""
    kept = {name: value for name, value in os.environ.items() if not NOT_HANDED_ON.match(name)}
    if procs > 1:  # torchrun would set it to 1, with a warning
        kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
    # The store that outlives the workers: there they agree who speaks when they fail.
    return {**kept, **OURS, "TRAINWRIGHT_RENDEZVOUS": endpoint}


def answered(endpoint: str) -> bool:
    """Whether torchrun would find the rendezvous: somebody answers there, or this node is to host it.

    torchrun gives a name that doesn't stand for anything yet no time, and a host that doesn't answer a minute.
    """
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as probe:
                probe.settimeout(1)
                if probe.connect_ex(address) == 0:
                    return True
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))  # refused for an address that isn't this node's
                return True
    return False


def own_address(endpoint: str) -> str | None:
    """The address that others reach this node at, by the route to `endpoint`; None leaves it to torch.

    Torch takes the host's full name, which others can't resolve where there is no name service.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(where[0], socket.SOCK_DGRAM) as probe:
            probe.connect(where[4])  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError:
        return None
    # A host whose own name stands for 127.0.1.1 in its /etc/hosts is still another host to others.
    return address if not LOOPBACK.match(address) or LOOPBACK.match(host) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
