// Rankings, one table for the runs of a model on the same samples. Sorting orders the rows of every table alike.
"use strict";

report.views.push({
  name: "leaderboard",
  title: "Leaderboard",
  keys: "j, k: next, previous row; Enter: the run",
  key(event) {
    const by = MOVES[event.key];
    return by && step(".ranking tbody a.method", by);
  },

  show(main, params, replace) {
    const { rankings } = report.data.get("runs");
    const names = (field) => [...new Set(rankings.map((ranking) => ranking[field]))];
    const state = {
      model: params.get("model") || "",
      task: params.get("task") || "",
      method: params.get("method") || "",
      controls: params.get("controls") || "",
      variants: params.get("variants") || "",
      sort: params.get("sort") || "",
    };
    const tables = h("div", { id: "rankings" });
    const change = (name) => (value) => {
      state[name] = value;
      replace(state);
      draw();
    };
    const sortBy = (column) => {
      const [now, direction] = state.sort.split(" ");
      change("sort")(now !== column ? column : direction ? "" : `${column} reversed`);
      const shown = state.sort ? `sorted by ${state.sort.replace(" ", ", ")}` : "sorted by rank";
      say(shown);
      const header = [...tables.querySelectorAll("th button")].find((button) => button.dataset.column === column);
      if (header) header.focus();
    };

    add(
      main,
      h(
        "form",
        { class: "filters", onsubmit: (event) => event.preventDefault() },
        select("Model", [["", "all"], ...names("model").map((name) => [name, name])], state.model, change("model")),
        select("Task", [["", "all"], ...names("task").map((name) => [name, name])], state.task, change("task")),
        h("label", {}, h("span", {}, "Method"), h("input", {
          type: "search", value: state.method, placeholder: "dps, -control",
          title: "Methods whose name has one of these words; -word leaves those that have it out",
          oninput: calmly((event) => change("method")(event.target.value)),
        })),
        select("Controls", [["", "shown"], ["no", "hidden"]], state.controls, change("controls")),
        select("Sweeps and ablations", [["", "folded"], ["shown", "shown"]], state.variants, change("variants")),
      ),
      tables,
    );
    draw();

    function draw() {
      const words = state.method.toLowerCase().split(/[\s,]+/).filter(Boolean);
      const without = words.filter((word) => word[0] === "-" && word[1]).map((word) => word.slice(1));
      const any = words.filter((word) => word[0] !== "-");
      const wanted = (ranking) => (row) => {
        const own = ranking.control === "none" ? "" : ` control ${ranking.control}`;
        const label = report.data.get("runs").runs[row.run].label.toLowerCase() + own;
        if (row.variant && state.variants !== "shown" && !any.length) return false;
        return (!any.length || any.some((word) => label.includes(word))) && !without.some((word) => label.includes(word));
      };
      const shown = rankings
        .filter((ranking) => [ranking.model, ""].includes(state.model) && [ranking.task, ""].includes(state.task))
        .filter((ranking) => state.controls !== "no" || ranking.control === "none")
        .map((ranking) => ({ ...ranking, rows: ranking.rows.filter(wanted(ranking)) }))
        .filter((ranking) => ranking.rows.length);
      const sections = shown.map((ranking) => rankingTable(ranking, state.sort, sortBy));
      tables.replaceChildren(...(shown.length > 3 ? [contents("Rankings", sections)] : []), ...sections, legend(columnTitles(sections)));
      if (!shown.length) tables.append(h("p", { class: "empty" }, "No run fits these filters."));
    }
  },
});

function columnTitles(sections) {
  return sections.flatMap((section) => [...section.querySelectorAll("th button")].map((button) => button.textContent));
}

/** Columns of a ranking: [name, title, value of a row to sort by, cell]. Those that no row fills are left out. */
function rankingColumns(ranking) {
  const { runs } = report.data.get("runs");
  const metric = (row, name) => runs[row.run].metrics[name] || [null, null, null, 0];
  const scale = intervalScale(ranking.rows.map((row) => metric(row, ranking.metric)));
  const arrow = ranking.higher_is_better ? "↑" : "↓";
  const plain = (value, text) => [value, h("td", { class: "number" }, text)];
  const columns = [
    ["place", "#", (row) => plain(row.place, row.place === null ? DASH : String(row.place))],
    ["method", "method", (row) => [runs[row.run].label, h("td", {}, methodCell(row.run))]],
    ["score", `${ranking.metric} ${arrow}`, (row) => [metric(row, ranking.metric)[0], scoreCell(metric(row, ranking.metric))]],
    ["interval", "95 % interval", (row) => [metric(row, ranking.metric)[1], h("td", { class: "of-interval" }, intervalBar(metric(row, ranking.metric), scale))]],
    ["n", "n", (row) => plain(metric(row, ranking.metric)[3], String(metric(row, ranking.metric)[3]))],
    ["gain", "gain over another user's history", (row) => plain(row.gain, row.gain === null ? DASH : `${row.gain < 0 ? "" : "+"}${number(row.gain)}`)],
    ...ranking.others.map((name) => [name, name.replaceAll("_", " "), (row) => plain(metric(row, name)[0], number(metric(row, name)[0]))]),
    ["tokens", "tokens", (row) => plain(row.tokens, ratio(row.tokens))],
    ["operations", "operations", (row) => plain(row.operations, ratio(row.operations))],
    ["setup", "setup / user", (row) => plain(row.setup_seconds, brief(row.setup_seconds, "s"))],
    ["stored", "stored / user", (row) => plain(row.stored_bytes, brief(row.stored_bytes, "B"))],
    ["health", "health", (row) => [row.flags.length, h("td", { class: "health" }, row.flags.join(", ") || "ok")]],
  ];
  const always = new Set(["place", "method", "score", "interval", "n", "health"]);
  return columns.filter(([name, , cell]) => always.has(name) || ranking.rows.some((row) => cell(row)[0] !== null));
}

function rankingTable(ranking, sort, sortBy) {
  const columns = rankingColumns(ranking);
  const [by, reversed] = sort.split(" ");
  const column = columns.find(([name]) => name === by);
  const rows = [...ranking.rows];
  if (column) {
    const value = (row) => column[2](row)[0];
    rows.sort((a, b) => compare(value(a), value(b), reversed ? -1 : 1));
  }
  const header = columns.map(([name, title]) =>
    h(
      "th",
      { scope: "col", class: `of-${name}`, "aria-sort": name !== by ? null : reversed ? "descending" : "ascending" },
      h("button", { type: "button", "data-column": name, title: meaning(title), onclick: () => sortBy(name) }, title),
    ),
  );
  return h(
    "section",
    { class: "ranking" },
    h("h2", {}, ranking.title),
    h("p", { class: "note" }, ranking.description),
    h(
      "div",
      { class: "wide" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, header)),
        h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, , cell]) => cell(row)[1])))),
      ),
    ),
  );
}

/** Missing values last, whichever way it is sorted. */
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "string") return direction * a.localeCompare(b);
  return direction * (a - b);
}

function methodCell(run) {
  const { runs, groups } = report.data.get("runs");
  const group = groups.find((one) => one.runs.includes(run));
  return [
    h("a", { class: "method", href: link("run", { run }) }, runs[run].label),
    group ? [" ", h("a", { class: "minor", href: link("samples", { group: group.name, with: run }) }, "answers")] : null,
  ];
}

function scoreCell([value]) {
  return h("td", { class: "number score" }, number(value));
}

function intervalScale(metrics) {
  const ends = metrics.flatMap(([value, low, high]) => [value, low, high]).filter((end) => end !== null);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  return high > low ? (value) => (value - low) / (high - low) : () => 0.5;
}

/** The interval drawn on the ranking's own scale, its numbers beside it. */
function intervalBar([value, low, high], scale) {
  if (value === null) return DASH;
  const x = (end) => 4 + 92 * scale(end);
  const bar = s("svg", { viewBox: "0 0 100 12", class: "interval", "aria-hidden": "true" });
  if (low !== null) bar.append(s("line", { x1: x(low), x2: x(high), y1: 6, y2: 6 }));
  bar.append(s("circle", { cx: x(value), cy: 6, r: 3 }));
  return [bar, h("span", { class: "ends" }, low === null ? DASH : `${number(low, 3)} – ${number(high, 3)}`)];
}
