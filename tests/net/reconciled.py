"""Reconcile a node twice with what the server wants of it, and print each action that it took.

    python -m tests.net.reconciled STATE_DIR DESIRED

DESIRED is a pickled `NodeNetworks`. For tests: whoever has nothing to put right prints nothing.
"""

import pickle
import sys
from pathlib import Path

from net.plane import Plane


def main() -> int:
    desired = pickle.loads(Path(sys.argv[2]).read_bytes())
    plane = Plane(desired.installation, Path(sys.argv[1]))
    for number in (1, 2):
        for action in plane.apply(desired):
            print(number, action.verb, action.namespace, action.item)
    return 0


if __name__ == "__main__":
    sys.exit(main())
