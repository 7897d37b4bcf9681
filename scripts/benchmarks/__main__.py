"""The command behind scripts/bench."""

import argparse
import ast
import importlib
import signal
import sys
from pathlib import Path

from benchmarks._harness import Bench, Failed


def _names() -> dict[str, str]:
    """Each benchmark and the first line of its docstring, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = (text.splitlines() or [""])[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures, beside peers, in one run.")
    parser.add_argument("name", nargs="?", help="which benchmark; without it, the list")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write one flat object: figure name -> number"
    )
    parser.add_argument("--rounds", type=int, help="runs per contestant")
    parser.add_argument("--keep", action="store_true", help="leave the working directory")
    options = parser.parse_args()
    names = _names()
    if options.name is None:
        for name, text in names.items():
            print(f"{name:14} {text}")
        return 0
    if options.name not in names:
        print(
            f"bench: no benchmark is called {options.name!r}; there are: {', '.join(names)}", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed then, too
    try:
        with Bench(options.name, rounds=options.rounds, keep=options.keep) as bench:
            try:
                importlib.import_module(f"benchmarks.{options.name}").run(bench)
            finally:
                bench.report()
            if options.json:
                bench.write_json(options.json)
    except Failed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
