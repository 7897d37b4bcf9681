"""`sf login` and `sf context`: which server commands speak to, as whom."""

import http.client
import json
import os
import ssl
import sys
from urllib.parse import urlsplit

import click

from cli.cloud.api import ANSWER_S, Api
from cli.command import Command, Group, settings
from cli.errors import AUTH, MISSING, UNREACHABLE, USAGE, Problem
from cli.output import say, show_list
from cli.settings import access, contexts, is_loopback, keep_context

_ANSWER_BYTES = 1 << 16

context = Group("context", help="Servers that you logged in to; one is in use.")


@click.command(
    cls=Command,
    needs=("namespace",),
    examples="""sf login https://cloud.lan:13000 --fingerprint b3:9f86d081… --namespace shop
    sf login https://cloud.example < key""",
)
@click.argument("url")
@click.option("--fingerprint", metavar="b3:…", help="Of the server's authority, as `sf serve` prints it.")
@click.option("--name", metavar="CONTEXT", help="What to call it here; default: the host's name.")
def login(url: str, fingerprint: str | None, name: str | None) -> None:
    """Keep a key for a server elsewhere, and use it. The key is asked for, or comes from SF_KEY or the input."""
    parts, url = urlsplit(url), url.rstrip("/")
    if not parts.hostname or (parts.scheme != "https" and not is_loopback(url)):
        raise Problem(f"not the URL of a server: {url!r}", hint="https://HOST:PORT", code=USAGE)
    ca = _authority(url, fingerprint) if fingerprint else ""
    namespace = settings().get("namespace", "system")
    key = os.environ.get("SF_KEY") or (
        click.prompt(f"key of namespace {namespace}", hide_input=True, err=True)
        if sys.stdin.isatty()
        else sys.stdin.readline().strip()
    )
    api = Api((url, namespace, key), ca)
    api("GET", "auth", "namespaces", namespace)
    name = name or parts.hostname
    path = keep_context(name, {"url": url, "namespace": namespace, "key": key, "ca": ca})
    say(f"{name} is in {path} and in use: {url} as {namespace}, key {api.known_as[1]}")


def _authority(url: str, fingerprint: str) -> str:
    """The certificate with this fingerprint, in PEM, from whoever answers there: nothing is said before it fits."""
    from imagestore import Digest

    wanted, parts = Digest.parse(fingerprint), urlsplit(url)
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    asking = http.client.HTTPSConnection(str(parts.hostname), parts.port, timeout=ANSWER_S, context=anybody)
    try:
        asking.request("GET", f"{parts.path}/admin/cacert")
        pem = json.loads(asking.getresponse().read(_ANSWER_BYTES))
        found = Digest.of(ssl.PEM_cert_to_DER_cert(pem)) if pem else None
    except (OSError, http.client.HTTPException) as error:
        raise Problem(
            f"cannot reach {url}: {error}", hint="is sf serve running there?", code=UNREACHABLE
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Problem(f"{url} shows no authority's certificate", code=AUTH) from error
    finally:
        asking.close()
    if found != wanted:
        shown = f"that of {found}" if found else "none of its own"
        hint = "is it the right server? sf serve prints the fingerprint when it starts"
        raise Problem(f"{url} shows another authority: {shown}", hint=hint, code=AUTH)
    return str(pem)


@context.add(examples="sf context ls")
def ls(form: str) -> None:
    """List the servers that you logged in to."""
    url, namespace, _ = access(settings())
    rows = [
        {
            "name": n,
            "url": c["url"],
            "namespace": c["namespace"],
            "used": (url, namespace) == (c["url"], c["namespace"]),
        }
        for n, c in contexts(settings()).items()
    ]
    columns = (
        ("name", "name"),
        ("url", "url"),
        ("as", "namespace"),
        ("", lambda c: "in use" if c["used"] else ""),
    )
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
    say(f"{name} is out of {keep_context(name, None)}")
