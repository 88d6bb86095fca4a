"""The supervisor alone, over any command: python supervising.py RELAUNCHES SHUTDOWN COMMAND..."""

import os
import sys

from trainwright.launch import supervisor
from trainwright.launch.supervisor import Command, supervise

supervisor.PAUSES = (0.1,)
supervisor.MARGIN = supervisor.AFTER_A_FINAL_VERDICT = 1.0
ending = supervise(lambda: Command(sys.argv[3:], os.environ), int(sys.argv[1]), float(sys.argv[2]))
print(ending.line)
sys.exit(ending.status)
