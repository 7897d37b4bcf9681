"""The REST interface asked for everything that its own OpenAPI description allows, and for what it forbids.

No answer is an internal error, none is larger than LIMIT_BYTES, none takes PATIENCE_S; afterwards every list is there.
Seeded: SF_TEST_SEED repeats a run, SF_TEST_ALL asks a hundred times as much.
"""

import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from compute.api.app import build
from tests import drills
from tests.api_server import Running, running

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (the extra dev has it)"
)

LIMIT_BYTES = 1 << 20
PATIENCE_S = 30
LISTS = ("/instances", "/networks", "/nodes", "/artifacts", "/auth/namespaces")

NASTY = st.sampled_from(
    [
        *(
            None,
            True,
            0,
            -1,
            2**31,
            2**63 - 1,
            1e300,
            0.1,
            "",
            " ",
            "é",
            "\x00",
            "a" * 5000,
            "²",
            "../..",
            "%2e%2e",
        ),
        *(
            [],
            {},
            [[]],
            {"": ""},
            [None] * 100,
            "system",
            "lan",
            "web",
            "10.42.0.1",
            "255.255.255.255/33",
            "::1",
        ),
        *(
            "02:00:00:00:00:01",
            "http://127.0.0.1/",
            "sf://blob/x",
            "label:x",
            "file:///etc/passwd",
            "$(id)",
            "\r\n",
        ),
    ]
)
"""What breaks programs, put where something else was expected."""

REFS = (
    "lan",
    "web",
    "shop",
    "node1",
    "debian:12",
    "00000000-0000-0000-0000-000000000000",
    "a" * 300,
    "%00",
    "*",
    "é",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("fuzz") / "state") as found:
        found.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "shop-key"})
        yield found
        furnish(found)
        for path in LISTS:
            assert found.call("GET", path).status == 200, path


def furnish(server: Running) -> None:
    """What the calls are about is there again, whatever the ones before have removed, and so are tokens."""
    server.tokens.clear()
    server.call("POST", "/networks", {"name": "lan", "netblock": "10.42.0.0/24"})
    server.instance(network="lan")
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "shop-key"})
    server.call("POST", "/auth/namespaces/shop/keys", {"key_name": "k", "key": "shop-key"})
    for name, key in (("system", server.key), ("shop", "shop-key")):
        server.tokens[name] = server.login(name, key).body.get("access_token", "")


def operations() -> list[Any]:
    """Of the description that the program makes of itself."""
    services: Any = SimpleNamespace(store=None)
    found: Any = schemathesis.openapi.from_dict(build(services).openapi())
    return [result.ok() for result in found.get_all_operations()]


def put_something(data: st.DataObject, body: Any) -> Any:
    """One value of the body is another, or a key is too many."""
    if not isinstance(body, dict) or data.draw(st.booleans()):
        return body
    key = data.draw(st.sampled_from([*sorted(body, key=str), "unknown"]))
    return {**body, key: data.draw(NASTY)}


@pytest.mark.parametrize("operation", operations(), ids=lambda one: one.label)
def test_no_call_is_an_internal_error(
    server: Running, operation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """J2."""
    furnish(server)
    modes = schemathesis.GenerationMode
    strategy = operation.as_strategy(generation_mode=modes.POSITIVE)
    if operation.body:
        strategy |= operation.as_strategy(generation_mode=modes.NEGATIVE)

    @seed(drills.seed())
    @settings(
        max_examples=400 if drills.everything() else 6, deadline=None, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy, st.data())
    def ask(case: Any, data: st.DataObject) -> None:
        for name in case.path_parameters or ():
            if data.draw(st.booleans()):
                case.path_parameters[name] = data.draw(st.sampled_from(REFS))
        (case.query or {}).pop("follow", None)
        case.body = put_something(data, case.body)
        who = data.draw(st.sampled_from(["system", "system", "shop", ""]))
        headers = {"Authorization": f"Bearer {server.tokens[who]}"} if who else {}
        answer = case.call(base_url=server.url, headers=headers, timeout=PATIENCE_S)
        said = f"{case.as_curl_command()}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500 or answer.status_code in (503, 507), said
        assert len(answer.content) <= LIMIT_BYTES, said
        if answer.status_code >= 400 and answer.content:
            body = json.loads(answer.content)
            assert (body["status"], len(body["error"]) < 2000) == (answer.status_code, True), said

    with caplog.at_level(logging.ERROR):
        ask()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
