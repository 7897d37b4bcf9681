"""What comes over the API is checked here before it is an object of a store: by its kind, and by what it says.

Whoever pushes holds a key to one store, and may break nothing of it that others read: every frame of a pack is expanded
and compared with its chunk ids, a layout names packs that are here, a name leads to images that can be read.
"""

from imagestore.errors import Corrupt, Invalid, NotFound
from imagestore.formats import keys
from imagestore.formats.digest import Digest
from imagestore.formats.index import IndexPart
from imagestore.formats.sealed import decode
from imagestore.store.index import publish_part
from imagestore.store.inventory import check_pack
from imagestore.store.leases import LEASE_S, lease_of
from imagestore.store.names import NameRecord
from imagestore.store.roots import can_be_read
from imagestore.store.store import Store

_SMALL_BYTES, _LEASES = 4 << 20, 256
"""Of a name or lease; of leases at once, those of pushes that were killed in the last hour among them."""


def shown(key: str) -> bool:
    """Whether whoever has a key to the store sees this object."""
    kind = keys.kind_of(key)
    return kind is not None and kind.good_for not in ("", "own")


def admit(store: Store, verb: str, key: str, data: bytes = b"", *, creates: bool, swaps: bool) -> None:
    """Raises Invalid. creates, swaps: under the condition that there is none, or still what was read."""
    kind = keys.kind_of(key)
    good = kind.good_for if kind else ""
    if good != "own" and (verb == "DELETE" or good not in ("put", "swap")):
        raise Invalid(f"{key} is not for a key to {verb.lower()}", hint="sf image rm takes names away")
    if good == "swap" and not creates and not swaps:
        raise Invalid(f"{key} is changed by compare-and-swap, and not by a node")
    try:
        if verb == "PUT":
            _check(store, key, data)
    except (Corrupt, NotFound) as err:
        raise Invalid(str(err), hint=err.hint) from err


def _check(store: Store, key: str, data: bytes) -> None:
    if not keys.matches(key, data):
        raise Corrupt(f"the bytes of {key} do not match its name")
    match keys.kind_of(key):
        case keys.PACKS:
            check_pack(Digest.parse(key[-64:]), data)
        case keys.INDEX:
            publish_part(store, IndexPart.decode(data))
        case keys.MANIFESTS:
            store.manifest(Digest.parse(key[-64:]), data)
        case keys.LAYOUTS:
            sizes = store.layout(Digest.parse(key[-64:]), data).pack_sizes()
            if missing := sizes.keys() - store.has_packs(sizes):
                raise Invalid(f"{key} names {len(missing)} packs that are not in this store")
        case keys.LEASES:
            many = sum(1 for _ in store.objects(keys.LEASES)) >= _LEASES and not store.has(key)
            if many or len(data) > _SMALL_BYTES or decode(data, key, lease_of)[2] > LEASE_S:
                raise Invalid(f"{key}: {_LEASES} leases of {LEASE_S:.0f} s are the most")
        case keys.PROVENANCE if len(data) > _SMALL_BYTES:
            raise Invalid(f"{key} has more than {_SMALL_BYTES} bytes")
        case keys.NAMES:
            record = NameRecord.decode(data[:_SMALL_BYTES])
            if keys.NAMES.key(record.name, record.tag) != key:
                raise Corrupt(f"{key} holds the name {record.name}:{record.tag}")
            for image in () if record.removed else record.images.values():
                if not can_be_read(store, image):
                    raise NotFound(f"image {image} cannot be read here", hint="push it again")
