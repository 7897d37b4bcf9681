"""The accelerator probe, with the real qemu."""

import json
import os
import shutil
from pathlib import Path

import pytest

from compute.agent.hypervisor import accel
from compute.errors import Invalid

QEMU = "qemu-system-x86_64"

needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason="no qemu here")


@needs_qemu
def test_the_probes_code_reaches_64_bit_mode_and_says_so() -> None:
    assert accel.reaches_long_mode(QEMU, "tcg", 30) == ""


@needs_qemu
def test_a_processor_without_64_bit_mode_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bytearray(accel.rom())
    broken[0x64] = 0xF4  # the 64-bit code halts before it prints
    monkeypatch.setattr(accel, "rom", lambda: bytes(broken))
    assert "does not reach 64-bit mode" in accel.reaches_long_mode(QEMU, "tcg", 1)


def test_an_accelerator_that_qemu_does_not_have_is_said(tmp_path: Path) -> None:
    assert "does not run" in accel.reaches_long_mode(str(tmp_path / "no-qemu"), "tcg")
    if shutil.which(QEMU):
        assert "nonsense" in accel.reaches_long_mode(QEMU, "nonsense")


def test_the_user_may_insist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_ACCEL", "kvm")
    assert str(accel.find(tmp_path)) == "kvm (by SF_ACCEL)"
    monkeypatch.setenv("SF_ACCEL", "fast")
    with pytest.raises(Invalid, match="SF_ACCEL"):
        accel.find(tmp_path)


@needs_qemu
@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm")
def test_the_verdict_is_kept_and_asked_for_again_after_a_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SF_ACCEL", raising=False)
    probes = []
    monkeypatch.setattr(accel, "reaches_long_mode", lambda *a: probes.append(a) or "it hangs")
    assert accel.find(tmp_path) == accel.find(tmp_path)
    assert accel.find(tmp_path) == accel.Verdict("tcg", "KVM is there, but it hangs")
    assert len(probes) == 1
    kept = json.loads((tmp_path / "accel.json").read_text())
    (tmp_path / "accel.json").write_text(json.dumps({**kept, "key": ["another boot", "another qemu"]}))
    accel.find(tmp_path)
    assert len(probes) == 2
