"""A full Debian guest's disk in the store: what the first push, a small change and a rebuild cost."""

import sys
from pathlib import Path

import pytest

from imagestore.push import push
from imagestore.store.open import open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from guest_images.debian_image import corpus

pytestmark = [pytest.mark.system, pytest.mark.drill]


@pytest.mark.timeout(1500)  # the disks are built where nobody built them before: a minute each
def test_one_more_file_costs_little_and_a_rebuild_of_the_same_packages_a_fraction(tmp_path: Path) -> None:
    disks = corpus(variants=("A", "E", "A2"))
    store = open_store(tmp_path.joinpath("store").as_uri(), create=True)
    cost = {name: push(store, path, "debian", name.lower()).written_bytes for name, path in disks.items()}
    assert cost["A"] > 100 << 20
    assert cost["E"] < 1.5 * (1 << 20), cost
    assert cost["A2"] < 0.15 * cost["A"], cost
    again = push(store, disks["A"], "debian", "again")
    assert (again.written_bytes, again.new_bytes) == (0, 0)
