"""Python imports this at its start: a wall clock that jumps by the seconds in the file that `CFPO_CHAOS_CLOCK` names.

No test may set a machine's clock; so it is the one that Python's `time.time` tells which jumps.
"""

import os
import time
from pathlib import Path

if "CFPO_CHAOS_CLOCK" in os.environ:
    clock, right = Path(os.environ["CFPO_CHAOS_CLOCK"]), time.time

    def wrong() -> float:
        return right() + (float(clock.read_text()) if clock.exists() else 0.0)

    time.time = wrong
