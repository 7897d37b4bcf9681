"""What outsiders say passes one gate: JSON and numbers, and whoever sent nonsense gets his own kind of error."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore import outside
from imagestore.errors import Corrupt, Invalid, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.keys import PROVENANCE, SUMS
from imagestore.formats.sealed import seal
from imagestore.mirror.content import read_sums
from imagestore.mirror.sync import read_provenance
from imagestore.mirror.tree import span
from imagestore.store.names import NameRecord, name_key
from imagestore.store.open import open_backend, open_store
from tests.web import misbehaving, raw

_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_PLAIN.filter(lambda value: all(map(math.isfinite, _floats(value)))))
def test_what_json_can_say_is_read_as_it_was_written(value: Any) -> None:
    for ascii_only in (True, False):
        assert outside.read_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def _floats(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [one for item in value for one in _floats(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize(
    "text",
    [
        *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"[1, NaN]", b'{"a": 1e400}'),
        *(b"9" * 20, b"-" + b"9" * 20, b"9" * 5000, b"1" * 400_000),
        *(rb'"\ud800"', rb'{"\udfff": 1}', rb'["a", {"b": ["\uD83D"]}]', b'"\xed\xa0\x80"', b'"\xff"'),
        *(b"[" * 34 + b"]" * 34, b"[" * 100_000, b'{"a":' * 50_000, b'{"a":' * 40 + b"1" + b"}" * 40),
        *(b"", b"{", b"[1,]", b"'a'", b"1 2", b"\xef\xbb\xbf1", b"+1", b"0x1", b"01"),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_json_that_nobody_can_answer_with_is_a_value_error_of_one_short_line(text: bytes) -> None:
    """E3."""
    with pytest.raises(ValueError) as caught:
        outside.read_json(text)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_json_may_be_as_deep_and_as_long_as_it_says_and_no_more() -> None:
    assert outside.read_json(b"[" * 32 + b"]" * 32)
    assert outside.read_json(rb'"\ud83d\ude00 \u00e9"') == "😀 é"
    assert outside.read_json(b"1", most_bytes=1) == 1
    with pytest.raises(ValueError, match="more than 1 bytes"):
        outside.read_json(b"10", most_bytes=1)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 11, 10**400, float("nan"), []])
def test_a_number_is_an_integer_within_its_bounds(value: object) -> None:
    assert outside.whole(10, high=10) == 10
    with pytest.raises(ValueError):
        outside.whole(value, high=10)


@pytest.mark.parametrize("value", [True, "1", None, -0.1, 1e300, math.nan, math.inf, -math.inf, 10**400])
def test_a_measure_is_finite_and_within_its_bounds(value: object) -> None:
    assert outside.real(7, high=10) == 7.0
    with pytest.raises(ValueError):
        outside.real(value, high=10)


@pytest.mark.parametrize("text", ["²", "1²", "٣", "", "-1", "+1", "1_0", " 1", "1.0", "9" * 19, "9" * 5000])
def test_a_headers_number_has_ascii_digits_and_not_too_many(text: str) -> None:
    """E4."""
    assert outside.decimal("010") == 10
    assert outside.decimal(text) is None


@pytest.mark.parametrize("length", ["²", "٣", "9" * 5000, "-1", "NaN", "1e3", "", "0x10"])
def test_a_remote_whose_content_length_is_nonsense_is_an_error_of_the_store(length: str) -> None:
    """E4."""
    with misbehaving({"/store.json": raw(b"{}", f"Content-Length: {length}")}) as url:
        with pytest.raises(StoreError):
            open_store(url)
        backend = open_backend(url)
        with pytest.raises(StoreError):
            backend.get("store.json", 0, 10)


@pytest.mark.parametrize("date", ["Mon, 01 Jan 0001 00:00:00 -0000", "x", "Mon, 99 Jan 9999 99:99:99 +9999"])
def test_a_remote_whose_dates_are_nonsense_has_no_dates(date: str) -> None:
    with misbehaving({"/a": raw(b"hi", "Content-Length: 2", f"Last-Modified: {date}")}) as url:
        assert open_backend(url).get("a").data == b"hi"


def damaged(**change: Any) -> bytes:
    """A name's object, sealed as it should be, that says something else than we would."""
    past = {"revision": 1, "images": {"x86_64": str(Digest.of(b"a"))}, "removed": False, "at": 1.0}
    body = {"name": "a", "tag": "b", "nonce": "", "revision": 2, "images": past["images"], "removed": False}
    return seal(body | {"history": [past]} | change)


@pytest.mark.parametrize(
    "change",
    [
        *({"revision": value} for value in (math.inf, math.nan, 1e300, 2.5, "3", True, 10**30, -1, None, [])),
        *(
            {"history": [{"revision": 1, "images": {}, "removed": False, "at": at}]}
            for at in (1e300, math.inf, "now", -1, None, 10**30)
        ),
        {"images": {"x86_64": "\ud800"}},
        {"history": [[]] * 3},
        {"images": [[[[]]]]},
    ],
    ids=repr,
)
def test_a_name_record_with_numbers_from_nowhere_is_corrupt(change: dict[str, Any]) -> None:
    """E4."""
    NameRecord.decode(damaged())
    with pytest.raises(Corrupt):
        NameRecord.decode(damaged(**change))


def test_a_name_that_is_nonsense_is_corrupt_for_whoever_lists(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), create=True)
    store.backend.put(name_key("a", "b"), damaged(revision=math.inf))
    with pytest.raises(Corrupt):
        list(store.names.list())


def test_sums_and_provenance_with_a_date_that_no_calendar_has_count_as_unknown(tmp_path: Path) -> None:
    store, digest = open_store(str(tmp_path), create=True), Digest.of(b"x")
    for at in ("1e300", "Infinity", "-1", '"x"', "1.5"):
        body = f'{{"raw": "", "qcow2": "", "combined": "", "created_s": {at}, "writer": 1}}'
        store.backend.put(SUMS.key(digest), body.encode())
        assert read_sums(store, digest) is None
    store.backend.put(PROVENANCE.key(digest), b'{"url": "x", "fetched_at_s": 1e300}')
    assert read_provenance(store, digest).fetched_at_s == 0


@pytest.mark.parametrize("header", ["bytes=²-", f"bytes=0-{'9' * 5000}", f"bytes={'1' * 5000}-", "bytes=٣-٤"])
def test_a_range_of_strange_digits_is_answered_with_the_whole(header: str) -> None:
    assert span(header, 10) == (200, 0, 10)
    assert span("bytes=2-3", 10) == (206, 2, 2)


@pytest.mark.parametrize(
    "url", ["https://[x/", "https://h:99999/", "https://h:x/", "s3://[::1/b", "https://[/"]
)
def test_a_url_that_python_cannot_take_apart_is_invalid(url: str) -> None:
    with pytest.raises(Invalid):
        open_backend(url)
