"""`python -m trainwright.launch.agent`: torchrun without the pages that it prints of what is said in a line."""

import os
import sys

LEVEL = "TORCH_CPP_LOG_LEVEL"

# Of a lost store C++ prints its frames at each attempt. torch reads the level once; the workers keep theirs.
given = os.environ.get(LEVEL)
os.environ.setdefault(LEVEL, "ERROR")
import torch.distributed.run  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.rendezvous import RendezvousError  # noqa: E402

if given is None:
    del os.environ[LEVEL]

if __name__ == "__main__":
    try:
        torch.distributed.run.main()
    except SignalException:
        sys.exit(1)
    except RendezvousError as error:
        sys.exit(f"trainwright: torchrun lost the rendezvous, or waited there in vain: {error}")
