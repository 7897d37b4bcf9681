import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.cluster.images.artifacts import named_images
from imagestore.errors import Conflict, Corrupt, Invalid, NotFound, StoreError, Unavailable, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.sealed import seal
from imagestore.store.names import NameRecord, Names, Reference, name_key, parse_reference
from imagestore.store.store import Store
from tests.memory import Memory

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian", Reference("debian")),
        ("debian:12", Reference("debian", "12")),
        ("official/debian:12", Reference("debian", "12", "official")),
        (f"debian:12@{ONE}", Reference("debian", "12", None, ONE.hex())),
        (f"debian@b3:{ONE.hex()[:12]}", Reference("debian", "latest", None, ONE.hex()[:12])),
        (f"@{ONE}", Reference("", digest_prefix=ONE.hex())),
        (str(ONE), Reference("", digest_prefix=ONE.hex())),
        ("a.b_c-d--e:1.2-rc1", Reference("a.b_c-d--e", "1.2-rc1")),
    ],
)
def test_references_are_read(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            ":",
            "/",
            "@",
            ":12",
            "debian:",
            "/debian",
            "a/b/c",
            "Debian",
            "debian:RC1",
            "../x",
            "a/..",
            ".",
            "-a",
            "a-",
        ],
        *[
            "a b",
            "a\n",
            "a\0",
            "dé",
            "a" * 101,
            "a:" + "b" * 101,
            "a@b3:123",
            "a@sha256:" + "0" * 64,
            "a@b3:" + "g" * 64,
        ],
        *["a@b3:" + "0" * 65, "file:///etc/passwd", "https://x/y", "a:b:c", "a@b3:" + "A" * 64],
    ],
)
def test_what_breaks_the_grammar_is_invalid(text: str) -> None:
    with pytest.raises(Invalid):
        parse_reference(text)


@given(st.text())
def test_any_text_is_a_reference_or_invalid_and_never_a_path(text: str) -> None:
    try:
        reference = parse_reference(text)
    except Invalid:
        return
    assert parse_reference(str(reference)) == reference
    if reference.name:
        assert ".." not in name_key(reference.name, reference.tag).split("/")
        assert name_key(reference.name, reference.tag).count("/") == 2


def test_a_name_is_set_read_and_changed() -> None:
    names = Names(Memory())
    assert names.set("debian", "12", "amd64", ONE).revision == 1
    assert names.set("debian", "12", "aarch64", TWO).revision == 2
    assert names.get("debian", "12").digest("x86_64") == ONE
    assert names.get("debian", "12").digest("arm64") == TWO
    names.set("debian", "12", "x86_64", TWO)
    assert [change.images["x86_64"] for change in names.history("debian", "12")] == [TWO, ONE, ONE]
    with pytest.raises(NotFound, match="riscv64"):
        names.get("debian", "12").digest("riscv64")


def test_setting_what_is_there_writes_nothing() -> None:
    memory = Memory()
    first = Names(memory).set("debian", "12", "x86_64", ONE)
    assert Names(memory).set("debian", "12", "x86_64", ONE) == first


def test_a_removed_name_is_not_found_until_it_is_undeleted() -> None:
    names = Names(Memory())
    names.set("debian", "12", "x86_64", ONE)
    names.remove("debian", "12")
    with pytest.raises(NotFound) as caught:
        names.get("debian", "12")
    assert "undelete" in caught.value.hint
    assert [record.tag for record in names.list()] == []
    assert [record.tag for record in names.list(removed=True)] == ["12"]
    names.undelete("debian", "12")
    assert names.get("debian", "12").digest("x86_64") == ONE
    with pytest.raises(NotFound):
        names.undelete("debian", "12")
    with pytest.raises(NotFound):
        names.remove("debian", "13")


def test_one_architecture_is_removed_and_the_last_one_takes_the_name_with_it() -> None:
    names = Names(Memory())
    names.set("debian", "12", "x86_64", ONE)
    names.set("debian", "12", "aarch64", ONE)
    names.remove("debian", "12", "aarch64")
    assert set(names.get("debian", "12").images) == {"x86_64"}
    names.remove("debian", "12", "x86_64")
    with pytest.raises(NotFound):
        names.get("debian", "12")


def test_setting_a_removed_name_starts_anew_and_remembers() -> None:
    names = Names(Memory())
    names.set("debian", "12", "x86_64", ONE)
    names.set("debian", "12", "aarch64", ONE)
    names.remove("debian", "12")
    record = names.set("debian", "12", "x86_64", TWO)
    assert record.images == {"x86_64": TWO}
    assert [change.removed for change in names.history("debian", "12")] == [False, True, False, False]


class LosesAnswers(Memory):
    """Every conditional write arrives, is followed by `then`, and its repeat is refused."""

    then: Names | None = None

    def put(self, key: str, data: object, **conditions: object) -> object:  # type: ignore[override]
        super().put(key, data, **conditions)  # type: ignore[arg-type]
        if self.then is not None:
            then, self.then = self.then, None
            then.set("debian", "12", "aarch64", TWO)
        raise Conflict("the repeat met its own object")


def test_a_lost_answer_is_recognised_by_its_nonce() -> None:
    record = Names(LosesAnswers()).set("debian", "12", "x86_64", ONE)
    assert record.revision == 1
    assert record.history == ()


def test_a_lost_answer_is_recognised_below_a_later_write() -> None:
    memory = LosesAnswers()
    other = Memory()
    other.objects, memory.then = memory.objects, Names(other)
    Names(memory).set("debian", "12", "x86_64", ONE)
    record = Names(other).get("debian", "12")
    assert record.revision == 2
    assert record.images == {"x86_64": ONE, "aarch64": TWO}


def test_an_unknown_name_is_told_its_neighbours() -> None:
    names = Names(Memory())
    for name, tag in [("debian", "12"), ("debian", "13"), ("ubuntu", "24.04")]:
        names.set(name, tag, "x86_64", ONE)
    assert names.nearest("debain:12")[0] == "debian:12"
    assert set(names.nearest("debian:trixie")) == {"debian:12", "debian:13"}
    with pytest.raises(NotFound) as caught:
        names.get("ubunut", "24.04")
    assert "ubuntu:24.04" in caught.value.hint


def test_a_name_with_any_byte_changed_is_corrupt() -> None:
    data = Names(Memory()).set("debian", "12", "x86_64", ONE).encode()
    for at in range(len(data)):
        with pytest.raises(Corrupt):
            NameRecord.decode(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", seal({}), seal({"images": 1})])
def test_what_is_no_name_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        NameRecord.decode(data)


def test_a_name_under_another_ones_key_is_corrupt() -> None:
    memory = Memory()
    Names(memory).set("debian", "12", "x86_64", ONE)
    memory.put("names/debian/13", memory.get("names/debian/12").data)
    with pytest.raises(Corrupt):
        Names(memory).get("debian", "13")


@pytest.mark.parametrize("data", [b"damaged", seal({"requires": ["more"]}), seal({"images": 1})])
def test_one_name_that_cannot_be_read_hides_no_other_from_who_only_shows_them(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Who deletes or signs by them is told."""
    memory = Memory()
    store = Store.init(memory)
    for tag in ("11", "13"):
        store.names.set("debian", tag, "x86_64", ONE)
    memory.put(name_key("debian", "12"), data)
    for strict in (store.names.list, store.names.images):
        with pytest.raises((Corrupt, Unsupported)):
            list(strict())
    assert not caplog.text
    assert [record.tag for record in store.names.list(lenient=True)] == ["11", "13"]
    assert caplog.text.count("names/debian/12 is left out") == 1
    assert len(store.names.images(lenient=True)) == 2
    assert [artifact.name for artifact in named_images([store])] == ["debian:11", "debian:13"]


def test_a_later_format_is_refused() -> None:
    with pytest.raises(Unsupported):
        NameRecord.decode(seal({"format": 2, "name": "a"}))


def test_an_unreachable_store_is_not_an_unknown_name() -> None:
    class Down(Memory):
        def get(self, key: str, start: int = 0, length: int | None = None) -> object:  # type: ignore[override]
            raise Unavailable("down")

    with pytest.raises(StoreError) as caught:
        Names(Down()).get("debian", "12")
    assert isinstance(caught.value, Unavailable)
