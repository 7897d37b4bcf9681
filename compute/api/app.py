"""The application: routers, the capability page, and what machines ask for (metrics, liveness, readiness)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compute.api import history, inside, instances, namespaces, networks, nodes, problems, screens, streams
from compute.api.context import Admin, Services
from compute.api.edge import Edge
from compute.api.images import artifacts, snapshots
from compute.api.images.stores import OwnStores
from compute.api.ui import pages
from compute.cluster.certificates import ends_s
from compute.cluster.records.instances import Instance
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.snapshots import Backup
from compute.cluster.records.transaction import Transaction
from compute.wire.operations import COUNTED, HELD

CAPABILITIES = tuple(
    """
    agentoperations-crud artifact-metadata artifact-upload-types blob-data-limit blob-events
    blob-search-by-hash events-by-type extra-dns-entries get-instance-namespace
    get-network-namespace hot-plug-interface instance-agentoperations instance-agentoperations-all
    instance-execute instance-get instance-put-blob instance-screenshot interface-metadata
    list-addresses node-get node-metadata provide-dns route-addresses vdi-console-helper
    """.split()
)
"""What clients search for in the page at `/`. A word stands here when its routes are there, never before."""

_PAGE = (
    "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>sf</title><h1>sf</h1>"
    '<p>A REST API: <a href="/openapi.json">openapi.json</a>, and <a href="/ui">pages</a></p><ul>{}</ul></html>'
)


class _Objects(Collector):
    """How many of each, counted when somebody asks."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterable[Metric]:
        config, usage = self._services.config, self._services.controller.usage
        read = Transaction(self._services.store)
        instances, nodes = read.list(Instance), [n for n in read.list(Node) if n.state != "deleted"]
        counted = Counter(("instance", str(i.state)) for i in instances)
        counted.update(("network", n.state) for n in read.list(Network))
        counted.update(("node", n.state) for n in nodes)
        yield _family("sf_objects", "Objects by kind and state", ["kind", "state"], sorted(counted.items()))
        came, waited = list[_Row](), list[_Row]()
        for one in instances:
            disks = list(one.extra.get("image_bytes", {}).values())
            total = sum((Counter(figures.get("received", {})) for figures in disks), Counter[str]())
            came += [((one.uuid, origin), count) for origin, count in total.items()]
            waited += [((one.uuid,), sum(figures.get("waited_s", 0) for figures in disks))] if disks else []
        yield _family("sf_boot_bytes", "Bytes of guests' images by origin", ["instance", "origin"], came)
        yield _family("sf_boot_waited_seconds", "What guests' reads waited for them", ["instance"], waited)
        kept = list[_Row]()
        for r in read.list(Backup):
            told = {"failures": r.failures, "last_seconds": r.last_s, "due_seconds": r.due_s}
            kept += [((r.uuid, what), number) for what, number in told.items()]
        yield _family("sf_backup", "Failures in a row; the last; the next", ["instance", "what"], kept)
        cert = config.tls_cert or str(config.state_dir / "auth/api.crt") if config.tls else ""
        ends = [((), ends_s(cert))] if cert else []
        yield _family("sf_certificate_ends_seconds", "When the API's certificate ends", [], ends)
        labels = ["instance", "name", "namespace", "node"]
        used: _Used = {(i.uuid, i.name, i.namespace, i.node): usage.of(i) for i in instances}
        yield from _used("instance", labels, used)
        yield from _used("node", ["node"], {(node.name,): usage.of(node) for node in nodes})
        yield _family("sf_state_revision", "Commits of the state store", [], [((), read.store.revision())])


_Row = tuple[tuple[str, ...], float]
_Used = Mapping[tuple[str, ...], Mapping[str, Any] | None]


def _family(name: str, about: str, labels: list[str], rows: Iterable[_Row], *, grows: bool = False) -> Metric:
    found = (CounterMetricFamily if grows else GaugeMetricFamily)(name, about, labels=labels)
    for values, number in rows:
        found.add_metric(values, number)
    return found


def _used(kind: str, labels: list[str], used: _Used) -> Iterable[Metric]:
    for name in (*COUNTED, *HELD):
        rows = [(values, one[name]) for values, one in used.items() if one]
        called = f"sf_{kind}_{name.replace('cpu_s', 'cpu_seconds')}"
        yield _family(called, f"What each {kind} uses", labels, rows, grows=name in COUNTED)


def build(services: Services) -> FastAPI:
    """The ASGI application over these services."""
    app = FastAPI(title="sf", docs_url=None, redoc_url=None)
    app.state.services = services
    registry = CollectorRegistry()
    registry.register(_Objects(services))
    app.add_middleware(Edge, registry=registry)
    problems.install(app)
    guests = instances, inside, screens, streams, snapshots, artifacts
    for module in (*guests, namespaces, networks, nodes, history, pages):
        app.include_router(module.router)
    app.mount("/stores", OwnStores(services))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(_PAGE.format("".join(f"<li>{word}" for word in CAPABILITIES)))

    @app.get("/metrics", include_in_schema=False)
    def scrape(ctx: Admin) -> Response:
        """The administrator's: names and figures of everybody's guests. Basic authentication will do."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/livez", tags=["health"])
    async def livez() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", tags=["health"])
    def readyz(request: Request) -> Response:
        """200 once the state store answers and this machine's agent is at work."""
        server = services.controller.server
        services.store.get("ready")
        if server and not services.controller.nodes.alive(server):
            return problems.answer(request, 503, "this machine's agent is not ready yet")
        return JSONResponse({"status": "ok"})

    return app
