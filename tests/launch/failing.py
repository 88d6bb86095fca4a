"""A program for launchers: trainwright with verbs that fail, each in its way."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from trainwright import cli
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.platform.choose import choose_platform

RANK = int(os.environ["RANK"])


def bad_request(recipe: Recipe):
    """Rank 1 refuses while rank 0 waits for it in a collective."""
    with open_ranks(recipe.parallel, choose_platform("cpu")):
        if RANK == 1:
            raise BadRequest("data.paths: rank 1's disk has no book.txt")
        dist.all_reduce(torch.ones(4))


def bug(recipe: Recipe):
    """Every rank has an error that nobody foresaw."""
    with open_ranks(recipe.parallel, choose_platform("cpu")):
        raise ValueError("no such thing")


def killed(recipe: Recipe):
    """Rank VICTIM is killed while the other waits for it, whom the launcher is kept from ending first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open_ranks(recipe.parallel, choose_platform("cpu")):
        dist.barrier()
        if int(os.environ.get("VICTIM", "1")) == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(4))


def waiting(recipe: Recipe):
    """Both ranks wait until they are interrupted."""
    with open_ranks(recipe.parallel, choose_platform("cpu")):
        dist.barrier()
        sys.stdout.write(f"rank {RANK} waits\n")  # in one piece: the ranks share the stream
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    for name in ("bad_request", "bug", "killed", "waiting"):
        cli.VERBS[name] = cli.Verb("", f"__main__:{name}", "")
    sys.exit(cli.main())
