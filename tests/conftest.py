"""What holds for every test: hypothesis profiles, skips where a real tool cannot run, and nothing left behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import drills

# Every process that a test starts inherits this, however detached it is, unless its environment is emptied.
_SESSION = uuid.uuid4().hex
os.environ["SF_TEST_SESSION"] = _SESSION

hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize="SF_TEST_SEED" not in os.environ,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "all",
    parent=hypothesis.settings.get_profile("ci"),
    max_examples=500,
    stateful_step_count=60,
    derandomize=False,
)
hypothesis.settings.load_profile("all" if drills.everything() else "ci")

_SYSTEM_TOOLS = ("libvirtd", "qemu-system-x86_64", "qemu-img", "dnsmasq", "nft", "ip", "unshare", "nsenter")


def _why_no_system_tests() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    missing = [
        tool for tool in _SYSTEM_TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        return f"needs {', '.join(missing)} (scripts/setup installs them)"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_system_tests()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("system"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    extent = "all rounds" if drills.everything() else "a sample of the rounds"
    return f"drills: {extent}, SF_TEST_SEED={drills.seed()}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("drills", f"repeat with SF_TEST_SEED={drills.seed()}"))
    return report


@pytest.fixture(scope="session")
def tiny_image() -> Path:
    """The tiny guest's qcow2 file (read-only by agreement), built at most once per recipe."""
    script = Path(__file__).parents[1] / "scripts/build-image"
    done = subprocess.run([script, "tiny", "--cached"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def _namespaces() -> set[str]:
    directory = Path("/run/netns")
    return {f"namespace {path.name}" for path in directory.iterdir()} if directory.is_dir() else set()


# These come with a kernel module, in every namespace, when somebody first needs it.
_OF_MODULES = re.compile(r"(ifb|tunl|gre|gretap|erspan|sit|ip6tnl|ip_vti|ip6_vti|bond|dummy)\d")


def _links() -> set[str]:
    names = (path.name for path in Path("/sys/class/net").iterdir())
    return {f"link {name}" for name in names if not _OF_MODULES.fullmatch(name)}


def _mounts() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {f"mount {line.split()[4]}" for line in lines}


def _domains() -> set[str]:
    if not Path("/run/libvirt/libvirt-sock").exists() or os.geteuid() != 0:
        return set()
    asked = subprocess.run(
        ["virsh", "-c", "qemu:///system", "list", "--all", "--name"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return {f"domain {name}" for name in asked.stdout.split()}


def _processes(since_s: float = 0) -> set[str]:
    """Those of this session that began since then (CLOCK_BOOTTIME)."""
    found = set()
    needle, ticks = f"SF_TEST_SESSION={_SESSION}".encode(), os.sysconf("SC_CLK_TCK")
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == os.getpid():
            continue
        try:
            if needle not in (directory / "environ").read_bytes():
                continue
            began = int((directory / "stat").read_text().rpartition(")")[2].split()[19])
            if began >= int(since_s * ticks) and _command(directory.name):  # a zombie has none
                found.add(f"process {directory.name}")
        except OSError:  # it ended while we looked, or is not ours to read
            continue
    return found


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _state() -> set[str]:
    return _namespaces() | _links() | _mounts() | _domains()


def _strict() -> bool:
    """Namespaces and links carry no mark of the test run that made them, so they are counted only where `scripts/test`
    says that it has the machine for itself."""
    return os.environ.get("SF_TEST_STRICT") == "1"


_of_failed: set[str] = set()
_ended: list[str] = []
_began: list[tuple[int, float]] = [(0, 0.0)]  # of the test that runs: how many had failed, and when it began


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Remember the processes of a test that failed: some are of fixtures that end later."""
    _began[:] = [(item.session.testsfailed, time.clock_gettime(time.CLOCK_BOOTTIME))]
    done = yield
    _remember(item.session)
    return done


def _remember(session: pytest.Session) -> None:
    failed, began_s = _began[0]
    if session.testsfailed > failed:
        _of_failed.update(_processes(began_s))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _ended:
        terminalreporter.section("left behind by tests that failed, and ended now")
        terminalreporter.write_line("\n".join(_ended))


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the session as interrupted if a namespace, link, mount, domain or process of ours outlives it: no second run
    of what failed makes that good. A process that a test left that failed is ended instead: alone it may pass, and
    leave nothing. Of namespaces, links and mounts nobody knows whose they are, so none is taken away.
    """
    before = _state()
    yield
    _remember(request.session)  # of the last one
    for _ in range(
        200
    ):  # what ends by its parent's end (multiprocessing's resource tracker) ends a moment after it
        left = _processes()
        if _strict():
            left |= _state() - before
        if not left:
            return
        time.sleep(0.1)
    said = {}
    for thing in left:
        with contextlib.suppress(OSError):
            said[thing] = f"{thing}: {_command(thing[8:])[:200]}" if thing.startswith("process ") else thing
    for thing in sorted(said.keys() & _of_failed):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(thing[8:]), signal.SIGKILL)
        _ended.append(said.pop(thing))
    if said:
        pytest.exit("left behind by the tests:\n  " + "\n  ".join(sorted(said.values())), returncode=2)


def _s3_server(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from tests import servers  # boto3: only who asks for a server pays

    for name, value in servers.credentials().items():
        os.environ.setdefault(name, value)
    with getattr(servers, kind)(tmp_path_factory.mktemp(kind)) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A real S3 server for the whole session (tests.servers.Server); each test makes its own bucket."""
    yield from _s3_server("seaweedfs", tmp_path_factory)


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A second opinion on what S3 does."""
    yield from _s3_server("moto", tmp_path_factory)


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """An S3 server without conditional writes."""
    yield from _s3_server("rclone", tmp_path_factory)
