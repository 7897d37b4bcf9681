"""Ansible module: a network is there as described, or is not."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sf.cloud.plugins.module_utils.api import (
    OPTIONS,
    Api,
    Failed,
    finish,
    settle_metadata,
)

DOCUMENTATION = r"""
module: network
short_description: A network of sf
description:
  - Makes or deletes a network. What a network is made with stays; where that differs from what is asked, the module
    fails and says how.
author: the authors of sf
extends_documentation_fragment: sf.cloud.access
attributes:
  check_mode:
    support: full
    description: Says what would change and changes nothing.
options:
  name:
    description: Its name.
    type: str
    required: true
  state:
    description: V(absent) deletes it, which takes that no guest is on it.
    type: str
    choices: [present, absent]
    default: present
  netblock:
    description: IPv4 addresses, as V(10.42.0.0/24). Without, it has IPv6 alone, or is a LAN with a DHCP server.
    type: str
  ipv6:
    description: V(auto), or a /64 that is led to the network's router.
    type: str
  slaac:
    description: Whether guests may choose further IPv6 addresses by themselves.
    type: bool
  provide_dhcp:
    description: Whether guests get addresses by DHCP. True, if it is not given when the network is made.
    type: bool
  provide_nat:
    description: Whether guests reach the world by NAT. True, if it is not given when the network is made.
    type: bool
  provide_dns:
    description: Whether the guests' names are answered. True, if it is not given when the network is made.
    type: bool
  isolated:
    description: Whether nobody may begin to speak to its guests but who their rules allow.
    type: bool
  bridge:
    description: A bridge of the nodes, whose LAN the guests are on. The administrator's alone.
    type: str
  range:
    description: C(A-B), what may be handed out of a LAN's netblock. Counts when the network is made.
    type: str
  gateway:
    description: The gateway of a LAN.
    type: str
  metadata:
    description: Keys and values that it has. Keys that are not named stay as they are.
    type: dict
"""

EXAMPLES = r"""
- sf.cloud.network:
    name: lan
    netblock: 10.42.0.0/24
"""

RETURN = r"""
network:
  description: The network as the API shows it; null where it is absent.
  type: dict
  returned: always
"""

FIXED = ("netblock", "provide_dhcp", "provide_nat", "provide_dns", "isolated", "slaac", "bridge", "gateway")


def differences(have: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What cannot be changed and is not as wanted, in words."""
    found = [
        f"{name} is {have[name]!r}, not {wanted[name]!r}"
        for name in FIXED
        if wanted[name] is not None and have[name] != wanted[name]
    ]
    if (six := wanted["ipv6"]) and (not have["netblock6"] if six == "auto" else have["netblock6"] != six):
        found.append(f"its IPv6 netblock is {have['netblock6']!r}, not {six!r}")
    return found


def run(module: AnsibleModule) -> dict[str, Any]:
    wanted = module.params
    api, name = Api(wanted), wanted["name"]
    have = api.find("networks", name)
    if wanted["state"] == "absent":
        if have and not module.check_mode:
            api("DELETE", "networks", have["uuid"])
        return {"changed": bool(have), "network": None}
    body = {n: wanted[n] for n in (*FIXED, "name", "ipv6", "range") if wanted[n] is not None}
    keys = settle_metadata(have["metadata"] if have else {}, wanted["metadata"])
    if have and (wrong := differences(have, wanted)):
        raise Failed(f"network {name} cannot be changed: {'; '.join(wrong)}. Delete it to have it made anew")
    changed = bool(keys) or not have
    if module.check_mode or not changed:
        return {"changed": changed, "network": have or body}
    uuid = (have or api("POST", "networks", body=body))["uuid"]
    for key in keys:
        api("PUT", "networks", uuid, "metadata", key, body={"value": wanted["metadata"][key]})
    return {"changed": True, "network": api("GET", "networks", uuid)}


def main() -> None:
    spec: dict[str, Any] = {
        **OPTIONS,
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        **{n: {"type": "str"} for n in ("netblock", "ipv6", "bridge", "range", "gateway")},
        **{n: {"type": "bool"} for n in ("provide_dhcp", "provide_nat", "provide_dns", "isolated", "slaac")},
        "metadata": {"type": "dict"},
    }
    module = AnsibleModule(spec, supports_check_mode=True)
    finish(module, run)


if __name__ == "__main__":
    main()
