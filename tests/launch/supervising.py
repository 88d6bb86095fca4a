"""The supervisor alone, over any command: python supervising.py RELAUNCHES SHUTDOWN PATIENCE COMMAND...

It is ready to start it unless a file is named by WAITS_FOR, and isn't there. PAUSE: seconds between two starts.
"""

import os
import sys

from trainwright.launch import supervisor
from trainwright.launch.supervisor import Command, Limits, supervise

supervisor.PAUSES = (float(os.environ.get("PAUSE", 0.1)),)
supervisor.MARGIN = supervisor.AFTER_A_FINAL_VERDICT = 1.0
relaunches, shutdown, patience = map(float, sys.argv[1:4])
ending = supervise(
    lambda: Command(sys.argv[4:], os.environ),
    lambda: os.path.exists(os.environ.get("WAITS_FOR", "/")),
    Limits(int(relaunches), shutdown, patience),
)
print(ending.line)
sys.exit(ending.status)
