"""The table of the kinds of object: keys out of names, and names out of keys."""

import pytest

from imagestore.backends.protocol import check_key
from imagestore.errors import Invalid
from imagestore.formats.digest import Digest
from imagestore.formats.keys import (
    BESIDE,
    INDEX,
    INFO,
    KINDS,
    MANIFESTS,
    NAMES,
    PACKS,
    TUF,
    kind_of,
    matches,
    trashed,
)
from imagestore.store.names import name_key

ONE = Digest.of(b"one")
EXAMPLES = {
    "store.json": "",
    "hooks": "all",
    "gc": "condemned",
    "names": "debian/12",
    "leases": "0" * 32,
    "refs": "a-b",
    "state": "0123abcd-20261128t031500z",
}


def test_every_kind_knows_its_own_keys_and_nobody_elses() -> None:
    for kind in KINDS:
        rest = (
            EXAMPLES.get(kind.tree)
            if kind.tree in EXAMPLES
            else f"{ONE.hex()}/1.root.json"
            if kind is TUF
            else None
        )
        key = kind.key(ONE) if rest is None else kind.key(rest) if rest else kind.key()
        assert kind_of(check_key(key)) is kind
        assert [other.tree for other in KINDS if other.digest(key) is not None] == (
            [] if rest is not None else [kind.tree]
        )
        assert kind_of(key + "~") is None and kind_of(f"old/{key}") is None


@pytest.mark.parametrize(
    "key",
    ["", "names", "names/a", "names/../store.json", "names/a/b/c", f"packs/00/{ONE.hex()}", f"packs/{ONE.hex()}",
     "store.json/a", "gc/other", "tuf/x/1.root.json", "names/A/b", "names/.a/b", "probe/0123"],
)  # fmt: skip
def test_what_is_no_objects_key_has_no_kind(key: str) -> None:
    assert kind_of(key) is None


def test_whatever_names_can_be_a_key_is_one() -> None:
    for name in ("debian", "a", "0", "a" * 100, "debian-12_x.y", "a--b"):
        assert kind_of(name_key(name, name)) is NAMES
    with pytest.raises(Invalid):
        name_key("..", "store.json")


def test_only_objects_named_by_their_bytes_are_judged_by_them() -> None:
    assert matches(MANIFESTS.key(ONE), b"one") and matches(MANIFESTS.key(ONE), trashed(b"one"))
    assert not matches(MANIFESTS.key(ONE), b"other") and not matches(INDEX.key(ONE), b"")
    assert matches(PACKS.key(ONE), b"other") and matches(INFO.key(), b"other") and matches("elsewhere", b"")


def test_what_is_named_by_its_own_digest_never_changes() -> None:
    assert {kind.tree for kind in KINDS if not kind.changes} == {"packs", "index", "manifests", "deltas"}
    assert {kind.tree for kind in BESIDE} == {"traces", "provenance", "sums", "groups", "updates"}
