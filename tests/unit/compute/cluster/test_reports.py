"""What a node says of what somebody took away."""

from compute.agent.reports import Reports
from compute.wire.spec import DiskSpec, InstanceSpec, InterfaceSpec, NodeEvent
from net import Action
from net.plan.facts import Link
from net.plan.plan import Verb


async def _nowhere(*_: object) -> None: ...


def test_what_was_put_right_is_an_event_of_the_node_and_of_the_guest_it_met() -> None:
    """D4: nothing said so."""
    reports, noted = Reports(_nowhere), list[NodeEvent]()
    reports.note = noted.append  # type: ignore[method-assign]
    specs = [
        InstanceSpec(
            name, name, "", 1, 16, (DiskSpec("vda"),), (InterfaceSpec("i", "n", "m", "a", tap=f"sft{name}"),)
        )
        for name in ("web", "db")
    ]
    tap = Link("sftweb", "tun", "", 1450)
    reports.put_right("n1", [Action(Verb.ADOPT, "sf-x", tap)], specs)
    assert noted == []  # it is being started
    reports.put_right("n1", [Action(Verb.ADD, "", tap), Action(Verb.ADOPT, "sf-x", tap)], specs)
    assert [(event.object_type, event.object_uuid) for event in noted] == [
        ("node", "n1"),
        ("instance", "web"),
    ]
    assert noted[0].message == "networks put right: the tap device sftweb is missing"
