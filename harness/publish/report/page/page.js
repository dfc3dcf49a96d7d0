// What all views share: data files, elements made from text, numbers as they are printed, links.
"use strict";

const report = {
  data: new Map(),
  views: [],
  waiting: new Map(),

  /** Called by every data file. */
  put(name, value) {
    this.data.set(name, value);
  },

  /** The content of data/NAME.js, fetched once, as a script: a page opened from the disk may read nothing else. */
  load(name) {
    if (this.data.has(name)) return Promise.resolve(this.data.get(name));
    if (!this.waiting.has(name)) {
      this.waiting.set(
        name,
        new Promise((resolve, reject) => {
          const script = document.createElement("script");
          script.src = "data/" + name.split("/").map(encodeURIComponent).join("/") + ".js";
          script.onload = () => resolve(this.data.get(name));
          script.onerror = () => reject(new Error(`${script.src} is missing; make the report anew`));
          document.head.append(script);
        }),
      );
    }
    return this.waiting.get(name);
  },
};

const SVG = "http://www.w3.org/2000/svg";

/** An element. Children that are no elements become text, never markup. `on...` are listeners, null is left out. */
function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function s(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Adds children as `h` does. */
function add(element, ...children) {
  return filled(element, {}, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return element;
}

/** What the words of tables and pages mean; the first that a title holds is its tooltip. */
const WORDS = {
  "#": "Rank by the first metric; equal values share one. Sweeps, ablations and controls have none.",
  lenient: "The answer is searched for a label or number; the official rule wants it to be nothing else.",
  unsplit: "Every text taken as one sentence, which needs none of NLTK's sentence data.",
  interval: "95 % interval over users.",
  tokens: "Tokens read and written an answer, relative to plain on the same samples.",
  operations: "Floating-point operations an answer, relative to plain on the same samples.",
  setup: "Time to adapt to one user.",
  stored: "What is kept of one user.",
  health: "What to know before quoting a number. Unchanged answers: those the model gives without the method too (where a method only changes the prompt: with the plain prompt), of the first 32.",
  gain: "The number less that of the same run with another user's history; a plus where the user's own helps.",
  PCS: "Preference contribution score: how much worse the model predicts what the user wrote when the head is masked, in nats a token.",
  "retrieval score": "Share of what the model copied from its prompt that the head looked at most while it was copied.",
  "kl to base": "How far the method moves the next token's distribution from that without it: mean Kullback-Leibler divergence in nats.",
  "identical to base": "Share of the first 32 answers that the model gives without the method too.",
  "forward passes": "Of whole batches, so they depend on the batch size; operations do not.",
};

/** Where each section of a long view is. */
function contents(label, sections) {
  const jump = (section) => (event) => {
    event.preventDefault();
    section.scrollIntoView();
    const inside = section.querySelector("th button");
    if (inside) inside.focus({ preventScroll: true });
  };
  return h("nav", { class: "contents", "aria-label": label }, h("ul", {}, sections.map((section) =>
    h("li", {}, h("a", { href: location.hash, onclick: jump(section) }, section.querySelector("h2, figcaption b").textContent)))));
}

/** What the words in these titles mean; nothing where no word needs it. */
function legend(titles) {
  const words = Object.entries(WORDS).filter(([word]) => titles.some((title) => (word.length > 1 ? title.includes(word) : title === word)));
  return words.length
    ? h("details", { class: "legend" }, h("summary", {}, "What the words say"), h("dl", {}, words.map(([word, text]) => [h("dt", {}, word), h("dd", {}, text)])))
    : h("div");
}

function meaning(title) {
  const found = Object.entries(WORDS).find(([word]) => title === word || (word.length > 1 && title.includes(word)));
  return found ? found[1] : null;
}

const DASH = "–";
const MOVES = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 };

function number(value, digits = 4) {
  return value === null || value === undefined ? DASH : value.toFixed(digits);
}

/** Three significant digits, thousands as words: 4.19 M. */
function brief(value, unit = "") {
  if (value === null || value === undefined) return DASH;
  const steps = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = steps.find(([size]) => Math.abs(value) >= size) || [1, ""];
  const shown = Number((value / size).toPrecision(3)).toString();
  return [shown, letter + unit].filter(Boolean).join(" ");
}

function ratio(value) {
  return value === null || value === undefined ? DASH : value.toFixed(2) + "×";
}

/** `#/view?name=value`, what is empty left out. */
function link(view, params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return `#/${view}${query ? "?" + query : ""}`;
}

/** The name of a run where several models or tasks stand side by side. */
function runLabel(run) {
  const control = run.control === "none" ? "" : ` · ${run.control.replace("_", " ")}`;
  return run.label + control;
}

function select(label, options, value, change) {
  const list = h("select", { onchange: (event) => change(event.target.value) });
  for (const [key, text] of options) list.append(h("option", { value: key, selected: key === value }, text));
  return h("label", {}, h("span", {}, label), list);
}

function say(text) {
  document.getElementById("announce").textContent = text;
}

/** Moves the focus along elements of a selector; whether there was one to move to. */
function step(selector, by) {
  const all = [...document.querySelectorAll(selector)].filter((element) => element.offsetParent !== null);
  if (!all.length) return false;
  const at = all.indexOf(document.activeElement);
  const next = at < 0 ? all[0] : all[Math.max(0, Math.min(all.length - 1, at + by))];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
  return true;
}

/** Runs `act` once typing has paused. */
function calmly(act, milliseconds = 120) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...given), milliseconds);
  };
}
