// The head atlas: what every head of a model contributes to a method's score, and whether methods and clusters agree on the best.
"use strict";

/** What a method ranks heads by; what these are, WORDS say. */
const MEASURES = { dps: "PCS", decore: "retrieval score" };

report.views.push({
  name: "heads",
  title: "Heads",
  keys: "arrow keys: from head to head",
  async show(main, params, replace) {
    const { runs } = report.data.get("runs");
    const having = Object.keys(runs).filter((run) => runs[run].heads);
    if (!having.length) {
      add(main, h("p", { class: "empty" }, "No record has head scores. This makes one: ", h("code", {}, "harness run --method dps --task lamp4 --model MODEL")));
      return;
    }
    const state = { run: having.includes(params.get("run")) ? params.get("run") : having[0], beside: params.get("beside") || "" };
    const peers = having.filter((run) => runs[run].model === runs[state.run].model);
    const records = new Map(await Promise.all(peers.map(async (run) => [run, await report.load(`records/${run}`)])));
    const analysis = records.get(state.run).analysis;
    const sets = headSets(peers, records, runs);
    const beside = sets.find((set) => set.name === state.beside);
    const change = (name) => (value) => (location.hash = link("heads", { ...state, [name]: value }));
    const named = (run) => `${runs[run].model} · ${runs[run].task} · ${runLabel(runs[run])}`;

    add(
      main,
      h(
        "form",
        { class: "filters", onsubmit: (event) => event.preventDefault() },
        select("Run", having.map((run) => [run, named(run)]), state.run, change("run")),
        select("Ring the heads of", [["", "no other"], ...sets.map((set) => [set.name, set.name])], state.beside, change("beside")),
      ),
      atlas(records.get(state.run), beside),
      h("h2", {}, "Do they agree?"),
      h("p", { class: "note" }, "Jaccard index of the sets of heads: 1 where they are the same. In brackets how many they share; the tooltip says how many by chance."),
      overlap(sets, headMap(analysis).size),
    );
  },
});

/** The sets of heads compared: those that every run found, or that its clusters have. Runs that share a fit stand once. */
function headSets(peers, records, runs) {
  const [sets, seen] = [[], new Set()];
  for (const run of peers) {
    const { analysis, artifacts, config } = records.get(run);
    const clusters = (analysis.clusters && analysis.clusters.heads) || [];
    const found = `${runs[run].task} ${artifacts.fit} ${clusters.length || analysis.k}`;
    const { control = "none" } = config.method.options;
    if (control !== "none" || (artifacts.fit && seen.has(found))) continue;
    seen.add(found);
    const name = `${runs[run].task} ${runLabel(runs[run])}`;
    const keys = (heads) => new Set(heads.map(([layer, head]) => `${layer}.${head}`));
    if (!clusters.length) sets.push({ name, heads: keys(analysis.heads.slice(0, analysis.k)) });
    clusters.forEach((heads, at) => sets.push({ name: `${name}, cluster ${at + 1} (${analysis.clusters.users[at]} users)`, heads: keys(heads) }));
  }
  return sets;
}

/** Head -> score, rank and mean, from what the run ranked. */
function headMap(analysis) {
  const heads = new Map(analysis.heads.map(([layer, head, score], at) => [`${layer}.${head}`, { layer, head, score, rank: at + 1 }]));
  (analysis.pcs || []).forEach((row, layer) => row.forEach((score, head) => {
    if (!heads.has(`${layer}.${head}`)) heads.set(`${layer}.${head}`, { layer, head, score, rank: null });
  }));
  return heads;
}

function atlas(record, beside) {
  const { analysis, config } = record;
  const map = headMap(analysis);
  const all = [...map.values()];
  const [layers, width] = [Math.max(...all.map((one) => one.layer)) + 1, Math.max(...all.map((one) => one.head)) + 1];
  const most = Math.max(...all.map((one) => Math.abs(one.score || 0))) || 1;
  const measure = MEASURES[config.method.name] || "score";
  const chosen = new Map(analysis.heads.slice(0, analysis.k).map(([layer, head], at) => [`${layer}.${head}`, at]));
  const detail = h("p", { class: "detail", id: "head", "aria-live": "polite" }, "Point at a head, or move to one with the arrow keys.");

  const about = ({ layer, head, score, rank }) => {
    const at = chosen.get(`${layer}.${head}`);
    const interval = at !== undefined && analysis.intervals ? analysis.intervals[at] : null;
    return [
      `layer ${layer}, head ${head}: ${measure} ${score === null ? "unknown" : Number(score.toPrecision(4))}`,
      measure === "PCS" && score !== null ? " nats per token" : "",
      interval ? ` (95 %: ${interval[0]} to ${interval[1]})` : "",
      rank ? `, place ${rank} of ${analysis.heads.length}` : ", not measured",
      at !== undefined ? ", one of the heads chosen" : "",
    ].join("");
  };
  const cell = (layer, head) => {
    const one = map.get(`${layer}.${head}`) || { layer, head, score: null, rank: null };
    const classes = [chosen.has(`${layer}.${head}`) ? "chosen" : "", beside && beside.heads.has(`${layer}.${head}`) ? "ringed" : ""];
    const square = h("td", {
      class: classes.join(" ").trim() || null, role: "gridcell", tabindex: layer + head === 0 ? "0" : "-1",
      "data-layer": layer, "data-head": head, "aria-label": about(one), title: about(one),
    });
    // square root: one head may tower over all others, whose differences are the question
    square.style.setProperty("--strength", one.score === null ? 0 : Math.sqrt(Math.abs(one.score) / most));
    if ((one.score || 0) < 0) square.classList.add("negative");
    return square;
  };
  const grid = h(
    "table",
    { class: width <= 16 ? "atlas few" : "atlas", role: "grid", "aria-label": `${measure} of ${layers} layers of ${width} heads`, onkeydown: (event) => walk(event, grid) },
    h("tbody", {}, Array.from({ length: layers }, (_, layer) =>
      h("tr", { role: "row" }, h("th", { scope: "row" }, layer), Array.from({ length: width }, (_, head) => cell(layer, head))),
    )),
    h("tfoot", {}, h("tr", {}, h("th", {}), Array.from({ length: width }, (_, head) => h("th", { scope: "col" }, width <= 16 || head % 4 === 0 ? head : "")))),
  );
  const tell = (event) => {
    const square = event.target.closest("td");
    if (square) detail.textContent = square.getAttribute("aria-label");
  };
  grid.addEventListener("mouseover", tell);
  grid.addEventListener("focusin", tell);
  return h(
    "section",
    {},
    h("p", { class: "note" }, `${measure} of every head (rows: layers, from 0; columns: heads). Filled: positive; hatched: negative. Framed: the ${chosen.size} chosen.`, meaning(measure) ? h("br") : null, meaning(measure)),
    h("div", { class: "wide" }, grid),
    detail,
  );
}

/** Arrow keys move the focus over the grid. */
function walk(event, grid) {
  const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  const here = event.target.closest("td");
  if (!by || !here) return;
  event.preventDefault();
  const [layer, head] = [Number(here.dataset.layer) + by[0], Number(here.dataset.head) + by[1]];
  const next = grid.querySelector(`td[data-layer="${layer}"][data-head="${head}"]`);
  if (!next) return;
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function overlap(sets, heads) {
  const cell = (a, b) => {
    const shared = [...a.heads].filter((one) => b.heads.has(one)).length;
    const index = shared / (a.heads.size + b.heads.size - shared || 1);
    const chance = (a.heads.size * b.heads.size) / heads;
    const square = h("td", { class: "number", title: `${a.name} and ${b.name}: ${shared} of ${a.heads.size} and ${b.heads.size} heads shared, by chance ${number(chance, 2)}` });
    square.style.setProperty("--strength", index);
    square.append(number(index, 2), h("small", {}, ` (${shared})`));
    return square;
  };
  return h(
    "div",
    { class: "wide" },
    h(
      "table",
      { class: "overlap" },
      h("thead", {}, h("tr", {}, h("th", {}), sets.map((set, at) => h("th", { scope: "col", title: set.name }, at + 1)))),
      h("tbody", {}, sets.map((set, at) => h("tr", {}, h("th", { scope: "row" }, `${at + 1} ${set.name}`), sets.map((other) => cell(set, other))))),
    ),
  );
}
