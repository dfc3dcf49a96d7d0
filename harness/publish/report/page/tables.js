// The papers' tables with measured values beside the published ones, the figures, and gains against general ability.
"use strict";

report.views.push({
  name: "tables",
  title: "Tables",
  async show(main, params) {
    const tables = await report.load("tables");
    const wanted = params.get("table") || tables[0].id;
    add(
      main,
      h("p", { class: "choices" }, tables.map((table) =>
        h("a", { href: link("tables", { table: table.id }), title: table.title, "aria-current": table.id === wanted ? "true" : null }, table.id),
      )),
    );
    const table = tables.find((one) => one.id === wanted);
    if (!table) return add(main, h("p", { class: "empty" }, `There is no table ${wanted}.`));
    add(main, paperTable(table));
  },
});

function paperTable(table) {
  const same = (at, other, place) => table.lines[at].labels.slice(0, place + 1).every((label, i) => label === table.lines[other].labels[i]);
  // one cell over all the lines that a label is of, however the line's source goes on
  const label = (at, place) => {
    const last = place === table.lines[at].labels.length - 1;
    if (!last && at > 0 && same(at, at - 1, place)) return null;
    let rows = 1;
    while (!last && at + rows < table.lines.length && same(at + rows, at, place)) rows += 1;
    return h("th", { scope: rows > 1 ? "rowgroup" : "row", rowspan: rows > 1 ? rows : null }, table.lines[at].labels[place]);
  };
  const row = (line, at) =>
    h(
      "tr",
      { class: [line.source, line.starts_block ? "block" : ""].join(" ") },
      line.labels.map((_, place) => label(at, place)),
      line.cells.map((cell) =>
        h(
          "td",
          { class: "number", title: cell.reasons.join("; ") || null },
          h(cell.best ? "strong" : "span", {}, cell.text),
          cell.reasons.length ? h("sup", {}, "†" + cell.marks) : null,
          cell.beside ? h("small", {}, cell.beside) : null,
        ),
      ),
    );
  return h(
    "section",
    { class: "paper" },
    h("h2", {}, `${table.id}: ${table.title}`),
    h(
      "div",
      { class: "wide" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, table.header.map((head) => h("th", { scope: "col" }, head)))),
        h("tbody", {}, table.lines.map(row)),
      ),
    ),
    table.notes.map((note) => h("p", { class: "note" }, note)),
  );
}

report.views.push({
  name: "figures",
  title: "Figures",
  async show(main) {
    const figures = (await report.load("figures")).map((figure) =>
      h(
        "figure",
        { class: "figure" },
        h("figcaption", {}, h("b", {}, `${figure.id}: ${figure.title}`), ` (${figure.place})`),
        figure.file ? h("img", { src: figure.file, alt: figure.title, loading: "lazy" }) : null,
        figure.file ? null : h("p", { class: "note" }, "No records to draw it from. These make them:"),
        figure.commands.map((command) => h("pre", {}, command)),
      ),
    );
    add(main, contents("Figures", figures), ...figures);
  },
});

report.views.push({
  name: "trade-off",
  title: "Trade-off",
  async show(main, params, replace) {
    const found = [...report.data.get("runs").trade_offs, ...report.data.get("runs").costs.map((one) => ({ ...one, ratio: true }))];
    if (!found.length) {
      add(
      main,
        h("p", { class: "empty" }, "No model has both MMLU and another task with ", h("code", {}, "plain"), " and one more method. ",
          "This makes the missing records: ",
          h("code", {}, "harness run --method plain --method rag --task mmlu --task lamp4 --model MODEL --data DIR")),
      );
      return;
    }
    const at = Math.min(found.length - 1, Number(params.get("of")) || 0);
    const choices = found.map((one, index) => [String(index), one.title]);
    add(
      main,
      h("form", { class: "filters" }, select("Models and tasks", choices, String(at), (value) => (location.hash = link("trade-off", { of: value })))),
      tradeOff(found[at]),
    );
  },
});

/** Points against plain at the origin: right is better general ability, up is better personalization. */
function tradeOff(chosen) {
  const { runs } = report.data.get("runs");
  const [width, height, margin] = window.innerWidth < 800 ? [440, 400, 76] : [760, 460, 76];
  // ratios stand by their logarithm, so that twice and half as much are as far from plain
  const scaled = (ends) => (chosen.ratio ? ends.map((end) => (end === null ? null : Math.log10(end))) : ends);
  const points = chosen.points.map((point) => ({ ...point, utility: scaled(point.utility) }));
  const across = axis(points.map((point) => point.utility), margin, width - 56); // room for the names of the last
  const times = (value) => `${Number((10 ** value).toPrecision(2))}×`;
  const up = axis(chosen.points.map((point) => point.gain), height - margin, 16);
  const drawing = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${chosen.gain} against ${chosen.utility}` });
  for (const tick of across.ticks) {
    drawing.append(s("line", { class: tick === 0 ? "zero" : "grid", x1: across(tick), x2: across(tick), y1: 16, y2: height - margin }));
    drawing.append(s("text", { x: across(tick), y: height - margin + 16, "text-anchor": "middle" }, chosen.ratio ? times(tick) : signed(tick)));
  }
  for (const tick of up.ticks) {
    drawing.append(s("line", { class: tick === 0 ? "zero" : "grid", y1: up(tick), y2: up(tick), x1: margin, x2: width - 16 }));
    drawing.append(s("text", { x: margin - 6, y: up(tick) + 4, "text-anchor": "end" }, signed(tick)));
  }
  drawing.append(s("text", { x: (width + margin) / 2, y: height - 12, "text-anchor": "middle", class: "title" }, chosen.ratio ? chosen.utility : `${chosen.utility}: change against plain`));
  drawing.append(s("text", { transform: `translate(14 ${height / 2}) rotate(-90)`, "text-anchor": "middle", class: "title" }, `${chosen.gain}: gain over plain`));
  const taken = []; // where names stand: one that would cover another moves down
  for (const { run, gain, utility } of [...points].sort((one, other) => other.gain[0] - one.gain[0])) {
    const [x, y] = [across(utility[0]), up(gain[0])];
    const name = { x: x + 8, y: y - 7 };
    for (const other of taken) if (Math.abs(other.x - name.x) < 44 && name.y - other.y < 13) name.y = other.y + 13;
    taken.push(name);
    const mark = s("a", { href: link("run", { run }), class: "point" });
    if (utility[1] !== null) mark.append(s("line", { x1: across(utility[1]), x2: across(utility[2]), y1: y, y2: y }));
    if (gain[1] !== null) mark.append(s("line", { x1: x, x2: x, y1: up(gain[1]), y2: up(gain[2]) }));
    mark.append(s("circle", { cx: x, cy: y, r: 5 }), s("text", name, runs[run].label));
    mark.append(s("title", {}, `${runs[run].label}: ${signed(gain[0])} ${chosen.gain}, ${chosen.ratio ? times(utility[0]) : signed(utility[0])} ${chosen.utility}`));
    drawing.append(mark);
  }
  return h(
    "figure",
    {},
    drawing,
    h("figcaption", {}, "Differences to ", h("code", {}, "plain"), " on the same samples, positive where a method is better. ",
      chosen.gain.endsWith(" trait") ? "A clamp is meant to bring a trait down. " : null, "Whiskers: the method's own 95 % interval."),
  );
}

/** Values of [value, low, high] on a line from `start` to `end`, zero among them. */
function axis(values, start, end) {
  const all = [0, ...values.flat().filter((value) => value !== null)];
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const room = (high - low || 0.1) * 0.08;
  const place = (value) => start + ((value - low + room) / (high - low + 2 * room || 1)) * (end - start);
  const size = 10 ** Math.floor(Math.log10((high - low || 0.1) / 2));
  const unit = [1, 2, 5].map((factor) => factor * size).find((one) => (high - low) / one <= 7) || 5 * size;
  place.ticks = [];
  for (let tick = Math.ceil(low / unit); tick <= Math.floor(high / unit); tick += 1) place.ticks.push(tick === 0 ? 0 : tick * unit);
  return place;
}

function signed(value) {
  const text = Number(Math.abs(value).toPrecision(3)).toString();
  return value > 0 ? `+${text}` : value < 0 ? `−${text}` : text;
}
