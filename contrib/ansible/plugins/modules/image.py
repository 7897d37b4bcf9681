"""Ansible module: an image is in the namespace's own store, brought from a URL by the server or sent from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sf.cloud.plugins.module_utils.api import OPTIONS, Api, Failed, finish

DOCUMENTATION = r"""
module: image
short_description: An image that a namespace of sf keeps
description:
  - Has the server fetch and keep the disk image of a URL, or sends it a file of the machine where the module runs.
  - What it returns as RV(base) is what a guest's O(sf.cloud.instance#module:image) may be.
author: the authors of sf
extends_documentation_fragment: sf.cloud.access
attributes:
  check_mode:
    support: full
    description: Says what would change and changes nothing.
options:
  url:
    description: Where the server fetches it. Compressed files and OVAs are unpacked.
    type: str
  path:
    description:
      - A file where the module runs. It is sent where the newest version under the name has another sum.
      - Versions that guests were made of stay with those guests.
    type: path
  name:
    description: What a file is called. Needed with O(path).
    type: str
  state:
    description: V(absent) deletes all versions that are kept.
    type: str
    choices: [present, absent]
    default: present
  refresh:
    description: Whether the server asks a URL again that it keeps already; it fetches what has changed there.
    type: bool
    default: false
  timeout:
    description: Seconds until the image must be there.
    type: int
    default: 1800
"""

EXAMPLES = r"""
- sf.cloud.image:
    url: https://cloud.example/y.qcow2.xz
  register: fetched

- sf.cloud.image:
    path: ./golden.qcow2
    name: golden
"""

RETURN = r"""
base:
  description: What a guest may be made of, C(sf://upload/NAMESPACE/NAME) or the URL.
  type: str
  returned: always
image:
  description: The artifact as the API shows it; null where it is absent.
  type: dict
  returned: always
"""

PIECE_BYTES = 8 << 20


def newest(artifact: dict[str, Any] | None) -> dict[str, Any]:
    """Of its versions; {} if it has none."""
    return artifact["blobs"].get(str(artifact["index"]), {}) if artifact else {}


def send(api: Api, file: Path, name: str) -> dict[str, Any]:
    """Upload a file piece by piece and have it kept: the artifact."""
    uuid = api("POST", "upload")["uuid"]
    with file.open("rb") as source:
        while piece := source.read(PIECE_BYTES):
            api("POST", "upload", uuid, body=piece)
    kept: dict[str, Any] = api("POST", "artifacts", "upload", name, body={"upload_uuid": uuid})
    return kept


def run(module: AnsibleModule) -> dict[str, Any]:
    wanted = module.params
    api = Api(wanted)
    base = wanted["url"] or f"sf://upload/{api.namespace}/{wanted['name']}"
    known = api("GET", "artifacts", body={"namespace": api.namespace})
    have = next((a for a in known if a["source_url"] == base and a["namespace"] == api.namespace), None)
    if wanted["state"] == "absent":
        if have and not module.check_mode:
            api("DELETE", "artifacts", have["uuid"])
        return {"changed": bool(have), "base": base, "image": None}
    before, made = newest(have), None
    if file := wanted["path"] and Path(wanted["path"]):
        if not file.is_file():
            raise Failed(f"no file {file}")
        differs = not before or before.get("sha256") != module.sha256(str(file))
        if differs and not module.check_mode:
            made = send(api, file, wanted["name"])
    else:
        differs = not before
        if (differs or wanted["refresh"]) and not module.check_mode:
            made = api("POST", "artifacts", body={"url": base})
    if made:
        for have in api.follow("artifacts", made["uuid"], timeout_s=wanted["timeout"]):
            if have["state"] == "created":
                break
        differs = newest(have) != before
    return {"changed": differs, "base": base, "image": have}


def main() -> None:
    spec: dict[str, Any] = {
        **OPTIONS,
        "url": {"type": "str"},
        "path": {"type": "path"},
        "name": {"type": "str"},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "refresh": {"type": "bool", "default": False},
        "timeout": {"type": "int", "default": 1800},
    }
    rules: dict[str, Any] = {
        "mutually_exclusive": [("url", "path"), ("url", "name")],
        "required_one_of": [("url", "name")],
        "required_by": {"path": "name"},
    }
    module = AnsibleModule(spec, supports_check_mode=True, **rules)
    if module.params["state"] == "present" and not (module.params["url"] or module.params["path"]):
        module.fail_json(msg="an image is made of a url or of a path")
    finish(module, run)


if __name__ == "__main__":
    main()
