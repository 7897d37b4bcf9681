"""The pages at /ui as people have them: in Chromium, by keyboard, on a phone, without scripts, and attacked."""

import asyncio
import http.cookiejar
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from compute.api.app import build
from tests.api_server import Running, running
from tests.browser import Browser, browser
from tests.system.machine import within

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("ui") / "state") as found:
        found.network("lan")
        found.network("back", "10.43.0.0/24")
        found.instance("web", network=[{"network_uuid": "lan"}, {"network_uuid": "back"}])
        found.wait_for("/instances/web", "created")
        found.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "shop-key"})
        link = found.get("/instances/web")["interfaces"][0]["uuid"]
        assert found.call("POST", "/rules", {"name": "http", "allow": ["tcp:80,443"]}).status == 200
        assert found.call("POST", f"/interfaces/{link}/rules", {"rules": "http"}).status == 200
        assert found.call("POST", f"/interfaces/{link}/publish", {"ports": "8080:80"}).status == 200
        yield found


class Visitor:
    """A browser without scripts: cookies, forms, and nothing else."""

    def __init__(self, url: str) -> None:
        self.url, self.jar = url, http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar))

    def ask(self, path: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str, str]:
        """Status, where it led, the page."""
        told = {} if form is None else {"Origin": self.url}
        data = None if form is None else urllib.parse.urlencode(form).encode()
        request = urllib.request.Request(self.url + path, data, told | headers)
        try:
            with self._opener.open(request, timeout=30) as answer:
                return answer.status, answer.url.removeprefix(self.url), answer.read().decode()
        except urllib.error.HTTPError as err:
            return err.code, path, err.read().decode()

    def login(self, namespace: str, key: str) -> "Visitor":
        status, where, _ = self.ask("/ui/login", {"namespace": namespace, "key": key})
        assert (status, where) == (200, "/ui/instances")
        return self

    def send(self, path: str, **form: str) -> tuple[int, str, str]:
        """A form of this session."""
        word = re.search(r'name="word" value="([0-9a-f]+)"', self.ask("/ui/nodes")[2])
        assert word
        return self.ask(path, form | {"word": word[1]})


@pytest.fixture
def admin(server: Running) -> Visitor:
    return Visitor(server.url).login("system", server.key)


def test_without_a_key_every_page_is_the_way_to_log_in(server: Running) -> None:
    nobody = Visitor(server.url)
    for page in ("instances", "instances/new", "images", "networks", "nodes", "quotas"):
        assert nobody.ask(f"/ui/{page}")[:2] == (200, "/ui/login")
    assert nobody.ask("/ui/events")[0] == 401
    status, _, page = nobody.ask("/ui/login", {"namespace": "system", "key": "wrong"})
    assert status == 401 and "wrong key" in page and not list(nobody.jar)
    nobody.jar.set_cookie(cookie(server.url, "nonsense"))
    assert nobody.ask("/ui/instances")[1] == "/ui/login"


def cookie(url: str, value: str) -> http.cookiejar.Cookie:
    host = urllib.parse.urlsplit(url).hostname or ""
    rest: dict[str, Any] = {
        "comment": None,
        "comment_url": None,
        "rest": {},
        "expires": None,
        "discard": True,
    }
    at: dict[str, Any] = {"domain": host, "domain_specified": False, "domain_initial_dot": False}
    at |= {"path": "/ui", "path_specified": True, "port": None, "port_specified": False, "secure": False}
    return http.cookiejar.Cookie(0, "sf-session", value, **at, **rest)


def test_the_session_is_in_a_cookie_that_no_script_and_no_other_site_gets(
    server: Running, admin: Visitor
) -> None:
    (kept,) = admin.jar
    assert (kept.path, kept.get_nonstandard_attr("SameSite")) == ("/ui", "strict")
    assert kept.has_nonstandard_attr("HttpOnly") and not kept.secure  # plain HTTP on loopback
    with urllib.request.urlopen(f"{server.url}/ui/login") as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (
        server.call("GET", "/instances", namespace="", headers={"Cookie": f"sf-session={kept.value}"}).status
        == 401
    )
    assert admin.send("/ui/logout")[1] == "/ui/login"
    assert admin.ask("/ui/instances")[1] == "/ui/login"


def test_no_key_is_asked_for_over_plain_http_from_elsewhere_and_the_cookie_is_secure_over_tls(
    server: Running,
) -> None:
    application = build(server.services)

    async def ask(url: str, **form: str) -> httpx.Response:
        way = httpx.ASGITransport(application, client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=way, base_url=url, headers={"Origin": url}) as client:
            return await client.request("POST" if form else "GET", "/ui/login", data=form)

    for form in ({}, {"namespace": "system", "key": server.key}):
        refused = asyncio.run(ask("http://sf.example", **form))
        assert refused.status_code == 403 and "plain HTTP" in refused.text and "<form" not in refused.text
        assert "set-cookie" not in refused.headers
    welcome = asyncio.run(ask("https://sf.example", namespace="system", key=server.key))
    assert welcome.status_code == 303
    assert {"Secure", "HttpOnly", "SameSite=strict"} <= set(welcome.headers["set-cookie"].split("; "))


def test_no_form_of_another_page_is_taken(server: Running, admin: Visitor) -> None:
    off = "/ui/instances/web/poweroff"
    word = re.search(r'name="word" value="([0-9a-f]+)"', admin.ask("/ui/nodes")[2])
    assert word
    good = {"word": word[1]}
    others = Visitor(server.url).login("shop", "shop-key")
    for form, origin in (
        ({}, server.url),
        ({"word": "0" * 64}, server.url),
        (good, "http://evil.example"),
        (good, "null"),
        (good, ""),
    ):
        status, _, page = admin.ask(off, form, Origin=origin)
        assert status == 403, page
    assert others.ask(off, good)[0] == 403
    assert (
        Visitor(server.url).ask(
            "/ui/login", {"namespace": "system", "key": server.key}, Origin="http://evil"
        )[0]
        == 403
    )
    assert server.get("/instances/web")["power"] == "on"


def test_a_tenant_sees_and_does_no_more_than_by_the_api(server: Running) -> None:
    shop = Visitor(server.url).login("shop", "shop-key")
    uuid = server.get("/instances/web")["uuid"]
    assert ">web<" not in shop.ask("/ui/instances")[2] and ">lan<" not in shop.ask("/ui/networks")[2]
    for path in ("", "/console", "/confirm?act=delete"):
        assert shop.ask(f"/ui/instances/{uuid}{path}")[0] == 404
    for act in ("delete", "poweroff", "snapshot", "schedule"):
        assert (
            shop.send(f"/ui/instances/{uuid}/{act}", **({"every": "3600"} if act == "schedule" else {}))[0]
            == 404
        )
    assert shop.ask("/ui/quotas?namespace=system")[0] == 404
    assert shop.send("/ui/instances/..%2F..%2Fadmin/poweron")[0] == 404
    assert shop.send("/ui/instances/web/nodes")[0] == 404
    assert server.get("/instances/web")["state"] == "created"


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_what_guests_and_tenants_write_is_text(server: Running, admin: Visitor) -> None:
    server.call("POST", "/instances/web/metadata", {"key": EVIL, "value": EVIL})
    server.agent.console_data = (
        b"\x1b[2J\x1b]0;title\x07\x1b[31m" + EVIL.encode() + b"</pre><script>\r\n\xff\x00end\n"
    )
    server.agent.broken.add("bad")
    uuid = server.get("/instances/web")["uuid"]
    page = admin.ask(f"/ui/instances/{uuid}/console")[2]
    text = page.partition('wrote">')[2].partition("</pre>")[0]
    assert (
        text == "&lt;img src=x onerror=alert(1)&gt;&lt;/pre&gt;&lt;script&gt;\n\N{REPLACEMENT CHARACTER}end\n"
    )
    pages = [page, admin.ask(f"/ui/instances/{uuid}/confirm?act=restore&image={urllib.parse.quote(EVIL)}")[2]]
    pages.append(
        admin.send("/ui/instances/new", name=EVIL, image=EVIL, cpus="1", memory="256", ssh_key=EVIL)[2]
    )
    pages += [
        admin.ask(f"/ui/{name}")[2]
        for name in (f"instances/{uuid}", f"instances/{urllib.parse.quote(EVIL)}", "networks", "images")
    ]
    for page in pages:
        found = Elements(page)
        assert "img" not in found.tags and not {a for a in found.attributes if a.startswith("on")}
        assert page.count("<script") == ("/ui/static/live.js" in page)
        assert "style" not in found.attributes and "style" not in found.tags
    assert "name is" in pages[2] or "not a name" in pages[2] or 'role="alert"' in pages[2]
    server.agent.console_data = b"SF-GUEST-READY\n"


def test_networks_are_drawn_with_what_leads_in_and_who_is_let_in_and_show_what_is_wrong(
    server: Running, admin: Visitor
) -> None:
    page = admin.ask("/ui/networks")[2]
    picture, _, below = page.partition("</svg>")
    assert "web: rules http" in picture and "← 8080:80" in picture
    assert picture.count('class="gate"') == 1, "the other interface is open"
    assert "<code>tcp:80,443</code>" in below
    where = re.search(r'href="(/ui/networks/[0-9a-f-]{36})">lan<', below)
    assert where
    status, _, page = admin.ask(where[1])
    assert status == 200 and "the bridge is missing" in page and "<code>allow it</code>" in page
    assert ">x<" not in page, "another network's"
    shop = Visitor(server.url).login("shop", "shop-key")
    assert shop.ask(where[1])[0] in (403, 404)


def test_all_of_it_works_without_scripts(server: Running, admin: Visitor) -> None:
    lan = server.get("/networks/lan")["uuid"]
    form = {"name": "plain", "image": "debian:12", "cpus": "1", "memory": "256", "disk": "", "network": lan}
    status, where, page = admin.send("/ui/instances/new", **form)
    assert status == 200 and where.startswith("/ui/instances/"), page
    uuid = where.rpartition("/")[2]
    found = server.wait_for(f"/instances/{uuid}", "created")
    assert found["interfaces"][0]["ipv4"] in admin.ask(where)[2]
    for act, power in (("poweroff", "off"), ("poweron", "on"), ("pause", "paused"), ("unpause", "on")):
        assert admin.send(f"{where}/{act}")[:2] == (200, where)
        within(20, lambda power=power: server.get(f"/instances/{uuid}")["power_state"] == power, act)
    assert 'name="timeout_s" value="60"' in admin.ask(where)[2]
    assert admin.send(f"{where}/poweroff", timeout_s="60")[:2] == (200, where)
    assert admin.send(f"{where}/poweroff", timeout_s="long")[0] == 400
    assert admin.send(f"{where}/schedule", every="86400", daily="7")[0] == 200
    assert "every 24.0 hours" in admin.ask(where)[2]
    assert admin.send(f"{where}/unschedule")[0] == 200 and server.get("/backups") == []
    assert "poweroff asked for" in admin.ask(where)[2]
    status, _, page = admin.send("/ui/instances/new", **form)
    assert status == 409 and 'role="alert"' in page and 'value="debian:12"' in page
    assert admin.send(f"{where}/delete")[:2] == (200, "/ui/instances")
    server.wait_for(f"/instances/{uuid}", "deleted")


@pytest.fixture(scope="module")
def tab(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def enter(tab: Browser, server: Running) -> None:
    tab("Network.clearBrowserCookies")
    tab.go(f"{server.url}/ui/instances", lands=f"{server.url}/ui/login")
    tab.tab_to("[name=key]")
    tab.type(server.key)
    tab.press("Enter")
    tab.at(f"{server.url}/ui/instances")


def test_by_keyboard_alone_an_instance_is_made_and_deleted_and_the_page_follows(
    tab: Browser, server: Running
) -> None:
    tab.size(1200, 800)
    enter(tab, server)
    tab.tab_to("a[href='/ui/instances/new']")
    tab.press("Enter")
    tab.at(f"{server.url}/ui/instances/new")
    tab.sees("document.activeElement.name == 'name'")
    tab.type("typed")
    tab.tab_to("[name=image]")
    tab.type("debian:12")
    tab.tab_to("main button")
    tab.press("Enter")
    tab.sees("document.querySelector('h1').innerText == 'typed'")
    tab.sees("document.querySelector('#about .state').innerText == 'on'")  # nobody loaded it again
    tab.tab_to("[action$=poweroff]:not(:has([name=timeout_s])) button")
    tab.press("Enter")
    tab.sees("document.querySelector('#about .state').innerText == 'off'")
    tab.tab_to("[action$=snapshot] button")
    server.call("POST", "/instances/typed/poweron")
    tab.sees("document.querySelector('#about .state').innerText == 'on'")
    assert tab.js("document.activeElement.innerText") == "Snapshot"  # where it was, though all around is new
    tab.tab_to("a[href$='act=delete']")
    tab.press("Enter")
    tab.sees("document.querySelector('h1').innerText == 'Delete typed?'")
    tab.tab_to("main button")
    tab.press("Enter")
    tab.at(f"{server.url}/ui/instances")
    tab.sees("!document.body.innerText.includes('typed')")
    assert tab.violations == []


def test_no_page_has_serious_findings_of_axe_and_none_is_wider_than_a_phone(
    tab: Browser, server: Running
) -> None:
    axe = Path(os.environ["SF_AXE"]) if "SF_AXE" in os.environ else files("axe_core_python") / "axe.min.js"
    pictures = os.environ.get("SF_PICTURES", "")
    enter(tab, server)
    server.count()
    server.count()
    uuid = server.get("/instances/web")["uuid"]
    pages = "instances instances/new images networks nodes quotas login instances/nowhere".split()
    pages += [f"networks/{server.get('/networks/lan')['uuid']}"]
    pages += [f"instances/{uuid}", f"instances/{uuid}/console", f"instances/{uuid}/confirm?act=delete"]
    for page in pages:
        for width, scheme in ((390, "light"), (1200, "dark")):
            tab.size(width, 844)
            tab("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            tab.go(f"{server.url}/ui/{page}")
            assert tab.js("document.documentElement.scrollWidth") <= width, page
            if pictures:
                name = re.sub("[/?=]", "-", page).replace(uuid, "web")
                tab.picture(Path(pictures) / f"{name}-{width}.png")
            tab("Page.setBypassCSP", enabled=True)
            tab.js(f"(() => {{ {axe.read_text()} }})()")
            found = json.loads(tab.js("axe.run().then((r) => JSON.stringify(r.violations))"))
            tab("Page.setBypassCSP", enabled=False)
            bad = [
                (f["id"], [n["html"][:300] for n in f["nodes"]])
                for f in found
                if f["impact"] in ("serious", "critical")
            ]
            assert bad == [], (page, width)
    tab("Emulation.setEmulatedMedia", features=[])
    assert [said for said in tab.violations if "404" not in said] == []
