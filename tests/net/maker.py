"""Somebody who makes networks of every kind on three nodes, with guests on each, and deletes them again.

    python -m tests.net.maker STATE_DIR LOG FIRST LAST [keep]

Runs inside the server's machine, against http://127.0.0.1:13000, four cycles at once. LOG gets a line per cycle that
is done. What was asked is asked again until it is answered: the server may be dead, or an agent. With `keep` nothing is
deleted. Exit code 0: everything went as asked.
"""

import http.client
import secrets
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.api_server import Running

AT_ONCE = 4
NODES = ("n1", "n2", "n3")
_PATIENCE_S = 240
_LATER = (502, 503, 504)


class Maker:
    """One cycle's words. `number` makes every name, block and port of it its own among those at work."""

    def __init__(self, state: Path, number: int, slot: int) -> None:
        key = (state / "auth" / "local-key").read_text().strip()
        self.api = Running("http://127.0.0.1:13000", key, None, None, None)  # type: ignore[arg-type]
        self.number, self.slot = number, slot
        self.made: list[str] = []

    def ask(self, verb: str, path: str, body: Any = None, *, gone: bool = False) -> Any:
        """Its answer, however often it takes; a creation that is asked twice is done once (Idempotency-Key)."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        end, said = time.monotonic() + _PATIENCE_S, ""
        while time.monotonic() < end:
            try:
                answer = self.api.call(verb, path, body, headers=headers)
            except (OSError, urllib.error.URLError, http.client.HTTPException, KeyError, TypeError) as err:
                self.api.tokens.clear()
                said = repr(err)
            else:
                if answer.status == 200 or (gone and answer.status == 404):
                    return answer.body
                said = f"{answer.status} {answer.body}"
                if answer.status not in _LATER:
                    break
            time.sleep(0.2)
        raise AssertionError(f"{verb} {path} {body}: {said}")

    def until(self, path: str, **wanted: str) -> Any:
        end, found = time.monotonic() + _PATIENCE_S, None
        while time.monotonic() < end:
            found = self.ask("GET", path)
            if all(found.get(name) == value for name, value in wanted.items()):
                return found
            if found.get("state") == "error":
                break
            time.sleep(0.2)
        raise AssertionError(f"{path} is not {wanted}: {found}")

    def network(self, kind: str, **more: Any) -> str:
        name = f"{kind}-{self.number}"
        made = self.ask("POST", "/networks", {"name": name, **more})
        self.made.insert(0, f"/networks/{made['uuid']}")
        return str(made["uuid"])

    def networks(self) -> list[str]:
        """Plain, with IPv6 (translated, or led to its router), IPv6 alone, isolated without a way out, on the nodes'
        own bridge."""
        odd = self.number % 2
        six = f"2001:db8:{self.slot + 1}:{self.number}::/64" if odd else "auto"
        first = 16 + 48 * self.slot
        ours = {"netblock": "192.168.77.0/24", "range": f"192.168.77.{first}-192.168.77.{first + 40}"}
        return [
            self.network("lan", netblock=f"10.{10 + self.slot}.{self.number % 250}.0/24"),
            self.network("six", netblock=f"10.{20 + self.slot}.{self.number % 250}.0/24", ipv6=six),
            self.network("only", ipv6="auto", slaac=bool(odd)),
            self.network("shut", netblock="10.42.0.0/24", isolated=True, provide_nat=bool(odd)),
            self.network("home", bridge="br-home", **(ours if odd else {})),
        ]

    def rules(self) -> str:
        allow = ["tcp:80,443", f"icmp@lan-{self.number}", f"udp:53@six-{self.number}"]
        made = self.ask("POST", "/rules", {"name": f"rules-{self.number}", "allow": allow})
        self.made.append(f"/rules/{made['uuid']}")
        return str(made["uuid"])

    def make(self) -> None:
        lan, six, only, shut, home = self.networks()
        rules = self.rules()
        guests = []
        for node in NODES:
            wanted = [
                {"network_uuid": lan, "float": node == "n1"},
                {"network_uuid": six},
                {"network_uuid": only},
                {"network_uuid": shut, "rules": rules},
            ]
            body = {
                "name": f"g{self.number}-{node}", "cpus": 1, "memory": 32, "disk": [{"base": "sector:1"}],
                "placed_on": node, "network": wanted,
            }  # fmt: skip
            guests.append(self.ask("POST", "/instances", body)["uuid"])
            self.made.insert(0, f"/instances/{guests[-1]}")
        links = []
        for uuid in guests:
            there = self.until(f"/instances/{uuid}", state="created", power_state="on")
            links.append({link["network_uuid"]: link for link in there["interfaces"]})
        one, two, three = links
        for uuid in guests:  # into a running one
            self.ask("POST", f"/instances/{uuid}/interfaces", {"network": {"network_uuid": home}})
        port = 20_000 + 100 * self.slot
        for link, ports in (
            (one[lan], f"{port}:80"),
            (two[six], f"{port + 10}-{port + 14}:9000-9004/udp"),
            (two[only], f"{port + 2}:80"),
            (three[shut], f"{port + 1}:22"),
        ):
            if link is not three[shut] or self.number % 2:  # that one has a way out
                self.ask("POST", f"/interfaces/{link['uuid']}/publish", {"ports": ports})
        self.ask("PUT", f"/interfaces/{two[lan]['uuid']}/limits", {"bytes_in": 10**6, "packets_out": 1000})
        self.ask("POST", f"/interfaces/{three[lan]['uuid']}/rules", {"rules": rules})
        self.ask("POST", f"/interfaces/{two[lan]['uuid']}/float")
        self.ask("POST", f"/interfaces/{one[lan]['uuid']}/defloat")
        self.ask("PUT", f"/rules/{rules}", {"allow": ["tcp:22", "any@192.0.2.0/24"]})
        self.ask("POST", f"/networks/{lan}/dns", {"name": "db", "value": two[lan]["ipv4"]})
        self.ask("POST", f"/networks/{lan}/dns", {"name": "old", "value": "192.0.2.9"})
        self.ask("DELETE", f"/networks/{lan}/dns", {"name": "old"})
        self.ask("POST", f"/networks/{lan}/route", {"next_hop": three[lan]["ipv4"]})

    def delete(self) -> None:
        instances = [path for path in self.made if path.startswith("/instances")]
        for path in instances:
            self.ask("DELETE", path, gone=True)
        for path in instances:
            self.until(path, state="deleted")
        for path in self.made:
            if path not in instances:
                self.ask("DELETE", path, gone=True)


def main() -> int:
    state, log, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    keep = sys.argv[5:] == ["keep"]

    def work(slot: int) -> None:
        for number in range(first + slot, last, AT_ONCE):
            maker = Maker(state, number, slot)
            maker.make()
            if not keep:
                maker.delete()
            with log.open("a") as done:
                done.write(f"{number}\n")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(AT_ONCE)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
