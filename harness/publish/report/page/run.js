// One run in full: metrics, health, cost, configuration, versions.
"use strict";

report.views.push({
  name: "run",
  title: "Run",
  hidden: true,
  async show(main, params) {
    const key = params.get("run");
    const known = report.data.get("runs").runs[key];
    if (!known) return add(main, h("p", { class: "empty" }, `There is no run ${key}.`));
    const record = await report.load(`records/${key}`);
    const group = report.data.get("runs").groups.find((one) => one.runs.includes(key));
    add(
      main,
      h("h2", {}, `${known.label} on ${known.task} with ${known.model}`),
      h("p", { class: "note" }, `${report.data.get("runs").results}/${key}`),
      h(
        "p",
        { class: "choices" },
        group ? h("a", { href: link("samples", { group: group.name, with: key }) }, "its answers beside others'") : null,
        known.heads ? h("a", { href: link("heads", { run: key }) }, "its heads") : null,
      ),
      record.notes.map((note) => h("p", { class: "warning" }, note)),
      record.error ? h("p", { class: "warning" }, record.error) : null,
      h("div", { class: "columns" },
        part("Metrics", metricsTable(record.metrics)),
        part("Health", facts(record.health)),
        part("Cost", facts(record.cost)),
        record.judging ? part("Judging", facts(record.judging)) : null,
        part("Method", facts({ name: record.config.method.name, preset: record.config.method.preset, ...record.config.method.options })),
        part("Task and data", facts({ task: record.config.task.name, ...record.config.task.options, ...record.config.data })),
        part("Selection", facts({ ...record.config.selection, held_out_users: record.held_out_users.length })),
        part("Model", facts(record.config.model)),
        part("Sampling", facts(record.config.sampling)),
        record.config.judge ? part("Judge", facts(record.config.judge)) : null,
        part("Made with", facts({ started: record.started, finished: record.finished, commit: record.git_sha, uncommitted_changes: record.dirty, ...record.hardware, batch_size: record.batch.requested, batches: record.batches })),
        part("Versions", facts(record.versions)),
        Object.keys(record.artifacts).length ? part("Fitted state", facts(record.artifacts)) : null,
      ),
      h("details", {}, h("summary", {}, "run.json"), h("pre", { tabindex: "0" }, JSON.stringify(record, null, 1))),
    );
  },
});

function part(title, content) {
  return h("section", {}, h("h3", {}, title), content);
}

function metricsTable(metrics) {
  const rows = Object.entries(metrics).map(([name, metric]) =>
    h(
      "tr",
      {},
      h("th", { scope: "row", title: meaning(name.replaceAll("_", " ")) }, name, metric.higher_is_better ? " ↑" : " ↓"),
      h("td", { class: "number" }, number(metric.value)),
      h("td", { class: "number" }, metric.low === null ? DASH : `${number(metric.low)} – ${number(metric.high)}`),
      h("td", { class: "number" }, String(metric.n)),
      h("td", {}, metric.note),
    ),
  );
  const heads = ["metric", "value", "95 % interval", "n", ""].map((head) => h("th", { scope: "col" }, head));
  return h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
}

/** Names and values; a value that is null is a dash: not known. */
function facts(values) {
  const said = (value) => {
    if (value === null || value === undefined || value === "") return DASH;
    if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(4)));
    if (typeof value === "number" && Math.abs(value) >= 1e4) return value.toLocaleString("en");
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  };
  const rows = Object.entries(values).map(([name, value]) => [h("dt", { title: meaning(name.replaceAll("_", " ")) }, name.replaceAll("_", " ")), h("dd", {}, said(value))]);
  return h("dl", {}, rows);
}
