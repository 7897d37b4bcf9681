import pytest

from imagestore.backends.protocol import Object, ObjectStat
from imagestore.backends.wrappers import RateLimited, Retried
from imagestore.errors import Conflict, Corrupt, NotFound, Unavailable
from tests.faults.faulty import Faulty
from tests.memory import Memory


def test_what_was_unavailable_is_asked_again_with_growing_pauses() -> None:
    class Down(Memory):
        asked = 0

        def stat(self, key: str) -> ObjectStat:
            self.asked += 1
            raise Unavailable("down")

    down, slept = Down(), list[float]()
    with pytest.raises(Unavailable):
        Retried(down, sleep=slept.append).stat("a")
    assert down.asked == 7
    assert len(slept) == 6
    for at, pause in enumerate(slept):
        assert 0.1 * 2**at <= pause <= 0.2 * 2**at + 1e-9


@pytest.mark.parametrize("kind", [NotFound, Conflict, Corrupt])
def test_other_errors_are_not_repeated(kind: type[Exception]) -> None:
    class Wrong(Memory):
        asked = 0

        def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
            self.asked += 1
            raise kind("no")

    wrong = Wrong()
    with pytest.raises(kind):
        Retried(wrong, sleep=lambda _: None).get("a")
    assert wrong.asked == 1


def test_a_put_whose_answer_was_lost_is_repeated() -> None:
    memory = Memory()
    Retried(Faulty(memory, 0, "lost"), sleep=lambda _: None).put("a", b"x")
    assert memory.get("a").data == b"x"
    with pytest.raises(Conflict):
        Retried(Faulty(memory, 0, "lost"), sleep=lambda _: None).put("b", b"x", if_none_match=True)


def test_a_listing_that_breaks_off_goes_on_without_repeating_itself() -> None:
    class Breaks(Memory):
        left = 3

        def list(self, prefix: str):  # type: ignore[no-untyped-def]
            for number, stat in enumerate(super().list(prefix)):
                if number == 4 - self.left and self.left:
                    self.left -= 1
                    raise Unavailable("the connection broke")
                yield stat

    breaks = Breaks()
    for number in range(9):
        breaks.put(f"a/{number}", b"")
    keys = [stat.key for stat in Retried(breaks, sleep=lambda _: None).list("a/")]
    assert keys == [f"a/{number}" for number in range(9)]
    assert breaks.left == 0


def test_bytes_are_paid_for_in_time() -> None:
    slept: list[float] = []
    backend = RateLimited(Memory(), 1000.0, sleep=slept.append)
    backend.put("a", [bytes(400), bytes(100)])
    backend.get("a")
    backend.get("a")
    assert 0.9 < slept[1] <= 1.0
