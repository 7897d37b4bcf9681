"""`sf login` and `sf context`: which server commands speak to, as whom."""

import os
import ssl
import sys

import click

import imagestore
from cli.cloud.api import Api, trusting
from cli.command import Command, Group, settings
from cli.errors import AUTH, MISSING, USAGE, Problem
from cli.output import say, show_list
from cli.settings import access, contexts, forget, is_loopback, keep_context, parted

context = Group("context", help="Servers that you logged in to; one is in use.")


@click.command(
    cls=Command,
    needs=("namespace",),
    examples="""sf login https://cloud.lan:13000 --fingerprint b3:9f86d081… --namespace shop
    sf login https://cloud.example < key""",
)
@click.argument("url", metavar="URL[,URL…]")
@click.option("--fingerprint", metavar="b3:…", help="Of the server's authority, as `sf serve` prints it.")
@click.option("--name", metavar="CONTEXT", help="What to call it here; default: the host's name.")
def login(url: str, fingerprint: str | None, name: str | None) -> None:
    """Keep a key for a server elsewhere (of several: U1,U2), and use it. It is asked for, or SF_KEY, or the input."""
    urls = [one.rstrip("/") for one in url.split(",")]
    if not all(parted(one) and (one.startswith("https:") or is_loopback(one)) for one in urls):
        raise Problem(f"not the URL of a server: {url!r}", hint="https://HOST:PORT", code=USAGE)
    url = ",".join(urls)
    ca = _authority(url, fingerprint) if fingerprint else ""
    namespace = settings().get("namespace", "system")
    key = os.environ.get("SF_KEY") or (
        click.prompt(f"key of namespace {namespace}", hide_input=True, err=True)
        if sys.stdin.isatty()
        else sys.stdin.readline().strip()
    )
    api = Api((url, namespace, key), trusting(ca))
    api("GET", "auth", "namespaces", namespace)
    # Without an authority of their own, each has a certificate for the name that people know it by.
    url = ",".join(dict.fromkeys([*urls, *(api.servers if ca else ())]))
    name = name or parted(urls[0]).hostname or ""
    path = keep_context(name, {"url": url, "namespace": namespace, "key": key, "ca": ca})
    say(f"{name} is in {path} and in use: {url} as {namespace}, key {api.known_as[1]}")


def _authority(url: str, fingerprint: str) -> str:
    """The certificate with this fingerprint, in PEM, from whoever answers there: nothing is said before it fits."""
    wanted, anybody = imagestore.Digest.parse(fingerprint), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    pem = Api((url, "", ""), tls=anybody).asked_by_anybody("admin", "cacert")
    try:
        found = imagestore.Digest.of(ssl.PEM_cert_to_DER_cert(pem)) if pem else None
    except (ValueError, TypeError, AttributeError) as error:
        raise Problem(f"{url} shows no authority's certificate", code=AUTH) from error
    if found != wanted:
        raise Problem(f"{url} shows another authority: {found}", hint="is it the right server?", code=AUTH)
    return str(pem)


@context.add(examples="sf context ls")
def ls(form: str) -> None:
    """List the servers that you logged in to."""
    used = access(settings())[:2]
    rows = [
        {"name": n, "url": c["url"], "namespace": c.get("namespace", "system")}
        for n, c in contexts(settings()).items()
    ]
    in_use = "", lambda c: "in use" if (c["url"], c["namespace"]) == used else ""
    columns = (("name", "name"), ("url", "url"), ("as", "namespace"), in_use)
    show_list(rows, columns, form)


@context.add(examples="sf context use cloud.lan")
def use(name: str) -> None:
    """Speak to this server from now on."""
    known = contexts(settings())
    if name not in known:
        raise Problem(f"no context is called {name!r}", hint="sf context ls", code=MISSING)
    say(f"{name} is in use: {keep_context(name, known[name])}")


@context.add(examples="sf context rm cloud.lan")
def rm(name: str) -> None:
    """Forget a server and the key for it."""
    say(f"{name} is out of {forget('context', name)}")
