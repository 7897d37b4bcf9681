"""A picture of a guest's screen, from the driver that libvirt has for tests."""

import libvirt as driver
import pytest

from compute.agent.hypervisor import domain, libvirt


def test_a_picture_is_what_libvirt_hands_out_and_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "name", lambda installation, uuid: "test")
    hypervisor = libvirt.Hypervisor("test:///default", "0123abcd", lambda uuid, what: None)
    monkeypatch.setattr(hypervisor, "_connection", driver.open("test:///default"))
    whole = hypervisor.screenshot("any")
    assert whole[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setattr(libvirt, "_PICTURE_BYTES", 100)
    assert hypervisor.screenshot("any") == whole[:100]
