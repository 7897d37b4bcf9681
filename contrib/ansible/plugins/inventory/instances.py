"""Ansible inventory: the guests that a key sees, with groups by namespace, network, node and label."""

from __future__ import annotations

import shlex
from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible.utils.unsafe_proxy import wrap_var
from ansible_collections.sf.cloud.plugins.module_utils.api import OPTIONS, Api, Failed, without_secrets

DOCUMENTATION = r"""
name: instances
short_description: The guests of sf
description:
  - Lists the guests that the key sees. Its file ends in C(sf.yml) or C(sf.yaml).
  - Groups are C(namespace_X), C(network_X), C(node_X), C(label_KEY_VALUE) of what is in a guest's metadata, and C(on),
    C(off) or C(paused). What a guest is stands in the variable C(sf), as the API shows it.
  - A guest of a name that several namespaces have is called C(NAMESPACE/NAME).
author: the authors of sf
extends_documentation_fragment:
  - sf.cloud.access
  - constructed
options:
  plugin:
    description: That this file is for it.
    required: true
    choices: [sf.cloud.instances]
  all_namespaces:
    description: With the administrator's key, the guests of all namespaces instead of the key's own.
    type: bool
    default: false
  through:
    description:
      - How ssh gets there. V(sf) leads it through the API by C(sf instance connect), which must be installed where
        ansible runs and knows the server by C(sf login) or the same variables. It takes no route to the guests.
      - V(address) leaves the way to the network - a guest's floating address, or else its first.
    type: str
    choices: [sf, address]
    default: sf
"""

EXAMPLES = r"""
plugin: sf.cloud.instances
keyed_groups:
  - key: sf.metadata.role
    prefix: role
"""


class InventoryModule(BaseInventoryPlugin, Constructable):  # type: ignore[misc]
    """Called by ansible: `verify_file`, then `parse`."""

    NAME = "sf.cloud.instances"

    def verify_file(self, path: str) -> bool:
        return bool(super().verify_file(path)) and path.endswith(("sf.yml", "sf.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        try:
            api = Api({name: self.get_option(name) for name in OPTIONS})
            of = {} if self.get_option("all_namespaces") else {"namespace": api.namespace}
            networks = {one["uuid"]: one["name"] for one in api("GET", "networks")}
            guests = api("GET", "instances", body=of or None)
        except Failed as error:
            raise AnsibleParserError(str(error)) from error
        names = [one["name"] for one in guests]
        for one in guests:
            twice = names.count(one["name"]) > 1
            self._add(f"{one['namespace']}/{one['name']}" if twice else one["name"], one, networks)

    def _add(self, name: str, guest: dict[str, Any], networks: dict[str, str]) -> None:
        self.inventory.add_host(name)
        here = [networks[i["network_uuid"]] for i in guest["interfaces"] if i["network_uuid"] in networks]
        addresses = [
            i[field] for field in ("floating", "ipv4", "ipv6") for i in guest["interfaces"] if i[field]
        ]
        # A tenant's words are no template: what is not wrapped would be evaluated where ansible runs.
        known: dict[str, Any] = {"sf": wrap_var(without_secrets(guest))}
        if self.get_option("through") == "sf":
            proxy = f"sf instance connect {shlex.quote(guest['uuid'])} %p"
            known["ansible_ssh_common_args"] = f"-o {shlex.quote(f'ProxyCommand={proxy}')}"
            # What ssh remembers of a guest's key is the guest's, whoever has its name or address later.
            known["ansible_host"] = guest["uuid"]
        elif addresses:
            known["ansible_host"] = addresses[0]
        for variable, value in known.items():
            self.inventory.set_variable(name, variable, value)
        groups = [f"namespace_{guest['namespace']}", f"node_{guest['node']}"]
        groups += [f"network_{network}" for network in here] + [guest["power"]]
        groups += [
            f"label_{key}_{value}" for key, value in guest["metadata"].items() if isinstance(value, str)
        ]
        for group in groups:
            self.inventory.add_child(self.inventory.add_group(self._sanitize_group_name(group)), name)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), known, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), known, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), known, name, strict=strict)
