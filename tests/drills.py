"""How often a drill runs, and with which random numbers.

    for round_number in range(rounds(full=50)):
        rng = random.Random(seed() + round_number)

CI runs a sample that another seed moves each time; `scripts/test --all` (SF_TEST_ALL=1) runs all of it.
A failing run prints its seed; `SF_TEST_SEED=N` repeats it.
"""

import os
import secrets

_SAMPLED_SHARE = 16  # CI runs one round of so many, but never fewer than two
# Drawn by scripts/test where it may run twice; SF_TEST_SEED also lets hypothesis draw by it (conftest.py).
_SEED = int(
    os.environ.get("SF_TEST_SEED") or os.environ.get("SF_TEST_DRAWN") or secrets.randbelow(1_000_000_000)
)


def everything() -> bool:
    """Whether the whole of every drill was asked for."""
    return os.environ.get("SF_TEST_ALL") == "1"


def rounds(full: int, asked: str = "") -> int:
    """`full` under `scripts/test --all`, else a sample of at least two (or `full`, where that is less).

    asked: the environment variable that says another number, as SF_LOSSES=9.
    """
    if number := os.environ.get(asked):
        return int(number)
    return full if everything() else min(full, max(2, full // _SAMPLED_SHARE))


def seed() -> int:
    """The seed of this test session, the same for every caller."""
    return _SEED
