// What is marked data-live is fetched again when the server says that something happened, and now and then.
let asked = 0, busy = false;
async function refresh() {
  if (busy || document.hidden) { asked = 1; return; }
  busy = true;
  asked = 0;
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (answer.redirected) { location.assign(answer.url); return; }
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(part.id);
      if (!answer.ok || !now || now.innerHTML === part.innerHTML) continue;
      const held = part.contains(document.activeElement) ? document.activeElement : null;
      const same = held && [...part.querySelectorAll("a, button, input, select, [tabindex]")].indexOf(held);
      part.replaceChildren(...now.childNodes);
      if (!held) continue;
      const link = held.getAttribute("href"), all = [...part.querySelectorAll("a, button, input, select, [tabindex]")];
      (all.find((one) => link && one.getAttribute("href") === link) || all[same] || part).focus({ preventScroll: true });
    }
  } catch { /* the server is away: the next one tells */ } finally { busy = false; }
}
let soon;
const later = () => { clearTimeout(soon); soon = setTimeout(refresh, 300); };
if (document.querySelector("[data-live]")) {
  const news = new EventSource("/ui/events");
  news.onmessage = news.onopen = later; // what happened before it was open was not said
  setInterval(refresh, 15000);
  document.addEventListener("visibilitychange", () => { if (asked) later(); });
}
