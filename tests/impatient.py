"""`sf` for tests of what happens when a store is away for good: it tries again twice, not for the 12 s of a person's.

What its retries are worth is proven by tests/faults and by those who wait for a store that comes back.
"""

import sys
from pathlib import Path

from cli.main import main
from imagestore.backends import wrappers

IMPATIENT = (sys.executable, "-P", str(Path(__file__)))

if __name__ == "__main__":
    wrappers._PAUSES_S = (0.2, 0.2)
    main()
