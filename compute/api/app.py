"""The application: routers, the capability page, and what machines ask for (metrics, liveness, readiness)."""

from collections import Counter
from collections.abc import Iterable

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compute.api import history, instances, namespaces, networks, nodes, problems, screens, streams
from compute.api.context import Ctx, Services
from compute.api.edge import Edge, Metrics
from compute.api.images import artifacts, snapshots
from compute.api.images.stores import OwnStores
from compute.api.ui import pages
from compute.cluster.records.instances import Instance
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.snapshots import Backup
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.protocol import StateStore

CAPABILITIES = (
    "artifact-metadata",
    "artifact-upload-types",
    "blob-data-limit",
    "blob-events",
    "blob-search-by-hash",
    "events-by-type",
    "extra-dns-entries",
    "get-instance-namespace",
    "get-network-namespace",
    "hot-plug-interface",
    "interface-metadata",
    "list-addresses",
    "node-get",
    "node-metadata",
    "provide-dns",
    "vdi-console-helper",
)
"""What clients search for in the page at `/`. A word stands here when its routes are there, never before."""

_PAGE = (
    "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>sf</title><h1>sf</h1>"
    '<p>A REST API: <a href="/openapi.json">openapi.json</a></p><ul>{}</ul></html>'
)


class _Objects(Collector):
    """How many of each, counted when somebody asks."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        read = Transaction(self._store)
        gauge = GaugeMetricFamily("sf_objects", "Objects by kind and state", labels=["kind", "state"])
        instances = read.list(Instance)
        counted = Counter(("instance", str(i.state)) for i in instances)
        counted.update(("network", n.state) for n in read.list(Network))
        counted.update(("node", n.state) for n in read.list(Node))
        for labels, count in sorted(counted.items()):
            gauge.add_metric(labels, count)
        yield gauge
        came = GaugeMetricFamily(
            "sf_boot_bytes",
            "Bytes of running guests' images by where they came from",
            labels=["instance", "origin"],
        )
        waited = GaugeMetricFamily(
            "sf_boot_waited_seconds", "What guests' reads waited for them", labels=["instance"]
        )
        for one in instances:
            disks = list(one.extra.get("image_bytes", {}).values())
            total = sum((Counter(figures.get("received", {})) for figures in disks), Counter[str]())
            for origin, count in total.items():
                came.add_metric([one.uuid, origin], count)
            if disks:
                waited.add_metric([one.uuid], sum(figures.get("waited_s", 0) for figures in disks))
        yield from (came, waited)
        kept = GaugeMetricFamily("sf_backup", "Failures in a row; the last", labels=["instance", "what"])
        for rule in read.list(Backup):
            kept.add_metric([rule.uuid, "failures"], rule.failures)
            kept.add_metric([rule.uuid, "last_seconds"], rule.last_s)
        yield kept
        yield GaugeMetricFamily("sf_state_revision", "Commits of the state store", self._store.revision())


def build(services: Services) -> FastAPI:
    """The ASGI application over these services."""
    app = FastAPI(title="sf", docs_url=None, redoc_url=None)
    app.state.services = services
    metrics = Metrics()
    metrics.registry.register(_Objects(services.store))
    app.add_middleware(Edge, metrics=metrics)
    problems.install(app)
    guests = instances, screens, streams, snapshots, artifacts
    for module in (*guests, namespaces, networks, nodes, history, pages):
        app.include_router(module.router)
    app.mount("/stores", OwnStores(services))

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return HTMLResponse(_PAGE.format("".join(f"<li>{word}" for word in CAPABILITIES)))

    @app.get("/metrics", include_in_schema=False)
    def scrape(ctx: Ctx) -> Response:
        """The administrator's: names and figures of everybody's guests. Basic authentication will do."""
        ctx.admin()
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/livez", tags=["health"])
    async def livez() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", tags=["health"])
    def readyz(request: Request) -> Response:
        """200 once the state store answers and this machine's agent is at work."""
        ready = services.controller.nodes.alive(services.controller.server)
        services.store.get("ready")
        if not ready:
            return problems.answer(request, 503, "this machine's agent is not ready yet")
        return JSONResponse({"status": "ok"})

    return app
