"""What is installed is what was written: a wheel, in a directory that knows nothing of this tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, built from what git has, without a network."""
    tmp = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if name.split("/")[0] not in ("tests", "scripts", "docs") and (ROOT / name).is_file():
            (tmp / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp / "tree" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp / "out", tmp / "tree"]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = (tmp / "out").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-t", tmp / "target", wheel], check=True)
    return tmp / "target"


def test_mirror_sync_of_an_installed_wheel_has_its_source_lists(installed: Path, tmp_path: Path) -> None:
    """Every upstream is asked, though none answers: nothing listens where the proxy should be."""
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "SF_STATE_DIR": str(tmp_path / "state"),
        "SF_CACHE_DIR": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:1",
        "NO_PROXY": "",
    }
    program = "import cli.main, sys; print(cli.main.__file__); sys.argv[0] = 'sf'; cli.main.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "mirror", "sync", "debian:12"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{installed}/cli/main.py\n"), done.stderr
    assert "debian:12 x86_64" in done.stdout and "failed" in done.stdout, done.stderr
    assert done.returncode == 1 and "no source lists" not in done.stderr


@pytest.mark.parametrize(
    "pages", ["imagestore/mirror/templates", "compute/api/ui/templates", "compute/api/ui/static"]
)
def test_a_wheel_carries_the_pages(installed: Path, pages: str) -> None:
    here = sorted(p.name for p in (ROOT / pages).iterdir())
    assert sorted(p.name for p in (installed / pages).iterdir()) == here


def test_a_wheel_carries_the_code_that_probes_kvm(installed: Path) -> None:
    name = "compute/agent/hypervisor/longmode.hex"
    assert (installed / name).read_bytes() == (ROOT / name).read_bytes()
