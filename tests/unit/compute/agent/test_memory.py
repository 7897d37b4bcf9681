"""Who a node is, and what it remembers of its server."""

from pathlib import Path

import pytest

from compute.agent import memory as module
from compute.agent.memory import Memory
from compute.errors import Conflict, Unavailable
from compute.wire.spec import NodeDesired
from net import NodeNetworks


def desired(epoch: str, reached: int, *former: str) -> NodeDesired:
    return NodeDesired(1, NodeNetworks("0badcafe", "n"), epoch=epoch, reached=reached, former=former)


def test_the_id_is_made_once_and_that_of_a_directory_of_0_1_is_the_same_in_its_copy(tmp_path: Path) -> None:
    """A2: a node's identity is a random id in its state directory."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = Memory(tmp_path / "a").now.machine
    assert len(first) == 32 and Memory(tmp_path / "a", proof="other").now.machine == first
    assert Memory(tmp_path / "b", proof="known").now.machine == "known"


def test_only_a_state_that_holds_what_was_seen_is_followed(tmp_path: Path) -> None:
    """A4: each of these was acted on."""
    memory = Memory(tmp_path)
    assert memory.follows(desired("e", 5)) and memory.follows(desired("e", 7))
    assert not memory.follows(desired("e", 6))
    assert not memory.follows(desired("f", 100))
    assert not Memory(tmp_path).follows(desired("", 0))
    assert Memory(tmp_path).now.reached == 7
    assert memory.follows(desired("f", 2, "x", "e"))
    assert (Memory(tmp_path).now.epoch, Memory(tmp_path).now.reached) == ("f", 2)


def test_a_server_of_0_1_that_has_no_epoch_is_followed_until_one_has(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.follows(desired("", 0)) and memory.follows(desired("e", 1))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 7}'])
def test_a_broken_file_is_said_with_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_text(text)
    with pytest.raises(Unavailable, match=r"node\.json"):
        Memory(tmp_path)


@pytest.mark.parametrize("shared", [True, False], ids=["files-too", "network-alone"])
def test_a_copy_is_refused_with_both_paths_and_another_node_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A5: a copy of the state directory started beside the original deleted the original's guests."""
    locks = [tmp_path / "l", tmp_path / "l" if shared else tmp_path / "m"]
    for name in ("original", "copy", "other", "l", "m"):
        (tmp_path / name).mkdir()
    original, other = Memory(tmp_path / "original"), Memory(tmp_path / "other")
    copy = Memory(tmp_path / "copy", proof=original.now.machine)
    monkeypatch.setattr(module, "_LOCKS", locks[0])
    with original.alone("0badcafe"), other.alone("0badcafe"):
        monkeypatch.setattr(module, "_LOCKS", locks[1])
        with pytest.raises(Conflict, match=r"/copy is the same node as") as caught, copy.alone("0badcafe"):
            pass
        assert not shared or str(tmp_path / "original") in str(caught.value)
        with copy.alone("0badcaff"):
            pass
    with copy.alone("0badcafe"):
        pass
