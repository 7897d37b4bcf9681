"""`scripts/test --again`: its two halves, what is run once more, and the status that comes of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exec {python} "$@"
case "$*" in *--last-failed*) run=again ;; *) run=first ;; esac
at={told}/$SF_TEST_HALF-$run
echo "$SF_TEST_STRICT $SF_TEST_DRAWN $*" >$at.called
read -r status failed <$at
mkdir -p .pytest_cache/$SF_TEST_HALF/v/cache
[ $failed = 0 ] || echo "$failed" >.pytest_cache/$SF_TEST_HALF/v/cache/lastfailed
exit $status
"""


@pytest.mark.parametrize(
    ("first", "again", "status"),
    [
        ({"guests": (0, 0), "rest": (0, 0)}, {}, 0),
        ({"guests": (1, 2), "rest": (0, 0)}, {"guests": 0}, 0),
        ({"guests": (1, 2), "rest": (0, 0)}, {"guests": 1}, 1),
        ({"guests": (0, 0), "rest": (1, 1)}, {"rest": 0}, 0),
        ({"guests": (1, 1), "rest": (1, 1)}, {"guests": 0, "rest": 0}, 0),
        ({"guests": (1, 1), "rest": (1, 1)}, {"guests": 0, "rest": 2}, 2),
        ({"guests": (1, 1), "rest": (2, 0)}, {}, 2),
        ({"guests": (2, 1), "rest": (1, 1)}, {}, 2),
        ({"guests": (0, 0), "rest": (5, 0)}, {}, 5),
        ({"guests": (1, 0), "rest": (0, 0)}, {}, 1),
        ({"guests": (1, 6), "rest": (1, 5)}, {}, 1),
    ],
)
def test_the_status_of_two_halves(
    tmp_path: Path, first: dict[str, tuple[int, int]], again: dict[str, int], status: int
) -> None:
    for name in ("scripts", ".venv/bin", "told"):
        (tmp_path / name).mkdir(parents=True)
    script, python, setup = (
        tmp_path / "scripts/test",
        tmp_path / ".venv/bin/python",
        tmp_path / "scripts/setup",
    )
    script.write_bytes((ROOT / "scripts/test").read_bytes())
    python.write_text(PYTHON.format(python=sys.executable, told=tmp_path / "told"))
    setup.write_text("#!/bin/sh\n")
    for program in (script, python, setup):
        program.chmod(0o755)
    told = {(half, "first"): one for half, one in first.items()}
    told |= {(half, "again"): (code, 1) for half, code in again.items()}
    for (half, run), (code, failed) in told.items():
        names = dict.fromkeys(map(str, range(failed)), True)
        (tmp_path / f"told/{half}-{run}").write_text(f"{code} {json.dumps(names) if failed else 0}\n")
    done = subprocess.run([script, "--again"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    calls = {path.stem: path.read_text().split() for path in (tmp_path / "told").glob("*.called")}
    assert sorted(calls) == sorted("-".join(one) for one in told)
    assert len({seed for _, seed, *_ in calls.values()}) == 1, "the same drills"
    assert {one: strict for one, (strict, *_) in calls.items()} == {
        o: str(int(o != "rest-first")) for o in calls
    }
