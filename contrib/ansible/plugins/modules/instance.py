"""Ansible module: a guest is there as described, on or off, or is not."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sf.cloud.plugins.module_utils.api import (
    OPTIONS,
    Api,
    Failed,
    finish,
    settle_metadata,
    without_secrets,
)

DOCUMENTATION = r"""
module: instance
short_description: A guest of sf
description:
  - Makes, changes, starts, stops or deletes a guest. What is not given stays as it is.
  - Processors, memory, disk sizes, start order, metadata, floating addresses and published ports are changed.
    Interfaces are added, and none is taken away. Image, ssh key, user data and firmware belong to its making. Where
    they differ the module fails and says how, or makes the guest anew with O(recreate).
author: the authors of sf
extends_documentation_fragment: sf.cloud.access
attributes:
  check_mode:
    support: full
    description: Says what would change and changes nothing.
options:
  name:
    description: Its name, a host name.
    type: str
    required: true
  state:
    description:
      - V(present) is there, on or off; a new guest is on. V(started) is on, V(stopped) is off, V(absent) is deleted.
    type: str
    choices: [present, started, stopped, absent]
    default: present
  image:
    description: What is on its first disk - a name as V(debian:12), a URL, or the C(base) of M(sf.cloud.image).
    type: str
  cpus:
    description: Processors. 1, if it is not given when the guest is made. Counts from the next start on.
    type: int
  memory:
    description: MiB. 1024, if it is not given when the guest is made. Counts from the next start on.
    type: int
  disks:
    description: Sizes in GiB. The first is that of the image's disk, further ones are blank disks. A disk only grows.
    type: list
    elements: int
  networks:
    description: What it is on, in this order.
    type: list
    elements: dict
    suboptions:
      network:
        description: The network's name or UUID.
        type: str
        required: true
      address:
        description: Its address there. Chosen, if it is not given.
        type: str
      macaddress:
        description: Its MAC address. Chosen, if it is not given. Counts when the interface is made.
        type: str
      model:
        description: The network card's. Counts when the interface is made.
        type: str
      rules:
        description: Rules that are attached when the interface is made.
        type: str
      float:
        description: Whether it has a floating address.
        type: bool
      publish:
        description: Ports of the network's router that lead to it, as V(8080:80) or V(53:53/udp).
        type: list
        elements: str
  ssh_key:
    description: Public keys, one a line.
    type: str
  user_data:
    description: For cloud-init.
    type: str
  metadata:
    description: Keys and values that it has (labels). Keys that are not named stay as they are.
    type: dict
  uefi:
    description: UEFI instead of SeaBIOS.
    type: bool
  placed_on:
    description: The node to run on. Counts when the guest is made.
    type: str
  ephemeral:
    description: Whether it is deleted once it is off. Counts when the guest is made.
    type: bool
  ttl:
    description: Seconds after which it is deleted. Counts when the guest is made.
    type: int
  sync:
    description: Whether the server fetches an image that only a source list names. The administrator's alone.
    type: bool
  autostart:
    description: Whether it starts with its node.
    type: str
    choices: ["yes", "no", last]
  order:
    description: When it starts with its node, 0 to 9.
    type: int
  delay_s:
    description: Seconds that its node waits after its start.
    type: int
  recreate:
    description: Whether a guest that was made with something else is deleted, with its disks, and made anew.
    type: bool
    default: false
  stop_timeout:
    description: Seconds that a guest has to go off by itself before its power is taken.
    type: int
    default: 60
  wait:
    description: Whether to wait until it is as asked.
    type: bool
    default: true
  timeout:
    description: Seconds until then.
    type: int
    default: 600
"""

EXAMPLES = r"""
- sf.cloud.instance:
    name: web
    image: debian:12
    memory: 512
    networks:
      - network: lan
        address: 10.42.0.9
        publish: ["8080:80"]
    ssh_key: "{{ lookup('file', '~/.ssh/id_ed25519.pub') }}"
    metadata: {role: web}
    state: started
"""

RETURN = r"""
instance:
  description: The guest as the API shows it, without its user data and its screen's password; null where it is absent.
  type: dict
  returned: always
changes:
  description: What was, or in check mode would be, done.
  type: list
  elements: str
  returned: always
"""

MADE_WITH = ("placed_on", "ephemeral", "ttl", "sync")
SETTABLE = ("cpus", "memory", "autostart", "order", "delay_s")
OF_AN_INTERFACE = ("address", "macaddress", "model", "rules", "float")


class Step(NamedTuple):
    """One call that brings the guest closer to what is wanted."""

    what: str
    method: str
    path: tuple[str, ...]
    body: dict[str, Any]


def encoded(text: str | None) -> str | None:
    return base64.b64encode(text.encode()).decode() if text else None


def creation(wanted: dict[str, Any], uuids: dict[str, str]) -> dict[str, Any]:
    """The body of the call that makes it."""
    disks: list[dict[str, Any]] = [{"size": size} for size in wanted["disks"] or []] or [{}]
    disks[0]["base"] = wanted["image"]
    body: dict[str, Any] = {
        "name": wanted["name"],
        "cpus": wanted["cpus"] or 1,
        "memory": wanted["memory"] or 1024,
    }
    body.update(disk=disks, network=[interface(one, uuids) for one in wanted["networks"] or []])
    body.update(
        ssh_key=wanted["ssh_key"], user_data=encoded(wanted["user_data"]), metadata=wanted["metadata"]
    )
    body.update({name: wanted[name] for name in (*MADE_WITH, "uefi")})
    return {name: value for name, value in body.items() if value is not None}


def interface(one: dict[str, Any], uuids: dict[str, str]) -> dict[str, Any]:
    """As a guest's maker, or who plugs one in, gives it."""
    given = {name: one[name] for name in OF_AN_INTERFACE if one[name] is not None}
    return {"network_uuid": uuids[one["network"]], **given}


def made_otherwise(have: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What cannot be changed and is not as wanted, in words."""
    disks = have["disk_spec"] or [{}]
    pairs = [
        ("image", disks[0].get("base"), wanted["image"]),
        ("ssh_key", (have["ssh_key"] or "").strip(), wanted["ssh_key"] and wanted["ssh_key"].strip()),
        ("user_data", have["user_data"], encoded(wanted["user_data"])),
        ("uefi", bool(have["uefi"]), wanted["uefi"]),
    ]
    found = [name for name, is_now, asked in pairs if asked is not None and is_now != asked]
    if wanted["disks"] and len(wanted["disks"]) != len(have["disks"]):
        found.append("the number of disks")
    return found


def changes(have: dict[str, Any], wanted: dict[str, Any]) -> list[Step]:
    """What is set on a guest that is there. Raises Failed."""
    at, steps = ("instances", have["uuid"]), []
    body = {n: wanted[n] for n in SETTABLE if wanted[n] is not None and wanted[n] != have[n]}
    sizes = zip(have["disks"], wanted["disks"] or (), strict=False)
    if grown := {disk["device"]: size for disk, size in sizes if size != disk["size"]}:
        body["disks"] = grown
    if body:
        steps.append(Step(f"set {', '.join(sorted(body))}", "PATCH", at, body))
    for key in settle_metadata(have["metadata"], wanted["metadata"]):
        value = {"value": wanted["metadata"][key]}
        steps.append(Step(f"set metadata {key}", "PUT", (*at, "metadata", key), value))
    return steps


def plugging(have: dict[str, Any], wanted: dict[str, Any], uuids: dict[str, str]) -> list[Step]:
    """Interfaces that are missing."""
    missing = [one for one, there in matched(have, wanted, uuids) if there is None]
    path = ("instances", have["uuid"], "interfaces")
    return [
        Step(f"plug into {one['network']}", "POST", path, {"network": interface(one, uuids)})
        for one in missing
    ]


def leading(have: dict[str, Any], wanted: dict[str, Any], uuids: dict[str, str]) -> list[Step]:
    """Floating addresses and published ports of the interfaces that are there."""
    steps = []
    for one, there in matched(have, wanted, uuids):
        if there is None:
            continue
        at, name = ("interfaces", there["uuid"]), one["network"]
        if one["float"] is not None and one["float"] != bool(there["floating"]):
            verb = "float" if one["float"] else "defloat"
            steps.append(Step(f"{verb} on {name}", "POST", (*at, verb), {}))
        for ports in one["publish"] or []:
            if (ports if "/" in ports else f"{ports}/tcp") not in there["published"]:
                steps.append(Step(f"publish {ports} on {name}", "POST", (*at, "publish"), {"ports": ports}))
    return steps


def matched(
    have: dict[str, Any], wanted: dict[str, Any], uuids: dict[str, str]
) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each wanted interface with the one that is there, those with an address first."""
    free, found = list(have["interfaces"]), []
    for one in sorted(wanted["networks"] or [], key=lambda one: not one["address"]):
        fits = [
            i
            for i in free
            if i["network_uuid"] == uuids.get(one["network"])
            and one["address"] in (None, i["ipv4"], i["ipv6"])
        ]
        found.append((one, fits[0] if fits else None))
        free = [i for i in free if i not in fits[:1]]
    return found


def power(have: dict[str, Any], wanted: dict[str, Any]) -> list[Step]:
    """What turns it on or off, if it is not on its way already."""
    at = ("instances", have["uuid"])
    if wanted["state"] == "started" and have["power"] == "paused":
        return [Step("unpause", "POST", (*at, "unpause"), {})]
    down = have["state"] == "created" and have["power_state"] in ("off", "crashed")
    if wanted["state"] == "started" and (have["power"] != "on" or down):
        return [Step("start", "POST", (*at, "poweron"), {})]
    if wanted["state"] == "stopped" and have["power"] != "off" and have["power_state"] != "transition-to-off":
        return [Step("stop", "POST", (*at, "poweroff"), {"timeout_s": wanted["stop_timeout"]})]
    return []


class Guest:
    """One guest, and what is done to it: nothing in check mode."""

    def __init__(self, module: AnsibleModule) -> None:
        self.wanted, self.check = module.params, module.check_mode
        self.api, self.done, self.uuids = Api(module.params), list[str](), dict[str, str]()
        self.have = self.api.find("instances", self.wanted["name"])

    def run(self) -> dict[str, Any]:
        if self.wanted["state"] == "absent":
            if self.have:
                self.delete()
            return self.result()
        for one in self.wanted["networks"] or []:
            found = self.api.find("networks", one["network"])
            if (
                found is None and not self.check
            ):  # where nothing is made, it may be that a task before this makes it
                raise Failed(f"no network is called {one['network']}")
            self.uuids[one["network"]] = found["uuid"] if found else one["network"]
        if self.have and (differs := made_otherwise(self.have, self.wanted)):
            if not self.wanted["recreate"]:
                name, what = self.wanted["name"], ", ".join(differs)
                raise Failed(f"{name} was made with something else: {what}. With recreate it is made anew")
            self.delete()
        if self.have is None:
            self.create()
        if self.have is None:
            return self.result()
        self.act(changes(self.have, self.wanted) + plugging(self.have, self.wanted, self.uuids))
        self.act(leading(self.have, self.wanted, self.uuids) + power(self.have, self.wanted))
        if self.wanted["wait"] and not self.check:
            self.settle()
        return self.result()

    def create(self) -> None:
        body = creation(self.wanted, self.uuids)
        if not self.wanted["image"] and not self.wanted["disks"]:
            raise Failed("a new guest needs an image, or disks")
        self.done.append("create")
        if self.check:
            return
        self.have = self.api("POST", "instances", body=body)
        if self.wanted["wait"] or self.wanted["state"] == "stopped":
            self.settle(power=False)

    def delete(self) -> None:
        assert self.have
        self.done.append("delete")
        if not self.check:
            self.api("DELETE", "instances", self.have["uuid"])
            for found in self.api.follow("instances", self.have["uuid"], timeout_s=self.wanted["timeout"]):
                if found["state"] == "deleted" or not self.wanted["wait"]:
                    break
        self.have = None

    def act(self, steps: list[Step]) -> None:
        """Take the steps, and look again if there was any."""
        assert self.have
        self.done += [step.what for step in steps]
        for step in () if self.check else steps:
            self.api(step.method, *step.path, body=step.body or None)
        if steps and not self.check:
            self.have = self.api("GET", "instances", self.have["uuid"])

    def settle(self, *, power: bool = True) -> None:
        """Wait until it is created, and on or off as asked."""
        assert self.have
        wanted = (
            {"started": ("on",), "stopped": ("off", "crashed")}.get(self.wanted["state"]) if power else None
        )
        for found in self.api.follow("instances", self.have["uuid"], timeout_s=self.wanted["timeout"]):
            self.have = found
            if found["state"] == "created" and (wanted is None or found["power_state"] in wanted):
                return
            if found["state"] in ("delete-wait", "deleted"):
                raise Failed(f"{found['name']} was deleted meanwhile")

    def result(self) -> dict[str, Any]:
        return {"changed": bool(self.done), "changes": self.done, "instance": without_secrets(self.have)}


def main() -> None:
    network: dict[str, Any] = {
        "network": {"type": "str", "required": True},
        **{name: {"type": "str"} for name in ("address", "macaddress", "model", "rules")},
        "float": {"type": "bool"},
        "publish": {"type": "list", "elements": "str"},
    }
    spec: dict[str, Any] = {
        **OPTIONS,
        "name": {"type": "str", "required": True},
        "state": {
            "type": "str",
            "choices": ["present", "started", "stopped", "absent"],
            "default": "present",
        },
        **{name: {"type": "str"} for name in ("image", "user_data", "placed_on")},
        "ssh_key": {"type": "str", "no_log": False},
        **{name: {"type": "int"} for name in ("cpus", "memory", "ttl", "order", "delay_s")},
        **{name: {"type": "bool"} for name in ("uefi", "ephemeral", "sync")},
        "disks": {"type": "list", "elements": "int"},
        "networks": {"type": "list", "elements": "dict", "options": network},
        "metadata": {"type": "dict"},
        "autostart": {"type": "str", "choices": ["yes", "no", "last"]},
        "recreate": {"type": "bool", "default": False},
        "stop_timeout": {"type": "int", "default": 60},
        "wait": {"type": "bool", "default": True},
        "timeout": {"type": "int", "default": 600},
    }
    module = AnsibleModule(spec, supports_check_mode=True)
    finish(module, lambda asked: Guest(asked).run())


if __name__ == "__main__":
    main()
