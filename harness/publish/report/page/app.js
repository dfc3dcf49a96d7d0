// Which view is shown, and the keys that work everywhere. The address behind # says all of it, so a view can be linked.
"use strict";

const main = document.getElementById("main");
const help = document.getElementById("help");
let shown = null;
let drawn = 0;

function place() {
  const [name, query] = location.hash.replace(/^#\/?/, "").split("?");
  const view = report.views.find((one) => one.name === name) || report.views[0];
  return { view, params: new URLSearchParams(query || "") };
}

async function show() {
  const { view, params } = place();
  const turn = (drawn += 1);
  const moved = shown !== null && shown !== view;
  shown = view;
  document.title = `${view.title} · Personalization report`;
  for (const anchor of document.querySelectorAll("#nav a")) {
    if (anchor.dataset.view === view.name) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
  const fresh = h("div", { class: `view ${view.name}` });
  const replace = (state) => history.replaceState(null, "", link(view.name, state));
  try {
    await view.show(fresh, params, replace);
  } catch (error) {
    fresh.replaceChildren(h("p", { class: "warning" }, error.message));
  }
  if (turn !== drawn) return; // the reader has gone on
  main.replaceChildren(fresh);
  if (moved) window.scrollTo(0, 0);
  main.dataset.view = view.name;
}

function toggleHelp() {
  if (help.open) return help.close();
  const views = report.views.filter((view) => !view.hidden);
  const keys = [
    [`1 – ${views.length}`, "the views: " + views.map((view) => view.title).join(", ")],
    ["/", "the first filter"],
    ["Esc", "out of a field, or close this"],
    ["?", "this list"],
    ...views.filter((view) => view.keys).map((view) => [view.title, view.keys]),
  ];
  help.replaceChildren(
    h("h2", {}, "Keys"),
    h("dl", {}, keys.map(([key, what]) => [h("dt", {}, key), h("dd", {}, what)])),
    h("form", { method: "dialog" }, h("button", {}, "Close")),
  );
  help.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const typing = event.target.matches("input, select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const views = report.views.filter((view) => !view.hidden);
  const number = Number(event.key);
  let done = true;
  if (event.key === "?") toggleHelp();
  else if (number >= 1 && number <= views.length) location.hash = link(views[number - 1].name);
  else if (event.key === "/") (main.querySelector("input[type=search]") || main.querySelector("select") || main).focus();
  else done = Boolean(shown && shown.key && shown.key(event));
  if (done) event.preventDefault();
});

document.getElementById("help-button").addEventListener("click", toggleHelp);
document.getElementById("nav").append(
  ...report.views
    .filter((view) => !view.hidden)
    .map((view) => h("a", { href: link(view.name), "data-view": view.name }, view.title)),
);
window.addEventListener("hashchange", show);
show();
