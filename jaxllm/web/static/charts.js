// Small line charts in SVG: several runs over one another, read with a pointer or with the keyboard.
//
//   const chart = new Chart("train/loss", { large: false, open: () => {} });
//   page.append(chart.element);
//   chart.draw([{ run: "a", index: 0, points: [[10, 2.5], [20, null]] }], { smoothing: 0.6, log: true });
//
// Points are in the order of their steps; null is a gap. Drawing again changes the elements that are there: the
// focus and the cursor stay where they are.

import { make, t } from "./common.js";

const SVG = "http://www.w3.org/2000/svg";
const SMALL = { width: 340, height: 190 };
// A picture is scaled to the screen: on a phone a wide one would have tiny letters.
const largeSize = () => (window.innerWidth < 700 ? { width: 360, height: 340 } : { width: 960, height: 480 });
const ROOM = { left: 58, right: 12, top: 10, bottom: 24 };
const NUM_COLORS = 8;
// With the colors: 40 lines that all look different.
const DASHES = ["", "7 4", "2 4", "10 4 2 4", "14 4"];
const PAGE = 10; // points that PageUp and PageDown go

/** Sets how a line of the run with this number looks: its color is a class of watch.css. */
export function style(line, index) {
  line.classList.add(`run-${index % NUM_COLORS}`);
  line.setAttribute("stroke-dasharray", DASHES[index % DASHES.length]);
}

/** A short piece of a run's line, for legends. */
export function swatch(index) {
  const line = svg("line", { x1: 1, y1: 6, x2: 33, y2: 6 });
  line.classList.add("line");
  style(line, index);
  const box = svg("svg", { viewBox: "0 0 34 12", width: 34, height: 12, "aria-hidden": "true" });
  box.classList.add("swatch");
  box.append(line);
  return box;
}

/** A number with six digits, as short as it goes. */
export function short(value) {
  return value === null ? t("nan") : String(Number(value.toPrecision(6)));
}

/** Exponential moving average of points; `weight` 0 to 1 is that of the past. Its first values are not drawn to 0. */
export function smoothed(points, weight) {
  let sum = 0;
  let total = 0;
  return points.map(([step, value]) => {
    if (value === null) return [step, null];
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, sum / total];
  });
}

// Between numbers that are nearly the same no others can be counted.
const isWide = (low, high) => high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high));

/** Round numbers between two others, about `count` of them: steps of 1, 2 or 5 times a power of ten. */
export function roundTicks(low, high, count) {
  if (!isWide(low, high)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  // Multiplied, not added up: 0.1 + 0.2 is not 0.3.
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/** Round numbers for a logarithmic axis: powers of ten, or more where the axis spans few of them. */
export function logTicks(low, high) {
  const ticks = (factors) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const factor of factors) {
        const tick = Number(`${factor}e${power}`);
        if (tick >= low && tick <= high) found.push(tick);
      }
    }
    return found;
  };
  const powers = ticks([1]);
  if (powers.length >= 2) return powers.filter((_, i) => i % Math.ceil(powers.length / 6) === 0);
  const more = ticks([1, 2, 5]);
  return more.length >= 2 ? more : roundTicks(low, high, 4);
}

function svg(tag, attributes = {}, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** How a tick is written: 1200000 as 1.2M, 0.00002 as 2e-5. */
function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) {
    for (const [unit, letter] of [[1e9, "G"], [1e6, "M"]]) {
      if (size >= unit && size < 1000 * unit) return `${Number((value / unit).toPrecision(6))}${letter}`;
    }
    return Number(value.toPrecision(6)).toExponential().replace("e+", "e");
  }
  return String(Number(value.toPrecision(6)));
}

/** The last index whose step is at most `step`; -1: none is. */
function indexAt(points, step) {
  let [low, high] = [0, points.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** The positions of values on an axis: `low` is at `from`, `high` at `to`. */
function scale(low, high, from, to, log = false) {
  const place = log ? Math.log10 : (value) => value;
  const size = place(high) - place(low) || 1;
  return (value) => from + ((place(value) - place(low)) / size) * (to - from);
}

/** [low, high] of values with some room, so that no line lies on the frame; null: there are none. */
function range(values, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return null;
  if (log) {
    const factor = isWide(low, high) ? (high / low) ** 0.04 : 2;
    return [low / factor, high * factor];
  }
  const room = isWide(low, high) ? 0.04 * (high - low) : Math.abs(low) / 2 || 1;
  return [low - room, high + room];
}

/** One metric of several runs. */
export class Chart {
  /** large: for a dialog; open: called with Enter or a click. */
  constructor(name, { large = false, open = null } = {}) {
    this.name = name;
    this.large = large;
    this.size = large ? largeSize() : SMALL;
    this.series = [];
    this.settings = { smoothing: 0, log: false };
    this.cursor = null; // a step
    this.build();
    this.listen(open);
  }

  build() {
    const { width, height } = this.size;
    this.axes = svg("g", { class: "axes" });
    this.lines = svg("g", { class: "lines" });
    this.marks = svg("g", { class: "marks" });
    this.empty = svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle", class: "tick" });
    this.picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    this.picture.append(this.axes, this.lines, this.marks, this.empty);
    // A slider over the steps: what screen readers let the arrow keys move, and whose value they read out.
    this.plot = make("div", { className: "plot", tabIndex: 0 }, this.picture);
    this.plot.setAttribute("role", "slider");
    this.readout = make("p", { className: "readout small" });
    this.readout.setAttribute("aria-hidden", "true");
    const title = make("h3", { textContent: this.name });
    this.element = make("figure", { className: this.large ? "chart large" : "chart" }, title, this.plot, this.readout);
    this.element.dataset.metric = this.name;
  }

  listen(open) {
    this.plot.addEventListener("keydown", (event) => this.key(event, open));
    this.plot.addEventListener("pointermove", (event) => this.moveTo(this.stepAt(event)));
    this.plot.addEventListener("pointerleave", () => this.moveTo(null));
    this.plot.addEventListener("blur", () => this.moveTo(null));
    if (open) this.plot.addEventListener("click", open);
  }

  /** Shows these series; settings: smoothing 0 to 1, log. */
  draw(series, settings) {
    this.series = series;
    this.settings = settings;
    this.steps = [...new Set(series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    this.drawn = series.map((one) => ({ ...one, shown: settings.smoothing ? smoothed(one.points, settings.smoothing) : one.points }));
    this.fit();
    this.drawAxes();
    this.drawLines();
    this.describe();
    this.drawCursor();
  }

  isDrawable(value) {
    return value !== null && (!this.settings.log || value > 0);
  }

  fit() {
    const { width, height } = this.size;
    const values = this.drawn.flatMap(({ points, shown }) => [...points, ...shown].map(([, value]) => value).filter((value) => this.isDrawable(value)));
    this.yRange = range(values, this.settings.log);
    this.empty.textContent = this.yRange ? "" : t(this.settings.log ? "noPositive" : "noNumbers");
    const [first, last] = [this.steps[0] ?? 0, this.steps.at(-1) ?? 1];
    this.xRange = first === last ? [first - 1, last + 1] : [first, last];
    this.x = scale(...this.xRange, ROOM.left, width - ROOM.right);
    this.y = scale(...(this.yRange ?? [1, 10]), height - ROOM.bottom, ROOM.top, this.settings.log);
  }

  drawAxes() {
    const { width, height } = this.size;
    const parts = [];
    const few = this.size.width > 500 ? 8 : 4;
    const rows = !this.yRange ? [] : this.settings.log ? logTicks(...this.yRange) : roundTicks(...this.yRange, few);
    for (const value of rows) {
      const y = this.y(value).toFixed(1);
      parts.push(svg("line", { x1: ROOM.left, x2: width - ROOM.right, y1: y, y2: y, class: "grid" }));
      parts.push(svg("text", { x: ROOM.left - 6, y, dy: "0.32em", "text-anchor": "end", class: "tick" }, tickText(value)));
    }
    for (const step of roundTicks(...this.xRange, few).filter(Number.isInteger)) {
      const x = this.x(step).toFixed(1);
      parts.push(svg("text", { x, y: height - 6, "text-anchor": "middle", class: "tick" }, tickText(step)));
    }
    this.axes.replaceChildren(...parts);
  }

  drawLines() {
    const wanted = new Map();
    for (const { run, index, points, shown } of this.drawn) {
      // The measured values stay, faint, behind the smoothed ones.
      if (shown !== points) wanted.set(`raw ${run}`, { run, index, points, kind: "raw" });
      wanted.set(`line ${run}`, { run, index, points: shown, kind: "line" });
    }
    for (const path of [...this.lines.children]) if (!wanted.has(path.dataset.key)) path.remove();
    const existing = new Map([...this.lines.children].map((path) => [path.dataset.key, path]));
    for (const [key, { run, index, points, kind }] of wanted) {
      const path = existing.get(key) ?? svg("path", { class: kind });
      if (!existing.has(key)) style(path, index);
      Object.assign(path.dataset, { key, run });
      path.setAttribute("d", this.pathOf(points));
      this.lines.append(path); // in the order of the runs
    }
  }

  /** The d of a path that is interrupted where there is no number; a number between two gaps is a dot. */
  pathOf(points) {
    const parts = [];
    let isAlone = false;
    let isOpen = false;
    for (const [step, value] of points) {
      if (!this.isDrawable(value)) {
        if (isAlone) parts.push("h0");
        isAlone = isOpen = false;
        continue;
      }
      parts.push(`${isOpen ? "L" : "M"}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`);
      isAlone = !isOpen;
      isOpen = true;
    }
    return parts.join("") + (isAlone ? "h0" : "");
  }

  /** What a screen reader says of the chart before a step is chosen. */
  describe() {
    const newest = this.series.map(({ run, points }) => `${run} ${short(points.at(-1)[1])}`).join("; ");
    this.plot.setAttribute("aria-label", t("chartLabel", { name: this.name, newest: newest || t("noNumbers") }));
    this.plot.setAttribute("aria-valuemin", this.steps[0] ?? 0);
    this.plot.setAttribute("aria-valuemax", this.steps.at(-1) ?? 0);
  }

  // --- The cursor.

  stepAt(event) {
    const box = this.picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.size.width;
    let nearest = null;
    for (const step of this.steps) {
      if (nearest === null || Math.abs(this.x(step) - x) < Math.abs(this.x(nearest) - x)) nearest = step;
    }
    return nearest;
  }

  key(event, open) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (open && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      open();
      return;
    }
    if (event.key === "Escape" && this.cursor !== null && !this.large) this.moveTo(null);
    const last = this.steps.length - 1;
    // Without a cursor each key begins at the newest step.
    const at = this.cursor === null ? last + 1 : this.steps.indexOf(this.cursor);
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: PAGE, PageDown: -PAGE, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || last < 0) return;
    event.preventDefault();
    this.moveTo(this.steps[Math.max(0, Math.min(last, at + by))]);
  }

  moveTo(step) {
    if (step === this.cursor) return;
    this.cursor = step;
    this.drawCursor();
  }

  drawCursor() {
    // A restart may have taken the step away.
    if (this.cursor !== null && !this.steps.includes(this.cursor)) this.cursor = null;
    const step = this.cursor ?? this.steps.at(-1) ?? 0;
    const parts = this.cursor === null ? [] : [this.cursorLine()];
    const texts = [];
    const items = [];
    for (const { run, index, points } of this.series) {
      const at = indexAt(points, step);
      const text = at < 0 ? "–" : this.valueText(points[at], step);
      texts.push(`${run} ${text}`);
      items.push(make("span", { className: "value" }, swatch(index), ` ${run} `, make("b", { textContent: text })));
      if (this.cursor !== null && at >= 0 && this.isDrawable(points[at][1])) parts.push(this.dot(points[at], index));
    }
    this.marks.replaceChildren(...parts);
    this.readout.replaceChildren(make("span", { className: "soft", textContent: t("atStep", { step }) }), ...items);
    this.plot.setAttribute("aria-valuenow", step);
    this.plot.setAttribute("aria-valuetext", `${t("atStep", { step })}: ${texts.join("; ")}`);
  }

  /** The value, and its step where it is not the one asked for: runs need not log at the same steps. */
  valueText([step, value], asked) {
    const number = this.large && value !== null ? String(value) : short(value);
    return step === asked ? number : `${number} (${t("atStep", { step })})`;
  }

  cursorLine() {
    const x = this.x(this.cursor).toFixed(1);
    return svg("line", { x1: x, x2: x, y1: ROOM.top, y2: this.size.height - ROOM.bottom, class: "cursor" });
  }

  dot([step, value], index) {
    const dot = svg("circle", { cx: this.x(step).toFixed(1), cy: this.y(value).toFixed(1), r: 4 });
    dot.classList.add("dot", `run-${index % NUM_COLORS}`);
    return dot;
  }
}
