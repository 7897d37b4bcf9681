"""`sf`'s words about ports, rules, limits, names and the LAN, typed against a real server (its node is played)."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.api_server import running

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(180)
def test_what_is_typed_about_networks_does_what_it_says(tmp_path: Path) -> None:
    with running(tmp_path / "state") as server:
        env = {**os.environ, "SF_API_URL": server.url, "SF_KEY": server.key, "HOME": str(tmp_path)}

        def sf(line: str, code: int = 0) -> str:
            argv = [ROOT / ".venv/bin/sf", *line.split()]
            done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60)
            assert done.returncode == code, done.stdout + done.stderr
            return done.stdout + done.stderr

        sf("network create lan 10.42.0.0/24")
        assert "node1: ufw drops; allow it" in sf("network create home --bridge br0"), "what a node found"
        assert "no NETBLOCK" in sf("network create x", 2)
        sf("network create six --ipv6 auto")
        assert "SLAAC needs IPv6" in sf("network create y 10.46.0.0/24 --slaac", 2)
        block = sf("network ls --format json").split('"netblock6": "')[1].split('::/64"')[0]
        said = sf("instance create s --image debian:12 --network six")
        assert f"{block}::2" in said and f"{block}::2" in sf("instance ls") and "0.0.0." not in said
        assert f"{block}::/64" in sf("network ls") and f"{block}::2" in sf("network show six")
        assert f"{block}::9" in sf(f"instance add-interface s six,address={block}::9")
        sf(f"network dns six db {block}::7")
        assert f"db {block}::7" in sf("network show six")
        sf(f"network ping six {block}::2", 1)
        sf("rules create web --allow tcp:80,443 --allow tcp:22@192.0.2.0/24")
        sf(
            "instance create w --image debian:12 --network lan,rules=web --publish 8080:80 --publish 53:53/udp"
        )
        said = sf("instance create v --image debian:12 --network lan --publish 8080:80", 5)
        assert "v is created, but port 8080/tcp is published already" in said
        assert "--network" in sf("instance create z --image debian:12 --publish 1:1", 2)
        assert "by DHCP" in sf("instance create tv --image debian:12 --network home") + sf("instance show tv")
        assert "published 8080:80/tcp 53:53/udp" in sf("network show lan")
        assert "published 8080:80/tcp 53:53/udp" in sf("instance show w")
        assert "8080:80" not in sf("instance publish w 8080:80 --undo")
        sf("instance publish w 8080:80 --undo", 3)
        sf("instance limit w --in 10M --packets-out 50")
        sf("network dns lan printer 10.42.0.9")
        assert "printer 10.42.0.9" in sf("network show lan")
        sf("network dns lan printer --undo")
        assert "tcp:80,443 tcp:22@192.0.2.0/24" in sf("rules ls")
        sf("rules delete web", 5)
        sf("rules detach web w")
        sf("rules delete web")
