"""A mirror from nothing, through the real `sf` and through tools that know nothing of it."""

import contextlib
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import web
from tests.impatient import IMPATIENT
from tests.machines import BIN, Machine, machine, run
from tests.servers import free_ports


@dataclass
class Origin:
    """A mirror of one upstream that holds the tiny guest's image."""

    machine: Machine
    fingerprint: str
    raw: Path
    sources: Path


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Origin]:
    path = tmp_path_factory.mktemp("origin")
    upstream = path / "upstream"
    upstream.mkdir()
    shutil.copy(tiny_image, upstream / "tiny.qcow2")
    digest = hashlib.sha256(tiny_image.read_bytes()).hexdigest()
    (upstream / "SHA256SUMS").write_text(f"{digest}  tiny.qcow2\n")
    raw = path / "tiny.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", tiny_image, raw], check=True)
    with web.nginx(upstream, path / "nginx") as url:
        sources = path / "sources.toml"
        sources.write_text(
            '[[source]]\nname = "tiny"\ntags = ["1", "latest"]\nos = "busybox"\n'
            f'url = "{url}/tiny.qcow2"\nchecksums = "{url}/SHA256SUMS"\n'
        )
        keeper = machine(path / "keeper")
        fingerprint = keeper.sf("mirror", "init").stdout.strip()
        keeper.sf("mirror", "sync", "--sources", sources)
        yield Origin(keeper, fingerprint, raw, sources)


@pytest.fixture(scope="module")
def url(origin: Origin) -> Iterator[str]:
    with origin.machine.serving() as url:
        yield url


def test_from_nothing_to_a_pull_by_another_machine(origin: Origin, url: str, tmp_path: Path) -> None:
    client = machine(tmp_path / "client")
    assert "may be anybody's" in client.sf("remote", "add", "here", url, code=2).stderr
    client.sf("remote", "add", "here", url, "--fingerprint", origin.fingerprint)
    out = tmp_path / "out.raw"
    client.sf("image", "pull", "here/tiny:1", "-o", out)
    run("cmp", out, origin.raw)
    stranger = machine(tmp_path / "stranger")
    other = origin.fingerprint[:-4] + ("0000" if not origin.fingerprint.endswith("0000") else "1111")
    assert "not signed by" in stranger.sf("remote", "add", "here", url, "--fingerprint", other, code=4).stderr


def test_curl_and_aria2_resume_and_the_checksums_hold(origin: Origin, url: str, tmp_path: Path) -> None:
    base = f"{url}images/tiny/1/amd64"
    whole = urllib.request.urlopen(base + "/disk.qcow2", timeout=60).read()
    (tmp_path / "disk.qcow2").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "disk.raw").write_bytes(origin.raw.read_bytes()[:1_000_000])
    run("curl", "-sSf", "-C", "-", "-O", f"{base}/disk.raw", cwd=tmp_path)
    run("aria2c", "-q", "-c", "-x", "4", "--split=4", "-k", "1M", f"{base}/disk.qcow2", cwd=tmp_path)
    run("curl", "-sSf", "-O", f"{base}/SHA256SUMS", cwd=tmp_path)
    assert run("sha256sum", "-c", "SHA256SUMS", cwd=tmp_path).count("OK") == 2
    run("cmp", tmp_path / "disk.raw", origin.raw)


def test_qemu_and_nbdkit_read_the_disk_where_it_lies(origin: Origin, url: str) -> None:
    base = f"{url}images/tiny/1/amd64"
    for file, format_ in (("disk.raw", "raw"), ("disk.qcow2", "qcow2")):
        run("qemu-img", "compare", "-f", format_, "-F", "raw", f"{base}/{file}", origin.raw)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f'qemu-img compare -f raw -F raw "nbd://127.0.0.1:{port}" {origin.raw}'
    run("nbdkit", "-i", "127.0.0.1", "-p", str(port), "curl", f"url={base}/disk.raw", "--run", command)


def test_the_page_about_disks_over_http_is_true(origin: Origin, url: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/howto/disks-over-http.md").read_text()
    page = page.replace("https://images.lan/images/debian/12/", f"{url}images/tiny/1/")
    for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S):
        for line in block.splitlines():
            run("bash", "-eo", "pipefail", "-c", line, cwd=tmp_path)
    for made in ("web.qcow2", "overlay.qcow2"):
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / made, origin.raw)


@pytest.mark.parametrize("file", ["disk.raw", "disk.qcow2"])
def test_kubevirts_importer_gets_what_it_asks(origin: Origin, url: str, file: str, tmp_path: Path) -> None:
    """HEAD, the beginning of the whole file, then either all of it or nbdkit's ranges, as CDI's http-datasource.go and
    nbdkit.go say it."""
    page = (Path(__file__).parents[2] / "docs/howto/disks-over-http.md").read_text()
    (path,) = re.findall(r"^ +url: https://images.lan/images/debian/12/(\S+)$", page, re.M)
    address = f"{url}images/tiny/1/{path}".replace("disk.qcow2", file)
    agent = {"User-Agent": "cdi-golang-importer"}
    with urllib.request.urlopen(
        urllib.request.Request(address, headers=agent, method="HEAD"), timeout=30
    ) as head:
        assert head.status == 200 and head.read() == b""
        length = int(head.headers["Content-Length"])
    with urllib.request.urlopen(urllib.request.Request(address, headers=agent), timeout=60) as whole:
        assert whole.status == 200 and whole.headers["Accept-Ranges"] == "bytes"
        assert not whole.headers["Content-Type"].startswith("text/")
        assert int(whole.headers["Content-Length"]) == length
        begun = whole.read(512)  # by which it tells the format
        assert begun.startswith(b"QFI\xfb") == (file == "disk.qcow2")
        assert len(begun + whole.read()) == length
    kind, out = file.removeprefix("disk."), tmp_path / "disk.img"
    convert = f'qemu-img convert -t writeback -p -f {kind} -O raw "$uri" {out}'
    flags = [
        "--readonly",
        "--exit-with-parent",
        "-U",
        "-",
        "--filter=readahead",
        "--filter=retry",
        "-r",
        "curl",
    ]
    asked = [
        "header=User-Agent: cdi-nbdkit-importer",
        "retry-exponential=no",
        f"url={address}",
        "--run",
        convert,
    ]
    run("nbdkit", *flags, *asked)
    run("cmp", out, origin.raw)


@pytest.mark.parametrize("file", ["disk.raw", "disk.qcow2"])
def test_a_guest_boots_straight_from_the_mirror(url: str, file: str, tmp_path: Path) -> None:
    log = tmp_path / "serial.log"
    drive = {
        "driver": "raw" if file.endswith("raw") else "qcow2",
        "node-name": "disk",
        "read-only": True,
        "file": {"driver": "http", "url": f"{url}images/tiny/1/amd64/{file}"},
    }
    overlay = tmp_path / "overlay.qcow2"
    backing = "json:" + json.dumps({k: v for k, v in drive.items() if k not in ("node-name", "read-only")})
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", str(drive["driver"]), overlay)
    process = subprocess.Popen(
        [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-display", "none", "-nic", "none", "-no-reboot",
            "-serial", f"file:{log}", "-drive", f"file={overlay},format=qcow2,if=virtio",
        ]
    )  # fmt: skip
    try:
        for _ in range(1200):
            text = log.read_text(errors="replace") if log.exists() else ""
            if "SF-GUEST-READY" in text:
                break
            assert process.poll() is None
            time.sleep(0.1)
        assert "SF-GUEST-READY" in text, text[-2000:]
    finally:
        process.kill()
        process.wait()


def test_simplestreams_clients_find_and_fetch_it(url: str, tmp_path: Path) -> None:
    found = json.loads(run(BIN / "sstream-query", "--no-verify", "--json", f"{url}streams/v1/index.json"))
    assert {item["item_name"] for item in found} == {"disk.qcow2", "incus.tar.xz", "lxd.tar.xz"}
    index = f"{url}streams/v1/index.json"
    run(BIN / "sstream-mirror", "--no-verify", index, tmp_path / "copy", "release=1", "ftype=disk-kvm.img")
    copy = next((tmp_path / "copy").rglob("disk.qcow2"))
    sums = urllib.request.urlopen(f"{url}images/tiny/1/amd64/SHA256SUMS", timeout=30).read().decode()
    assert hashlib.sha256(copy.read_bytes()).hexdigest() in sums


@pytest.mark.skipif(shutil.which("lxc") is None, reason="needs the package lxd-client")
def test_lxd_lists_and_exports_it_over_https(origin: Origin, url: str, tmp_path: Path) -> None:
    run(
        "openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem",
        cwd=tmp_path,
    )  # fmt: skip
    port = free_ports(1, 23500)
    extra = (
        f"}} server {{ listen 127.0.0.1:{port} ssl; ssl_protocols TLSv1.2 TLSv1.3; "
        f"ssl_certificate {tmp_path}/cert.pem; ssl_certificate_key {tmp_path}/key.pem; "
        f"location / {{ proxy_pass {url}; proxy_set_header Host $http_host; }}"
    )
    (tmp_path / "root").mkdir()
    (tmp_path / "lxd").mkdir()
    with web.nginx(tmp_path / "root", tmp_path / "nginx", extra):
        environment = os.environ | {
            "HOME": str(tmp_path), "SSL_CERT_FILE": str(tmp_path / "cert.pem"), "LXD_CONF": str(tmp_path / "lxd")
        }  # fmt: skip

        def lxc(*words: str) -> str:
            done = subprocess.run(
                ["lxc", *words], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        lxc("remote", "add", "here", f"https://localhost:{port}", "--protocol", "simplestreams")
        listed = json.loads(lxc("image", "list", "here:", "--format", "json"))
        assert {alias["name"] for image in listed for alias in image["aliases"]} >= {"tiny/1"}
        assert {image["type"] for image in listed} == {"virtual-machine"}
        lxc("image", "export", "here:tiny/1", "--vm", str(tmp_path / "exported"))
    disk = next(path for path in tmp_path.glob("exported*") if path.suffix in (".root", ".img", ".qcow2"))
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, origin.raw)


def test_the_pages_work_in_a_browser_and_say_all_without_scripts(url: str, tmp_path: Path) -> None:
    """I15."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs the package chromium")

    def look(address: str) -> str:
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --dump-dom"
        ).split()
        return run(chromium, *flags, f"--user-data-dir={tmp_path}/profile", address)

    page = look(url)
    assert "tiny:latest" in page and page.count("<script") == 1 and ">Copy</button>" in page
    assert "tiny:1" not in look(url + "?q=latest")
    nothing = look(url + "?q=%3Cscript%3Enothing")
    assert "Nothing matches" in nothing and nothing.count("<script") == 1
    image = url + "images/tiny/1/amd64/"
    plain = run("curl", "-sf", image)
    assert re.search("b3:[0-9a-f]{64}", plain) and "virt-install" in plain and "--ssh-key" in plain
    assert look(image).count(">Copy</button>") == plain.count("<pre>") == 3
    for address in (url, image):
        # A phone: nothing is wider than the page. In a frame, for a window of chromium's is never so small.
        wrapper = tmp_path / "phone.html"
        inner = html.escape(run("curl", "-sf", address))
        wrapper.write_text(
            f'<iframe srcdoc="{inner}" width=360 height=700 onload="document.title = '
            '`width ${this.contentDocument.documentElement.scrollWidth}`"></iframe>'
        )
        assert 300 < int(look(f"file://{wrapper}").partition("<title>width ")[2].partition("<")[0]) <= 360


def test_a_mirror_of_the_mirror_serves_the_owners_signature(origin: Origin, url: str, tmp_path: Path) -> None:
    second, client = machine(tmp_path / "second"), machine(tmp_path / "client")
    second.sf("mirror", "sync", "--from", f"{url}#{origin.fingerprint}", "tiny:1")
    with second.serving() as theirs:
        client.sf("remote", "add", "copy", theirs, "--fingerprint", origin.fingerprint)
        client.sf("image", "pull", "copy/tiny:1", "-o", tmp_path / "out.raw")
    run("cmp", tmp_path / "out.raw", origin.raw)


def test_images_travel_on_a_disk_between_sites_without_a_network(origin: Origin, tmp_path: Path) -> None:
    disk, site = tmp_path / "disk", machine(tmp_path / "site")
    assert "new" in origin.machine.sf("mirror", "export", disk).stdout
    assert "new " not in origin.machine.sf("mirror", "export", disk).stdout
    site.sf("mirror", "import", disk)
    with site.serving() as theirs:
        client = machine(tmp_path / "client")
        client.sf("remote", "add", "site", theirs, "--fingerprint", origin.fingerprint)
        client.sf("image", "pull", "site/tiny:1", "-o", tmp_path / "out.raw")
    run("cmp", tmp_path / "out.raw", origin.raw)


def test_the_origin_goes_away_and_a_year_passes(origin: Origin, tmp_path: Path) -> None:
    keeper = machine(tmp_path / "keeper")
    shutil.copytree(origin.machine.path / "state", keeper.path / "state")
    second, client = machine(tmp_path / "second"), machine(tmp_path / "client")
    second.program = IMPATIENT
    with keeper.serving() as url:
        upstream = f"{url}#{origin.fingerprint}"
        second.sf("mirror", "sync", "--from", upstream)
        client.sf("remote", "add", "gone", url, "--fingerprint", origin.fingerprint)
        client.sf("image", "show", "gone/tiny:1")
    second.faketime = client.faketime = "+400d"
    assert second.sf("mirror", "sync", "--from", upstream, code=8).stderr
    state = json.loads(second.sf("mirror", "status", "--format", "json").stdout)
    assert state["upstreams"][upstream]["gone_since_s"] > state["upstreams"][upstream]["seen_s"]
    with second.serving() as theirs:
        client.sf("remote", "add", "second", theirs, "--fingerprint", origin.fingerprint)
        warned = client.sf("image", "pull", "second/tiny:1", "-o", tmp_path / "old.raw").stderr
        assert "frozen" in warned and "verified before" in warned
        newcomer = machine(tmp_path / "newcomer")
        newcomer.faketime = "+400d"
        newcomer.sf("remote", "add", "second", theirs, "--fingerprint", origin.fingerprint)
        assert (
            "frozen"
            in newcomer.sf("image", "pull", "second/tiny:1", "-o", tmp_path / "no.raw", code=4).stderr
        )
        mine = second.sf("mirror", "init").stdout.strip()
        assert "tiny:1" in second.sf("mirror", "adopt", origin.fingerprint).stdout
        newcomer.sf("remote", "add", "adopted", theirs, "--fingerprint", mine)
        newcomer.sf("image", "pull", "adopted/tiny:1", "-o", tmp_path / "new.raw")
        page = urllib.request.urlopen(f"{theirs}images/tiny/1/amd64/", timeout=30).read().decode()
        assert mine in page and origin.fingerprint not in page
    run("cmp", tmp_path / "old.raw", origin.raw)
    run("cmp", tmp_path / "new.raw", origin.raw)


def test_a_pull_through_mirror_serves_on_when_its_upstream_is_gone(origin: Origin, tmp_path: Path) -> None:
    near, client = machine(tmp_path / "near"), machine(tmp_path / "client")
    near.program = IMPATIENT
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(contextlib.ExitStack())
        url = upstream.enter_context(origin.machine.serving())
        theirs = stack.enter_context(near.serving("--upstream", url))
        client.sf("remote", "add", "near", theirs, "--fingerprint", origin.fingerprint)
        client.sf("image", "pull", "near/tiny:1", "-o", tmp_path / "first.raw")
        upstream.close()
        client.sf("image", "pull", "near/tiny:1", "-o", tmp_path / "second.raw")
    run("cmp", tmp_path / "second.raw", origin.raw)


def test_a_private_store_is_never_served_or_signed(tmp_path: Path) -> None:
    keeper = machine(tmp_path / "keeper")
    keeper.sf("store", "init", "--private")
    assert "is private" in keeper.sf("mirror", "serve", code=4).stderr
    assert "is private" in keeper.sf("mirror", "init", code=4).stderr


def test_the_tree_works_with_nginx_and_caddy_and_no_sf_at_all(origin: Origin, tmp_path: Path) -> None:
    root = origin.machine.path / "state" / "store"
    client = machine(tmp_path / "client")
    with web.nginx(root, tmp_path / "nginx") as url:
        client.sf("remote", "add", "static", url, "--fingerprint", origin.fingerprint)
        client.sf("image", "pull", "static/tiny:1", "-o", tmp_path / "out.raw")
    run("cmp", tmp_path / "out.raw", origin.raw)


def test_no_path_leads_out_of_the_tree(origin: Origin, url: str) -> None:
    keys = origin.machine.path / "state" / "mirror" / "keys"
    assert keys.exists()
    for path in (
        "../mirror/keys/root.pem", "%2e%2e/mirror/keys/root.pem", "packs/../store.json", "leases/x", ".lock",
        "names/tiny/../../store.json", "packs//etc/passwd", "/etc/passwd",
    ):  # fmt: skip
        done = subprocess.run(
            ["curl", "-s", "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", url + path],
            capture_output=True,
            text=True,
        )
        assert done.stdout == "404", path


def test_every_command_of_the_how_to_works(origin: Origin, tmp_path: Path) -> None:
    """docs/howto/mirror.md, block by block; a word after `sh` names the machine it is typed on."""
    text = (Path(__file__).parents[2] / "docs/howto/mirror.md").read_text()
    blocks = re.findall(r"```sh ?(\w*)\n(.*?)```", text, re.DOTALL)
    machines = {name: machine(tmp_path / (name or "mirror")) for name in {name for name, _ in blocks}}
    lists = tmp_path / "lists.toml"
    lists.write_text(
        origin.sources.read_text().replace('"tiny"', '"debian"').replace('["1", "latest"]', '["12"]')
    )
    words = {"DISK": str(tmp_path / "disk")}
    done = []
    with contextlib.ExitStack() as stack:
        for name, block in blocks:
            for line in block.splitlines():
                for placeholder, value in words.items():
                    line = line.replace(placeholder, value)
                command = shlex.split(line)[1:]
                if command[:2] == ["mirror", "serve"]:
                    url = stack.enter_context(machines[name].serving(*command[2:]))
                    words.setdefault("URL", url)
                    continue
                if command[:2] == ["mirror", "sync"] and "--from" not in command:
                    command += ["--sources", str(lists)]
                if "-o" in command:
                    command[-1] = str(tmp_path / command[-1])
                out = machines[name].sf(*command).stdout
                if command == ["mirror", "init"]:
                    words["FINGERPRINT"] = out.strip()
                done.append(command[1])
    assert {"init", "sync", "publish", "refresh", "rotate", "export", "import", "pull", "add"} <= set(done)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", tmp_path / "debian-12.qcow2", origin.raw)
