"""A process that pushes: `python -m tests.faults.pusher STORE-URL CACHE NAME=DISK …`; prints each digest."""

import sys
from pathlib import Path

from imagestore.errors import Unavailable
from imagestore.push import push
from imagestore.store.open import open_store


def main() -> int:
    url, cache, *images = sys.argv[1:]
    try:
        store = open_store(url)
        for image in images:
            name, _, disk = image.partition("=")
            result = push(store, Path(disk), name, architecture="x86_64", format_="raw", cache=Path(cache))
            print(name, result.digest, result.written_bytes, flush=True)
    except Unavailable as err:
        print(err, file=sys.stderr)
        return 8
    return 0


if __name__ == "__main__":
    sys.exit(main())
