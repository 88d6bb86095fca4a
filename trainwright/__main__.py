"""`python -m trainwright` and `torchrun -m trainwright`."""

import sys

from trainwright.cli import main

sys.exit(main())
