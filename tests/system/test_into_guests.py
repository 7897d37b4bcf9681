"""Into a guest on a second node from a laptop that reaches the API's port and nothing else."""

import base64
import hashlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.browser import Browser, browser
from tests.novnc import novnc
from tests.system.boot_sector import typewriter
from tests.system.cluster import Cluster
from tests.system.laptop import URL, Laptop
from tests.system.machine import ROOT, Machine, within
from tests.system.test_api_client import client_bin as client_bin

pytestmark = pytest.mark.system


OWN = "3\n"  # files in /tmp that a command has while it runs: output, errors, process
PAGE = (ROOT / "docs/howto/laptop.md").read_text()


def lines(part: str) -> list[str]:
    return [
        line for block in re.findall(r"^```sh\n(.*?)^```", part, re.M | re.S) for line in block.splitlines()
    ]


@dataclass
class Site:
    cluster: Cluster
    laptop: Laptop
    home: Path
    fingerprint: str

    def types(self, line: str) -> str:
        """A line of the page, with this site's address, image and key."""
        key = self.laptop.home / "key"
        for said, meant in (
            ("https://cloud.lan:13000", URL),
            ("b3:9f86…", self.fingerprint),
            ("--image debian:12", "--image tiny:1 --memory 160 --on n2"),
            ("--base debian:12", "--base tiny:1 --memory 160 --on n2"),
            ("~/.ssh/id_ed25519.pub", f"{key}.pub"),
            ("-l root", f"-l root -i {key}"),
            ("root@web", f"-i {key} -o UserKnownHostsFile=/dev/null root@web"),
        ):
            line = line.replace(said, meant)
        return self.laptop.run("bash", "-c", f"cd {self.laptop.home} && {line}").stdout.decode()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("into")
    with ExitStack() as stack:
        (home / "laptop").mkdir()
        laptop = Laptop(stack.enter_context(PrivateHost(libvirtd=False)), home / "laptop")

        def prepare(cluster: Cluster, machine: Machine) -> None:
            if machine.settings["SF_NODE_NAME"] == "n1":
                laptop.plug(machine)

        cluster = Cluster(
            stack, home, tiny_image, ("n1", "n2"), prepare, SF_LISTEN="0.0.0.0:13000", SF_NOVNC=str(novnc())
        )
        laptop.run("install", "-m", "600", str(cluster.key), f"{cluster.key}.pub", str(laptop.home))
        (laptop.home / "app").mkdir()
        (laptop.home / "app/run").write_text("#!/bin/sh\necho it runs\n")
        (laptop.home / "app/run").chmod(0o755)
        (laptop.home / "app.yaml").write_text("#!/bin/sh\necho built by $(hostname)\n")
        (laptop.home / "key.secret").write_bytes((cluster.server.state / "auth/local-key").read_bytes())
        found = Site(cluster, laptop, home, laptop.fingerprint(cluster.server))
        for line in lines(PAGE.split("## Commands and files")[0]):
            found.types(line.replace("< key", "< key.secret"))
        within(60, lambda: cluster.server.instance("web")["agent_state"] == "ready", "the agent is there")
        yield found


def test_the_page_for_laptops_is_true(site: Site) -> None:
    seen = {line: site.types(line) for line in lines(PAGE.split("## Commands and files")[1])}
    said = list(seen.values())
    assert "Linux web" in said[0] and said[1] == "hello from web\n" and "app" in said[3]
    assert (site.laptop.home / "copy").read_text().endswith("it runs\n")
    assert "SF-GUEST-READY" in seen["sf instance console web"]
    assert seen["sf run --image debian:12 -v ./app:/opt/ -- /opt/app/run"] == "it runs\n"
    assert "tiny:1" in seen["sf image show my/app:1"]
    assert seen["sf instance ssh web -l root hostname"] == "web\n" and "load average" in said[-1]
    site.laptop.run("timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/10.78.0.1/22", code=124)


@pytest.mark.skipif(shutil.which("ansible") is None, reason="needs ansible-core")
def test_ansible_gets_into_a_guest_on_another_node_by_its_inventory_alone(site: Site) -> None:
    """Its plugin knows the server, its certificate and the key from `sf login`, and ssh goes through the API."""
    (site.laptop.home / "lab.sf.yml").write_text("plugin: sf.cloud.instances\n")
    # A connection that is kept for the next command would outlive the test.
    settings = (
        f"ANSIBLE_COLLECTIONS_PATH={site.laptop.home}/c ANSIBLE_HOST_KEY_CHECKING=0 ANSIBLE_SSH_ARGS=-C"
    )
    site.types(f"ansible-galaxy collection install -p c {ROOT}/contrib/ansible")
    said = site.types(f"{settings} ansible web -i lab.sf.yml -u root --private-key key -m raw -a hostname")
    assert re.search(r"^web \| CHANGED \| rc=0 >>\nweb\s", said, re.M), said


def test_a_command_has_its_output_its_errors_and_its_code(site: Site) -> None:
    sf = site.laptop.sf
    assert sf("instance", "exec", "web", "--", "uname", "-s") == "Linux\n"
    done = site.laptop.run(
        "sf", "instance", "exec", "web", "--", "sh", "-c", "echo a; echo b >&2; exit 7", code=7
    )
    assert (done.stdout, done.stderr) == (b"a\n", b"b\n")
    assert sf("instance", "exec", "web", "-i", "--", "tr", "a-z", "A-Z", given=b"input\n") == "INPUT\n"
    sf("instance", "exec", "web", "--", "no-such-command", code=127)
    long = "for i in 1 2 3; do echo $i; sleep 1; done; head -c 600000 /dev/zero; echo end >&2; exit 3"
    done = site.laptop.run("sf", "instance", "exec", "web", "--", "sh", "-c", long, code=3)
    assert done.stdout == b"1\n2\n3\n" + bytes(600000) and done.stderr == b"end\n"
    assert sf("instance", "exec", "web", "--", "sh", "-c", "ls -a /tmp | grep -c sf-") == OWN


def test_files_and_directories_go_in_and_come_out_whole(site: Site) -> None:
    sf, home = site.laptop.sf, site.laptop.home
    data = random.Random(1).randbytes(150_000)
    (home / "there/sub").mkdir(parents=True)
    (home / "there/sub/data").write_bytes(data)
    sf("instance", "cp", str(home / "app/run"), "web:/tmp/")
    assert sf("instance", "exec", "web", "--", "/tmp/run") == "it runs\n"
    sf("instance", "cp", str(home / "there"), "web:/tmp/renamed")
    (home / "back").mkdir()
    sf("instance", "cp", "web:/tmp/renamed/sub/data", "web:/tmp/renamed", str(home / "back"))
    assert (home / "back/data").read_bytes() == (home / "back/renamed/sub/data").read_bytes() == data
    sf("instance", "cp", "web:/no/such", str(home / "back"), code=3)
    sf("instance", "cp", str(home / "app/run"), "web:/no/such/place", code=1)
    sf("instance", "cp", "web:/etc/passwd", "web:/tmp/x", code=2)
    assert sorted(path.name for path in (home / "back").iterdir()) == ["data", "renamed"]
    trick = "cd /tmp && mkdir -p evil && ln -s /etc evil/out && ln -s ../../../up evil/up"
    sf("instance", "exec", "web", "--", "sh", "-c", trick)
    sf("instance", "cp", "web:/tmp/evil", str(home / "back"))
    assert sorted(path.name for path in (home / "back").iterdir()) == ["data", "evil", "renamed"]
    assert not list((home / "back/evil").iterdir())
    assert sf("instance", "exec", "web", "--", "sh", "-c", "ls -a /tmp | grep -c sf-") == OWN


class Typist:
    """Somebody at a terminal of the laptop's."""

    def __init__(self, laptop: Laptop, *words: str) -> None:
        self.terminal, inside = pty.openpty()
        self.before = termios.tcgetattr(inside)
        self.process = subprocess.Popen(
            laptop.argv("setsid", "-c", "-w", "sf", *words), stdin=inside, stdout=inside, stderr=inside
        )
        self._inside, self.seen = inside, b""

    def sees(self, what: bytes, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while what not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 65536)

    def types(self, text: bytes) -> None:
        os.write(self.terminal, text)

    def leaves(self, code: int) -> None:
        """With the terminal as it was."""
        self.sees(b"\x1b[!p")
        assert self.process.wait(30) == code
        assert termios.tcgetattr(self._inside) == self.before
        os.close(self._inside)
        os.close(self.terminal)


def test_two_type_into_one_console_and_leave_their_terminals_as_they_were(site: Site) -> None:
    one, other = (Typist(site.laptop, "instance", "console", "web") for _ in range(2))
    for typist in (one, other):
        typist.sees(b"^] leaves")
    time.sleep(1)
    one.types(b"echo sum-$((40+2))\r")
    one.sees(b"sum-42")
    other.sees(b"sum-42")
    other.types(b"\x1d")
    other.leaves(0)
    one.types(b"echo sum-$((50+2))\r")
    one.sees(b"sum-52")
    site.laptop.host.run(["pkill", "-TERM", "-f", "bin/sf instance console"], check=False)
    one.leaves(130)
    assert "sum-52" in site.laptop.sf("instance", "console", "web")


@pytest.mark.skipif(not drills.everything(), reason="a guest more to boot: scripts/test --all")
def test_a_guest_of_ipv6_alone_is_pinged_logged_in_to_and_finds_its_name(site: Site) -> None:
    sf, key = site.laptop.sf, str(site.laptop.home / "key")
    sf("network", "create", "six", "--ipv6", "auto")
    guest = ("--image", "tiny:1", "--memory", "160", "--on", "n2", "--network", "six")
    sf("instance", "create", "alone", *guest, "--ssh-key", f"{key}.pub", "--wait", "boot")
    (link,) = site.cluster.server.instance("alone")["interfaces"]
    assert link["ipv4"] is None and "bytes from" in sf("network", "ping", "six", link["ipv6"])
    ask = "ip -4 -o address show scope global; cat /etc/resolv.conf; nslookup -type=aaaa alone.sf.internal"
    seen = sf("instance", "ssh", "alone", "-l", "root", "-i", key, ask)
    block = site.cluster.server.listed("network", "show", "six")["netblock6"].removesuffix(":/64")
    assert re.fullmatch(rf"nameserver {block}:1\n.*{link['ipv6']}\s*", seen, re.S), seen
    sf("instance", "delete", "alone", "--force")
    shown = lambda: site.cluster.server.listed("network", "show", "six")["interfaces"]  # noqa: E731
    within(60, lambda: not shown(), "it is gone")
    sf("network", "delete", "six", "--force")


def test_ssh_scp_and_ports_go_through_the_api(site: Site) -> None:
    key = str(site.laptop.home / "key")
    who = site.laptop.sf("instance", "ssh", "web", "-l", "root", "-i", key, "hostname; exit 4", code=4)
    assert who == "web\n"
    data = random.Random(2).randbytes(1_000_000)
    (site.laptop.home / "big").write_bytes(data)
    options = ["-o", "ProxyCommand=sf instance connect %h %p", "-o", "StrictHostKeyChecking=no"]
    options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-i", key]
    send = ["ssh", *options, "root@web", "cat > /tmp/big; sha256sum < /tmp/big"]
    done = site.laptop.run(*send, given=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    process = subprocess.Popen(
        site.laptop.argv("sf", "instance", "forward", "web", "8022:22"), stderr=subprocess.PIPE
    )
    try:
        assert process.stderr and b"8022" in process.stderr.readline()
        talk = "import socket; s = socket.create_connection(('127.0.0.1', 8022)); print(s.recv(8))"
        for _ in range(3):  # a router that moves costs a connection, and the next one may take it
            within(
                60, lambda: b"SSH-2.0" in site.laptop.run("python3", "-c", talk).stdout, "through the port"
            )
    finally:
        site.laptop.host.run(["pkill", "-f", "instance forward web"], check=False)
        process.wait(30)
        print(process.stderr.read() if process.stderr else "")
    refused = site.laptop.run("sf", "instance", "connect", "web", "81", code=8)
    assert b"Connection refused" in refused.stderr


@dataclass
class Client:
    """Shaken Fist's, on the server: its certificate is for that name, and pinned by nobody."""

    site: Site
    place: Path

    def __call__(self, *words: str, program: str = "sf-client", code: int = 0) -> str:
        server = self.site.cluster.server
        told = {"SHAKENFIST_API_URL": "https://localhost:13000", "SHAKENFIST_NAMESPACE": "system"}
        told["SHAKENFIST_KEY"] = (server.state / "auth/local-key").read_text()
        told["REQUESTS_CA_BUNDLE"] = str(server.state / "auth/ca.crt")
        variables = [f"{name}={value}" for name, value in told.items()]
        argv = server.argv("env", *variables, str(self.place / program), *words)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def script(self, text: str) -> str:
        """What a script prints that has the library's client as `c`."""
        begin = "from shakenfist_client import apiclient as a; c = a.Client(async_strategy='continue'); "
        return self("-c", begin + text, program="python").strip()


@pytest.fixture
def client(site: Site, client_bin: Path) -> Client:
    return Client(site, client_bin)


VICTIMS = ("client", "server", "agent", "libvirtd")


@pytest.mark.drill
def test_who_is_killed_in_the_middle_leaves_a_clear_end_and_nothing_in_the_guest(
    site: Site, client: Client
) -> None:
    def left() -> tuple[str, int]:
        """Processes and directories of commands; of the latter one is this look's own."""
        look = "ps | grep '[s]leep [14][0-9]'; ls -d /tmp/.sf-* | wc -l"
        *processes, count = site.laptop.run(
            "sf", "instance", "exec", "web", "--", "sh", "-c", look
        ).stdout.split(b"\n")[:-1]
        return b"".join(processes), int(count)

    for victim in random.Random(drills.seed()).sample(VICTIMS, drills.rounds(len(VICTIMS))):
        before = left()  # who cannot end a command any more, since the agent is killed, leaves it
        asked = client.script("print(c.instance_execute('web', 'sleep 4321; true')['uuid'])")
        running = subprocess.Popen(
            site.laptop.argv("sf", "instance", "exec", "web", "--", "sh", "-c", "echo begun; sleep 1234; true"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert running.stdout and running.stderr and running.stdout.readline() == b"begun\n"
        n1, n2 = site.cluster.server, site.cluster.nodes["n2"]
        if victim == "client":
            site.laptop.host.run(["pkill", "-KILL", "-f", "begun; sleep 1234"], check=False)
        elif victim == "server":
            n1.signal()
            n1.start()
        elif victim == "agent":
            n2.signal()
            n2.start("agent")
        else:
            n2.host.kill_libvirtd()
            n2.host.start_libvirtd()
        code = running.wait(60)
        said = running.stderr.read().decode()
        assert victim == "client" or (code == 8 and said.count("\n") == 1), f"{victim}: {code} {said}"
        answers = ["sf", "instance", "exec", "web", "--", "true"]
        within(60, lambda: subprocess.run(site.laptop.argv(*answers)).returncode == 0, f"after the {victim}")  # noqa: B023
        how = f"\ntry: print(c.get_agent_operation('{asked}')['results'] and 'ended')\n"
        how += "except a.APIException: print('gone')"
        ends = {"client": "{}", "server": "gone"}
        assert client.script(how) == ends.get(victim, "ended"), (
            f"an operation in the middle of which {victim} was killed"
        )
        if victim == "client":
            client.script(f"c.delete_agent_operation('{asked}')")
        if victim in ("client", "server"):
            within(30, lambda: left() == before, f"the command of the {victim} is gone")  # noqa: B023


def test_shaken_fists_client_asks_the_agent_unchanged(site: Site, client: Client) -> None:
    said = json.loads(client("--json", "instance", "execute", "web", "echo out; echo bad >&2; exit 3"))
    assert said["results"]["0"] == {"return-code": 3, "stdout": "out\n", "stderr": "bad\n"}
    assert "Linux" in client("instance", "execute", "web", "uname -a")
    assert "execute" in client("instance", "show", "web", "-a")
    assert client.script("print(c.await_agent_command('web', 'hostname'))") == "(0, 'web\\n')"
    (home := site.home / "client").mkdir()
    (home / "file").write_bytes(data := random.Random(2).randbytes(150_000))
    client("instance", "upload", "web", str(home / "file"), "/tmp/up loaded")
    client("instance", "download", "web", "/tmp/up loaded", str(home / "back"))
    assert (home / "back").read_bytes() == data
    assert "644" in client("instance", "execute", "web", "stat -c %a '/tmp/up loaded'; ls /tmp/up*.* 2>&1")
    assert "screen" in client("instance", "screenshot", "web", str(home / "shot"), code=1), "it has none"


def test_a_guest_that_hears_its_power_button_ends_by_itself_and_starts_again_if_it_is_wanted_on(
    site: Site,
) -> None:
    sf, server = site.laptop.sf, site.cluster.server
    said = lambda: [e["message"] for e in server.listed("instance", "events", "web")]  # noqa: E731
    sf("instance", "stop", "web", "--timeout", "10m", "--wait")
    assert "the guest powered itself off" in said() and server.instance("web")["error_message"] is None
    sf("instance", "start", "web")
    within(150, lambda: server.instance("web")["agent_state"] == "ready", "it is up again")
    server.sf("instance", "stop", "web", "--timeout", "10m")
    within(60, lambda: any("asked the guest to end" in m for m in said()[:3]), "it is asked")
    server.sf("instance", "start", "web")
    within(60, lambda: any("is wanted on by now" in m for m in said()), "it ends, and is started")
    within(60, lambda: server.instance("web")["power_state"] == "on", "it is on")


@contextmanager
def _running(argv: list[str]) -> Iterator[None]:
    """A program of the laptop's meanwhile: nsenter is another process than what it starts, hence the group."""
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, start_new_session=True, **quiet)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


_COMPARE = """(async picture => {
    const pixels = (source, width, height) => {
        const drawn = Object.assign(document.createElement('canvas'), { width, height }).getContext('2d');
        drawn.drawImage(source, 0, 0);
        return new Uint32Array(drawn.getImageData(0, 0, width, height).data.buffer);
    };
    const image = Object.assign(new Image(), { src: 'data:image/png;base64,' + picture });
    await image.decode();
    const shot = pixels(image, image.width, image.height);
    const shown = pixels(document.querySelector('#screen canvas'), image.width, image.height);
    return [shot.filter(pixel => pixel << 8).length, shot.filter((pixel, at) => pixel !== shown[at]).length];
})(%s)"""


def _types(tab: Browser, letters: str) -> None:
    for letter in letters:
        about = {"key": letter, "code": f"Key{letter.upper()}", "windowsVirtualKeyCode": ord(letter.upper())}
        tab("Input.dispatchKeyEvent", type="keyDown", text=letter, **about)
        tab("Input.dispatchKeyEvent", type="keyUp", **about)


_DIAL = """new Promise(done => {
    const socket = new WebSocket(%s, ['sf', 'ticket.' + %s]);
    socket.onmessage = event => done(event.data);
    socket.onerror = () => done('no connection');
    socket.onopen = () => socket.send('{}');
})"""


def test_a_screen_opens_in_a_browser_takes_what_is_typed_and_a_screenshot_shows_it(
    site: Site, tmp_path: Path, client: Client
) -> None:
    """On a node that nobody reaches, through the API's port."""
    server, there, laptop = site.cluster.server, site.cluster.nodes["n2"].host, site.laptop
    (tmp_path / "typewriter.raw").write_bytes(typewriter())
    server.sf("image", "push", str(tmp_path / "typewriter.raw"), "typewriter:1")
    words = ("--image", "typewriter:1", "--memory", "64", "--on", "n2", "--vdi", "vnc")
    laptop.sf("instance", "create", "seen", *words)
    within(60, lambda: server.instance("seen")["power_state"] == "on", "it runs")
    uuid = server.instance("seen")["uuid"]
    (domain,) = (name for name in there.virsh("list", "--name").stdout.split() if name.endswith(uuid))

    def shot() -> list[int]:
        """A screenshot that qemu makes: how many pixels are lit, and how many are others in the browser."""
        there.virsh("screenshot", domain, str(tmp_path / "shot.png"))
        picture = base64.b64encode((tmp_path / "shot.png").read_bytes()).decode()
        return list(tab.js(_COMPARE % json.dumps(picture)))

    def address() -> str:
        return str(json.loads(laptop.sf("instance", "vnc", "seen", "--format", "json"))["address"])

    def said() -> str:
        return laptop.sf("instance", "console", "seen", "--log")

    elsewhere = laptop.argv("python3", "-m", "http.server", "--bind", "127.0.0.1", "8099")
    with laptop.network(), browser(tmp_path) as tab, _running(elsewhere):
        tab("Security.setIgnoreCertificateErrors", ignore=True)
        first = address()
        tab.go(first, lands=f"{URL}/screen")
        tab.sees(
            "document.querySelector('#screen canvas')?.width > 0 && document.getElementById('said').textContent === ''"
        )
        assert tab.js("location.href") == f"{URL}/screen", "the ticket is not in the address any more"
        _types(tab, "a")
        within(30, lambda: said() == "a", "the guest has a key")
        before = shot()[0]
        _types(tab, "typewriter")
        within(30, lambda: said() == "atypewriter", "the guest has all keys, in order")
        within(30, lambda: shot()[0] > before + 100, "a screenshot shows them")
        client("instance", "screenshot", "seen", str(tmp_path / "client.png"))
        assert (tmp_path / "client.png").read_bytes()[:4] == b"\x89PNG", "the client's is one, too"
        within(30, lambda: shot()[1] < 50, "the browser shows the same, but for the cursor that blinks")
        assert not tab.violations
        for wrong, why in (
            (first, "a ticket opens one stream"),
            (f"{first[:-4]}AAAA", "the token does not hold"),
        ):
            tab.go(wrong, lands=f"{URL}/screen")
            tab.sees(f"document.getElementById('said').textContent.startsWith('{why}')")
        tab.go("http://127.0.0.1:8099/")
        dial = (
            json.dumps(f"wss{URL[5:]}/instances/{uuid}/streams/vnc"),
            json.dumps(address().partition("#")[2].partition(".")[2]),
        )
        assert '"Denied"' in tab.js(_DIAL % dial), "a page of somebody else"

    with _running(laptop.argv("sf", "instance", "vnc", "seen", "--listen", "5901")):
        read = "import socket; print(socket.create_connection(('127.0.0.1', 5901)).recv(12))"
        within(
            30, lambda: b"RFB 003.008" in laptop.run("sh", "-c", f'python3 -c "{read}" || true').stdout, "VNC"
        )
    laptop.sf("instance", "delete", "seen", "--force", "--wait")
