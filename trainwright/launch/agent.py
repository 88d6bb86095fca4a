"""`python -m trainwright.launch.agent`: torchrun, but for the page that it prints when it is told to end."""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except SignalException:
        sys.exit(1)
