"""Every list that comes with sf, replayed: directories and checksum files as their publishers name and write them.

The names are real ones, as they stood in 2024 to 2026; what is not needed to find a disk is left out, and the disks are
small ones. A list that a publisher moves away from is not noticed here: `sf mirror sync --dry-run` says so.
"""

import hashlib
import lzma
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imagestore.backends.directory import Directory
from imagestore.errors import NotFound
from imagestore.mirror import sources
from imagestore.mirror.sources import SHIPPED, Source
from imagestore.mirror.sync import read_provenance, sync
from imagestore.store.store import Store
from tests import web

ALMA = "repo.almalinux.org/almalinux"
SUSE = "download.opensuse.org"
ARCH = "geo.mirror.pkgbuild.com/images"
FLATCAR = "stable.release.flatcar-linux.net"
BSD = "download.freebsd.org/releases/VM-IMAGES"

PAGES = {
    f"{ALMA}/10/cloud/x86_64/images/": """
<a href="AlmaLinux-10-GenericCloud-10.2-20260526.0.x86_64.qcow2">AlmaLinux-10-GenericCloud-10.2-20..&gt;</a>
<a href="AlmaLinux-10-GenericCloud-10.2-20260817.0.x86_64.qcow2">AlmaLinux-10-GenericCloud-10.2-20..&gt;</a>
<a href="AlmaLinux-10-GenericCloud-ext4-10.2-20260901.0.x86_64.qcow2">AlmaLinux-10-GenericCloud-ext4-10.2-2026..&gt;</a>
<a href="AlmaLinux-10-GenericCloud-latest.x86_64.qcow2">AlmaLinux-10-GenericCloud-latest.x86_64.qcow2</a>
<a href="AlmaLinux-10-OpenNebula-10.2-20260901.0.x86_64.qcow2">AlmaLinux-10-OpenNebula-10.2-20260901.0.x86_64..&gt;</a>
<a href="CHECKSUM">CHECKSUM</a> <a href="CHECKSUM.asc">CHECKSUM.asc</a>""",
    f"{ALMA}/10/cloud/aarch64/images/": """
<a href="AlmaLinux-10-GenericCloud-10.2-20260817.0.aarch64.qcow2">x</a>
<a href="AlmaLinux-10-GenericCloud-latest.aarch64.qcow2">x</a> <a href="CHECKSUM">CHECKSUM</a>""",
    f"{ALMA}/9/cloud/x86_64/images/": """
<a href="AlmaLinux-9-GenericCloud-9.6-20250522.x86_64.qcow2">x</a>
<a href="AlmaLinux-9-GenericCloud-9.7-20251118.x86_64.qcow2">x</a>
<a href="AlmaLinux-9-GenericCloud-latest.x86_64.qcow2">x</a> <a href="CHECKSUM">CHECKSUM</a>""",
    f"{ALMA}/9/cloud/aarch64/images/": '<a href="AlmaLinux-9-GenericCloud-9.7-20251118.aarch64.qcow2">x</a>',
    f"{SUSE}/distribution/leap/16.0/appliances/": """
[{"name":"Leap-16.0-Minimal-VM.aarch64-Cloud-Build18.72.qcow2","size":327155712,"mtime":1790000000},
 {"name":"Leap-16.0-Minimal-VM.x86_64-Cloud-Build18.7.qcow2","size":341735936},
 {"name":"Leap-16.0-Minimal-VM.x86_64-Cloud-Build18.72.qcow2","size":341735936},
 {"name":"Leap-16.0-Minimal-VM.x86_64-Cloud-Build18.72.qcow2.sha256","size":118},
 {"name":"Leap-16.0-Minimal-VM.x86_64-Cloud.qcow2","size":341735936},
 {"name":"Leap-16.0-Minimal-VM.x86_64-kvm-and-xen-Build18.99.qcow2","size":341735936}]""",
    f"{SUSE}/tumbleweed/appliances/": """
<a href="./openSUSE-Tumbleweed-Minimal-VM.x86_64-1.0.0-Cloud-Snapshot20260801.qcow2">x</a>
<a href="./openSUSE-Tumbleweed-Minimal-VM.x86_64-1.0.0-Cloud-Snapshot20260911.qcow2">x</a>
<a href="./openSUSE-Tumbleweed-Minimal-VM.x86_64-1.0.0-kvm-and-xen-Snapshot20260912.qcow2">x</a>
<a href="./openSUSE-Tumbleweed-Minimal-VM.x86_64-Cloud.qcow2">x</a>""",
    f"{ARCH}/": """
<a href="v20260901.583572/">v20260901.583572/</a> <a href="v20261001.604814/">v20261001.604814/</a>
<a href="latest/">latest/</a>""",
    f"{FLATCAR}/amd64-usr/current/version.txt": """FLATCAR_BUILD=4593
FLATCAR_BRANCH=2
FLATCAR_PATCH=4
FLATCAR_VERSION=4593.2.4
FLATCAR_VERSION_ID=4593.2.4
FLATCAR_BUILD_ID="2026-09-14-1626"
FLATCAR_SDK_VERSION=4593.0.0
""",
    f"{FLATCAR}/arm64-usr/current/version.txt": "FLATCAR_VERSION=4593.2.4\nFLATCAR_VERSION_ID=4593.2.4\n",
    f"{BSD}/": """
<a href="13.5-RELEASE/" title="13.5-RELEASE">13.5-RELEASE/</a> <a href="14.3-RELEASE/">14.3-RELEASE/</a>
<a href="14.4-RELEASE/">14.4-RELEASE/</a> <a href="15.0-RELEASE/">15.0-RELEASE/</a>
<a href="15.1-RELEASE/">15.1-RELEASE/</a> <a href="README.txt">README.txt</a>""",
}
"""What stands at an address that is looked at for the newest build."""

GNU = "{sha256}  {file}\n"
OTHERS = f"{'0' * 64}  AlmaLinux-OpenNebula.qcow2\n"
GENTOO = "# MD5 HASH\n{md5}  {file}\n# SHA1 HASH\n{sha1}  {file}\n# SHA512 HASH\n{sha512}  {file}\n"
TAGGED = f"SHA512 (FreeBSD-disc1.iso) = {'0' * 128}\nSHA512 ({{file}}) = {{sha512}}\n"
DISKS = {
    f"{ALMA}/10/cloud/x86_64/images/AlmaLinux-10-GenericCloud-10.2-20260817.0.x86_64.qcow2": (
        "CHECKSUM",
        OTHERS + GNU,
    ),
    f"{ALMA}/10/cloud/aarch64/images/AlmaLinux-10-GenericCloud-10.2-20260817.0.aarch64.qcow2": (
        "CHECKSUM",
        GNU,
    ),
    f"{ALMA}/9/cloud/x86_64/images/AlmaLinux-9-GenericCloud-9.7-20251118.x86_64.qcow2": (
        "CHECKSUM",
        GNU + OTHERS,
    ),
    f"{ALMA}/9/cloud/aarch64/images/AlmaLinux-9-GenericCloud-9.7-20251118.aarch64.qcow2": ("CHECKSUM", GNU),
    f"{SUSE}/distribution/leap/16.0/appliances/Leap-16.0-Minimal-VM.x86_64-Cloud-Build18.72.qcow2": (
        "{file}.sha256",
        GNU.replace("-Build18.72", ""),
    ),
    f"{SUSE}/distribution/leap/16.0/appliances/Leap-16.0-Minimal-VM.aarch64-Cloud-Build18.72.qcow2": (
        "{file}.sha256",
        "{sha256} {file}\n",
    ),
    f"{SUSE}/tumbleweed/appliances/openSUSE-Tumbleweed-Minimal-VM.x86_64-1.0.0-Cloud-Snapshot20260911.qcow2": (
        "{file}.sha256",
        GNU,
    ),
    f"{ARCH}/v20261001.604814/Arch-Linux-x86_64-cloudimg-20261001.604814.qcow2": ("{file}.SHA256", GNU),
    f"{FLATCAR}/amd64-usr/4593.2.4/flatcar_production_openstack_image.img": ("{file}.DIGESTS", GENTOO),
    f"{FLATCAR}/arm64-usr/4593.2.4/flatcar_production_openstack_image.img": ("{file}.DIGESTS", GENTOO),
    **{
        f"{BSD}/{release}-RELEASE/{place}/Latest/FreeBSD-{release}-RELEASE-{arch}-BASIC-CLOUDINIT-ufs.qcow2.xz": (
            "CHECKSUM.SHA512",
            TAGGED,
        )
        for release in ("14.4", "15.1")
        for place, arch in (("amd64", "amd64"), ("aarch64", "arm64-aarch64"))
    },
}
"""The disk that is to be found, and where its sums stand and how."""

REPLAYED = ("almalinux", "arch", "flatcar", "freebsd", "opensuse")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that has all their directories, each below its host's name."""
    root = tmp_path_factory.mktemp("world")
    for address, text in PAGES.items():
        path = root / (f"{address}index.html" if address.endswith("/") else address)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for number, (address, (beside, text)) in enumerate(DISKS.items()):
        path = root / address
        path.parent.mkdir(parents=True, exist_ok=True)
        raw, made = root / "raw", root / "made"
        raw.write_bytes(bytes(510) + b"\x55\xaa" + number.to_bytes(2, "big") * (1 << 15))
        subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, made], check=True)
        data = made.read_bytes()
        path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
        sums = {n: hashlib.new(n, path.read_bytes()).hexdigest() for n in ("md5", "sha1", "sha256", "sha512")}
        (path.parent / beside.format(file=path.name)).write_text(text.format(file=path.name, **sums))
    with web.nginx(root, tmp_path_factory.mktemp("nginx")) as url:
        yield url


def there(source: Source, url: str) -> Source:
    """The same source in that world."""
    here = {name: getattr(source, name).replace("https:/", url, 1) for name in ("url", "checksums")}
    build = {key: text.replace("https:/", url, 1) for key, text in source.build.items()}
    return replace(source, **here, build=build)  # type: ignore[arg-type]


def test_each_list_finds_the_newest_disk_and_its_checksum(
    world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "cache"))
    store = Store.init(Directory(tmp_path / "store"))
    listed = [there(source, world) for source in sources.load(SHIPPED) if source.name in REPLAYED]
    outcomes = sync(store, listed, tmp_path / "work")
    assert [(o.name, o.message) for o in outcomes if o.result != "new"] == []
    found = [read_provenance(store, o.digest) for o in outcomes if o.digest]
    assert sorted(f.url.removeprefix(f"{world}/") for f in found) == sorted(DISKS)
    assert {f.algorithm for f in found} == {"sha256", "sha512"}
    assert {o.result for o in sync(store, listed, tmp_path / "work")} == {"unchanged"}
    names = {f"{r.name}:{r.tag}": sorted(r.images) for r in store.names.list()}
    assert names["freebsd:latest"] == names["freebsd:15"] == ["aarch64", "x86_64"]
    assert store.names.read("opensuse", "latest").images == store.names.read("opensuse", "16.0").images


def test_a_checksum_file_of_one_image_may_call_it_by_its_builds_name() -> None:
    digest, file, dated = "a" * 64, "Minimal-VM-Cloud.qcow2", "Minimal-VM-1.0.0-Cloud-Snapshot20260911.qcow2"
    assert sources.find_checksum(f"{digest}  {dated}\n", file, f"{file}.sha256") == ("sha256", digest)
    two = f"{digest}  {dated}\n{'b' * 64}  other.qcow2\n"
    for text, name in (
        (f"{digest}  {dated}\n", "SHA256SUMS"),
        (two, f"{file}.sha256"),
        ("", f"{file}.sha256"),
    ):
        with pytest.raises(NotFound):
            sources.find_checksum(text, file, name)
