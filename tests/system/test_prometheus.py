"""The shipped rules and dashboard: by promtool, and by a Prometheus that scrapes a server."""

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, transact
from compute.config import Config
from tests.api_server import running
from tests.servers import free_ports
from tests.system.machine import within

CONFIG = Path(__file__).resolve().parents[2] / "mirror-config"
RULES = CONFIG / "prometheus/sf.rules.yml"
needs = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs the package prometheus")
DAY = 86400
FIRES: dict[str, dict[str, str]] = {
    "SfDown": {'up{job="sf"}': "0x60"},
    "SfNodeLost": {'sf_objects{kind="node", state="missing"}': "1x60"},
    "SfBackupLate": {'sf_backup{exported_instance="u", what="failures"}': "3x60"},
    "SfCertificateEnds": {"sf_certificate_ends_seconds": f"{20 * DAY}x60"},
    "SfDiskNearlyFull": {
        'sf_node_disk_bytes{node="n"}': "95x60",
        'sf_node_disk_total_bytes{node="n"}': "100x60",
    },
    "SfMemoryNearlyFull": {
        'sf_node_memory_bytes{node="n"}': "96x60",
        'sf_node_memory_total_bytes{node="n"}': "100x60",
    },
    "SfInstanceFailed": {'sf_objects{kind="instance", state="error"}': "2x60"},
    "SfImageSlow": {'sf_boot_waited_seconds{exported_instance="u"}': "0+30x60"},
    "SfErrors": {'sf_api_requests_total{route="/x", status="503"}': "0+60x60"},
}
WELL = {
    'up{job="sf"}': "1x60",
    'sf_objects{kind="node", state="created"}': "2x60",
    'sf_objects{kind="instance", state="created"}': "2x60",
    'sf_backup{exported_instance="u", what="failures"}': "1x60",
    'sf_backup{exported_instance="u", what="due_seconds"}': "7200x60",
    "sf_certificate_ends_seconds": f"{30 * DAY}x60",
    'sf_node_disk_bytes{node="n"}': "50x60",
    'sf_node_disk_total_bytes{node="n"}': "100x60",
    'sf_boot_waited_seconds{exported_instance="u"}': "0+1x60",
    'sf_api_requests_total{route="/x", status="200"}': "0+600x60",
}
LATE = {'sf_backup{exported_instance="u", what="due_seconds"}': "0x120"}


def alerts() -> list[str]:
    return re.findall(r"alert: (\w+)", RULES.read_text())


def promtool(*words: str | Path) -> str:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs
def test_each_alert_fires_when_it_should_and_none_when_all_is_well(tmp_path: Path) -> None:
    promtool("check", "rules", RULES)
    assert set(FIRES) == set(alerts())
    cases = [(series, [name], "30m") for name, series in FIRES.items()]
    cases += [(WELL, [], "30m"), (LATE, ["SfBackupLate"], "90m")]
    tests = []
    for series, names, at in cases:
        samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names]
        query = 'max by (alertname) (ALERTS{alertstate="firing"})'
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": samples}],
            }
        )
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    promtool("test", "rules", file)


def queries() -> list[str]:
    """What the dashboard asks, and the metrics that the rules compare."""
    board = json.loads((CONFIG / "grafana/sf.json").read_text())
    assert {panel["type"] for panel in board["panels"]} <= {"timeseries", "stat"}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) and all(x + 6 <= 24 for x, _ in places)
    asked = [t["expr"].replace("$__rate_interval", "30s") for p in board["panels"] for t in p["targets"]]
    rules = " ".join(re.findall(r"expr: (.*)", RULES.read_text()))
    # An alert's own state is absent while all is well: its metric has to be there.
    return asked + sorted(set(re.findall(r"\b(?:sf_\w+|up)\b", rules)))


@needs
def test_a_real_prometheus_scrapes_a_server_and_every_query_has_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(state_dir=tmp_path / "state", node_name="node1", tls=True)
    with running(tmp_path / "state", config=config) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "state/auth/ca.crt"))
        server.network()
        uuid = server.instance("web", network="lan").body["uuid"]
        server.wait_for(f"/instances/{uuid}", "created")
        server.count()
        server.call("PUT", f"/instances/{uuid}/backup", {"every": 86400, "daily": 1})

        def booted(txn: Transaction) -> None:
            arrived = {"present_bytes": 1, "data_bytes": 2, "received": {"origin": 1}, "waited_s": 0.5}
            txn.update(replace(txn.get(Instance, uuid), extra={"image_bytes": {"vda": arrived}}))

        transact(server.services.store, booted)
        port = free_ports(1, 24000)
        target = urllib.parse.urlsplit(server.url)
        key = tmp_path / "key"
        key.write_text(server.key)
        scrape = {
            "job_name": "sf",
            "scheme": target.scheme,
            "static_configs": [{"targets": [target.netloc]}],
            "basic_auth": {"username": "system", "password_file": str(key)},
            "tls_config": {"ca_file": str(tmp_path / "state/auth/ca.crt")},
        }
        whole = {"global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"}}
        whole |= {"rule_files": [str(RULES)], "scrape_configs": [scrape]}
        file = tmp_path / "prometheus.yml"
        file.write_text(json.dumps(whole))
        promtool("check", "config", file)
        argv = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/data"]
        argv += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def ask(query: str) -> list[Any]:
            url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return json.load(answer)["data"]["result"]
            except OSError:
                return []

        try:
            for query in queries():
                within(60, lambda query=query: ask(query), query)
            assert ask('up{job="sf"}')[0]["value"][1] == "1"
            named = ask("sf_instance_memory_bytes")[0]["metric"]
            assert (named["name"], named["namespace"], named["node"]) == ("web", "system", "node1")
        finally:
            process.terminate()
            process.wait(30)
