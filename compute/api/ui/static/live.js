// What is marked data-live is fetched again when the server says that something happened, and now and then.
let busy = false;
const leads = (one) => one.tagName + (one.getAttribute("href") ?? one.form?.getAttribute("action")) + (one.tagName === "PRE" || one.textContent);
async function refresh() {
  if (document.hidden) return;
  if (busy) { later(); return; }
  busy = true;
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (answer.redirected) { location.assign(answer.url); return; }
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(part.id);
      if (!answer.ok || !now || now.innerHTML === part.innerHTML) continue;
      const held = part.contains(document.activeElement) && document.activeElement, top = part.querySelector("pre")?.scrollTop;
      part.replaceChildren(...now.childNodes);
      if (top) part.querySelector("pre").scrollTop = top;
      // The focus goes to what does the same as before, or nowhere: never to another button.
      if (held) [...part.querySelectorAll("a, button, [tabindex]")].find((one) => leads(one) === leads(held))?.focus({ preventScroll: true });
    }
  } catch { /* the server is away: the next one tells */ } finally { busy = false; }
}
let soon;
const later = () => { clearTimeout(soon); soon = setTimeout(refresh, 300); };
if (document.querySelector("[data-live]")) {
  let news;
  const listen = () => { // a page that nobody sees keeps no connection: a browser has six for a server
    if (document.hidden) { news?.close(); news = null; }
    else if (!news) {
      news = new EventSource("/ui/events");
      news.onmessage = news.onopen = later; // what happened before it was open was not said
    }
  };
  listen();
  setInterval(refresh, 15000);
  document.addEventListener("visibilitychange", listen);
}
