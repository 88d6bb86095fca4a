"""`trainwright launch` without torchrun's long waits; the workers are those of WORKER, else of `working.py`."""

import os
import sys
from pathlib import Path

from trainwright import cli
from trainwright.launch import torchrun
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

torchrun.WORKER = (str(Path(__file__).with_name(os.environ.get("WORKER", "working.py"))), "train")
torchrun.RENDEZVOUS |= {"last_call_timeout": 3, "keep_alive_interval": 1}
if os.environ.get("KILLED"):  # a device's library ends the process
    torchrun.HEARD["cpu"] = NEURON_ERRORS
if os.environ.get("SHARED_STORE"):  # as torchrun does by itself
    torchrun.OURS.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
sys.exit(cli.main())
