// The same user and query, every method's answer: beside the reference, its scores and what differs word by word.
"use strict";

report.views.push({
  name: "samples",
  title: "Side by side",
  keys: "j, k: next, previous item; /: search",
  key(event) {
    const by = MOVES[event.key];
    return by && (event.key.length === 1 || event.target.closest("#items")) && this.move && this.move(by);
  },

  async show(main, params, replace) {
    const { groups, runs } = report.data.get("runs");
    if (!groups.length) return add(main, h("p", { class: "empty" }, "No record here has kept its samples."));
    const group = groups.find((one) => one.name === params.get("group")) || groups[0];
    const asked = params.get("with") || "";
    const state = {
      group: group.name,
      item: params.get("item") || "",
      with: group.runs.includes(asked) ? asked : "",
      diff: params.get("diff") || "",
      order: params.get("order") || "",
      find: params.get("find") || "",
      least: params.get("least") || "",
    };
    const chosen = new Set(shownRuns(group, state.with));
    const texts = await report.load(`items/${group.name}`);
    let ids = [];

    const list = h("ul", { id: "items", "aria-label": "Items", onclick: (event) => {
      const button = event.target.closest("button");
      if (button) open(button.dataset.id);
    } });
    const count = h("p", { class: "note", id: "count" });
    const item = h("article", { id: "item", "aria-live": "off" });
    const change = (name) => (value) => {
      state[name] = value;
      replace(state);
      redraw();
    };
    const orders = [["", "as in the data"], ["differ", "where methods differ most"], ["worst", "worst for all first"], ["long", "longest history first"], ["short", "shortest history first"], ...(state.with || baseline() ? [["gain", "best gain over plain first"]] : [])];

    add(
      main,
      h(
        "form",
        { class: "filters", onsubmit: (event) => event.preventDefault() },
        select("Task", groups.map((one) => [one.name, one.title]), group.name, (name) => (location.hash = link("samples", { group: name }))),
        select("Order", orders, state.order, change("order")),
        select("Mark words against", [["", "the reference"], ...group.runs.map((run) => [run, nameOf(run)])], state.diff, change("diff")),
        h("label", {}, h("span", {}, "History of at least"), h("input", {
          type: "number", min: "0", value: state.least, placeholder: "0", title: "Only users with as many items of history",
          oninput: calmly((event) => change("least")(event.target.value)),
        })),
        h("label", {}, h("span", {}, "Search"), h("input", {
          type: "search", value: state.find, placeholder: "user, query or answer", oninput: calmly((event) => change("find")(event.target.value)),
        })),
      ),
      h("details", { class: "runs" }, h("summary", {}, h("span", { id: "chosen" })), runBoxes()),
      texts.why_no_text ? h("p", { class: "warning" }, `Queries and histories are not shown: ${texts.why_no_text}`) : null,
      h("div", { class: "sides" }, h("div", { class: "list" }, count, list), item),
    );
    this.move = (by) => {
      const at = ids.indexOf(state.item);
      const next = ids[Math.max(0, Math.min(ids.length - 1, at + by))];
      if (next !== undefined) open(next);
      return true;
    };
    await redraw();

    function nameOf(run) {
      const several = new Set(group.runs.map((one) => runs[one].model)).size > 1;
      return (several ? `${runs[run].model} · ` : "") + runLabel(runs[run]);
    }

    function baseline() {
      return group.runs.find((run) => runs[run].method === "plain");
    }

    function runBoxes() {
      const box = (run) =>
        h("label", {}, h("input", {
          type: "checkbox", checked: chosen.has(run), value: run,
          onchange: (event) => {
            if (event.target.checked) chosen.add(run);
            else chosen.delete(run);
            redraw();
          },
        }), " ", nameOf(run));
      const all = h("button", { type: "button", onclick: (event) => {
        group.runs.forEach((run) => chosen.add(run));
        event.target.closest("details").querySelectorAll("input").forEach((input) => (input.checked = true));
        redraw();
      } }, "all");
      return h("fieldset", {}, h("legend", { class: "unseen" }, "Runs shown"), group.runs.map(box), all);
    }

    async function redraw() {
      main.querySelector("#chosen").textContent = `${chosen.size} of ${group.runs.length} runs shown`;
      const wanted = [...group.runs.filter((run) => chosen.has(run)), ...(state.diff && !chosen.has(state.diff) ? [state.diff] : [])];
      await Promise.all(wanted.map((run) => report.load(`samples/${run}`)));
      const shown = rows();
      ids = ordered(shown);
      const words = state.find.toLowerCase();
      if (Number(state.least) > 0) ids = ids.filter((id) => history(id) >= Number(state.least));
      if (words) ids = ids.filter((id) => searchable(id, shown).includes(words));
      count.textContent = `${ids.length} of ${Object.keys(texts.items).length} items`;
      list.replaceChildren(...ids.map((id) => listItem(id, shown)));
      open(ids.includes(state.item) ? state.item : ids[0], false);
    }

    function rows() {
      return group.runs.filter((run) => chosen.has(run)).map((run) => ({ run, ...report.data.get(`samples/${run}`) }));
    }

    /** Items of the user's own history; 0 where it is not known. */
    function history(id) {
      return (texts.items[id].history_size || {}).none || 0;
    }

    function score(row, id) {
      const at = row.metrics.indexOf(group.metrics[0].name);
      return at >= 0 && row.samples[id] ? row.samples[id].scores[at] ?? null : null;
    }

    function ordered(shown) {
      const every = Object.keys(texts.items);
      const way = { long: -1, short: 1 }[state.order];
      if (way) return every.sort((a, b) => way * (history(a) - history(b)));
      if (!group.metrics.length || !state.order) return every;
      const sign = group.metrics[0].higher_is_better === false ? -1 : 1;
      const base = shown.find((row) => row.run === baseline());
      const weight = (id) => {
        const scores = shown.map((row) => score(row, id)).filter((value) => value !== null);
        if (!scores.length) return -Infinity;
        if (state.order === "differ") return Math.max(...scores) - Math.min(...scores);
        if (state.order === "worst") return (-sign * scores.reduce((sum, value) => sum + value, 0)) / scores.length;
        const other = shown.find((row) => row.run === state.with);
        const from = base ? score(base, id) : null;
        const to = other ? score(other, id) : sign * Math.max(...scores.map((value) => sign * value));
        return from === null || to === null ? -Infinity : sign * (to - from);
      };
      const weights = new Map(every.map((id) => [id, weight(id)]));
      return every.sort((a, b) => weights.get(b) - weights.get(a) || 0);
    }

    function searchable(id, shown) {
      const about = texts.items[id];
      const answers = shown.map((row) => (row.samples[id] && row.samples[id].response) || "");
      return [id, about.user, about.query || "", ...about.targets, ...answers].join("\n").toLowerCase();
    }

    function listItem(id, shown) {
      const scores = shown.map((row) => score(row, id)).filter((value) => value !== null);
      const range = scores.length ? [Math.min(...scores), Math.max(...scores)] : [];
      const spread = !range.length ? "" : range[0] === range[1] ? number(range[0], 2) : `${number(range[0], 2)} – ${number(range[1], 2)}`;
      return h(
        "li",
        {},
        h("button", { type: "button", "data-id": id, tabindex: "-1" },
          h("span", { class: "of" }, texts.items[id].targets.join(" | ") || id),
          h("small", {}, `user ${texts.items[id].user}`, history(id) ? ` · history ${history(id)}` : "", spread ? ` · ${spread}` : ""),
        ),
      );
    }

    function open(id, focus = true) {
      for (const button of list.querySelectorAll("[aria-current]")) button.removeAttribute("aria-current");
      if (id === undefined) return item.replaceChildren(h("p", { class: "empty" }, "No item fits this search."));
      state.item = id;
      replace(state);
      const button = list.querySelector(`button[data-id="${CSS.escape(id)}"]`);
      for (const other of list.querySelectorAll('button[tabindex="0"]')) other.tabIndex = -1;
      button.setAttribute("aria-current", "true");
      button.tabIndex = 0;
      if (focus) {
        button.focus({ preventScroll: true });
        button.scrollIntoView({ block: "nearest" });
      }
      item.replaceChildren(...itemParts(id));
    }

    function itemParts(id) {
      const about = texts.items[id];
      const shown = rows();
      const against = state.diff ? report.data.get(`samples/${state.diff}`).samples[id]?.response || "" : about.targets[0] || "";
      const best = group.metrics.map((metric) => bestOf(metric, shown.map((row) => value(row, id, metric.name))));
      const metrics = group.metrics.filter((metric) => shown.some((row) => value(row, id, metric.name) !== null));
      return [
        h("h2", {}, `Item ${id}`, h("small", {}, ` user ${about.user}`)),
        about.query ? h("blockquote", {}, about.query) : null,
        Object.entries(about.history || {}).map(([control, records]) => historyPart(control, records, about.history_size[control])),
        h(
          "div",
          { class: "wide" },
          h(
            "table",
            { class: "answers" },
            h("thead", {}, h("tr", {},
              [["method"], ["answer"], ["history", "Items of history in the prompt"], ["tokens", "Read + written"]].map(([head, title]) => h("th", { scope: "col", title }, head)),
              metrics.map((metric) => h("th", { scope: "col", title: meaning(metric.title) }, metric.title.replaceAll("_", " "), { true: " ↑", false: " ↓", null: "" }[metric.higher_is_better])),
            )),
            h(
              "tbody",
              {},
              h("tr", { class: "reference" }, h("th", { scope: "row" }, "reference"), h("td", { class: "text" }, about.targets.join(" | ") || DASH), h("td"), h("td"), metrics.map(() => h("td"))),
              shown.map((row) => {
                const sample = row.samples[id];
                return h(
                  "tr",
                  { class: row.run === state.with ? "followed" : null },
                  h("th", { scope: "row" }, h("a", { href: link("run", { run: row.run }) }, nameOf(row.run))),
                  h("td", { class: "text" }, answer(sample, against), sample ? remarks(sample).map((text) => h("small", {}, text)) : null),
                  h("td", { class: "number" }, sample ? String(sample.history_items) : DASH),
                  h("td", { class: "number" }, sample ? `${sample.prompt_tokens} + ${sample.new_tokens}` : DASH),
                  metrics.map((metric) => {
                    const got = value(row, id, metric.name);
                    const top = best[group.metrics.indexOf(metric)] === got && got !== null;
                    return h("td", { class: "number" }, h(top ? "strong" : "span", {}, number(got, 3)));
                  }),
                );
              }),
            ),
          ),
        ),
        h("p", { class: "note" }, h("ins", {}, "added"), " and ", h("del", {}, "missing"), ` words, against ${state.diff ? nameOf(state.diff) : "the reference"}.`),
        legend(metrics.map((metric) => metric.title)),
      ].flat().filter(Boolean);
    }

    function value(row, id, name) {
      const at = row.metrics.indexOf(name);
      return at >= 0 && row.samples[id] ? row.samples[id].scores[at] ?? null : null;
    }
  },
});

/** Runs shown at first: all of a few, of many one a method, with what an option of theirs differs in left out. */
function shownRuns(group, followed) {
  const { runs } = report.data.get("runs");
  if (group.runs.length <= 12) return group.runs;
  const usual = group.runs.filter((run) => run === followed || runs[run].label === runs[run].method);
  return usual.length ? usual : group.runs.slice(0, 12);
}

function bestOf(metric, values) {
  const known = values.filter((value) => value !== null);
  if (metric.higher_is_better === null || known.length < 2 || new Set(known).size < 2) return null;
  return metric.higher_is_better ? Math.max(...known) : Math.min(...known);
}

function historyPart(control, records, size) {
  const whose = { none: "this user's", wrong_user: "another user's (the control's)", shuffled: "this user's, shuffled (the control's)" }[control];
  return h(
    "details",
    { class: "history", open: control === "none" },
    h("summary", {}, `${records.length} of ${size} items of ${whose} history, nearest to the query`),
    h("ol", {}, records.map((fields) => h("li", {}, fields.map(([name, text]) => [h("b", {}, name), " ", text, " "])))),
  );
}

/** What a reader of the answer must know. */
function remarks(sample) {
  const said = [];
  if (sample.finish === "length") said.push("cut at the token limit");
  if (sample.parsed === null && !sample.error) said.push("not parsed");
  for (const [question, text] of Object.entries(sample.said)) said.push(`judge on ${question}: ${text}`);
  return said;
}

function answer(sample, against) {
  if (!sample) return h("em", {}, "not asked");
  if (sample.error !== null) return h("em", { class: "failed" }, `failed: ${sample.error}`);
  if (!against) return h("p", {}, sample.response);
  const parts = wordDiff(against, sample.response || "");
  return h("p", {}, parts.flatMap(([kind, words], at) => [at ? " " : null, kind === "same" ? words : h(kind, {}, words)]));
}

const MOST_WORDS = 600;

/** [["same" | "ins" | "del", words], ...] that lead from one text to the other: a longest common subsequence of words. */
function wordDiff(from, to) {
  const [a, b] = [from, to].map((text) => text.split(/\s+/).filter(Boolean));
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return [["same", to]];
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1)
    for (let j = b.length - 1; j >= 0; j -= 1)
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const parts = [];
  const add = (kind, word) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === kind) last[1] += ` ${word}`;
    else parts.push([kind, word]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add("same", b[j]);
      i += 1;
      j += 1;
    } else if (j === b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) {
      add("del", a[i]);
      i += 1;
    } else {
      add("ins", b[j]);
      j += 1;
    }
  }
  return parts;
}
