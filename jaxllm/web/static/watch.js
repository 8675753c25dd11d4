// The Watch page: the curves, responses and status of runs while they train, several over one another.

import { api, begin, make, request, show, t, translate } from "./common.js";
import { Chart, short, swatch } from "./charts.js";

const TEXTS = {
  en: {
    title: "Watch", runsLabel: "Runs", run: "Run", state: "State", stage: "Stage", step: "Step", rate: "Steps/s", left: "Left",
    save: "Last save", goodput: "Productive", report: "report", running: "running", stopped: "stopped", finished: "finished", begun: "begun",
    dead: "no process", ago: "{time} ago", of: "{step} of {total}",
    curves: "Curves", smoothing: "Smoothing", log: "logarithmic", filter: "Only names with",
    keys: "A chart reads out its values with the arrow keys, and opens large with Enter or a click.",
    samples: "Responses", samplesOf: "Stage", noSamples: "No stage of the chosen runs has kept responses yet.", close: "Close", newest: "the newest",
    noCurves: "No stage of the chosen runs has logged numbers yet.", noMatch: "No name matches.", score: "score {score}", atStep: "step {step}",
    nan: "not a number", noNumbers: "no numbers", noPositive: "no positive numbers", chartLabel: "{name}; newest: {newest}; Enter opens it large",
    noRuns: "There are no runs.", d: "d", h: "h", min: "min", s: "s",
  },
  zh: {
    title: "观察", runsLabel: "运行", run: "运行", state: "状态", stage: "阶段", step: "步数", rate: "步/秒", left: "剩余时间",
    save: "最近保存", goodput: "有效时间", report: "报告", running: "运行中", stopped: "已停止", finished: "已完成", begun: "已开始",
    dead: "无进程", ago: "{time}前", of: "{step} / {total}",
    curves: "曲线", smoothing: "平滑", log: "对数坐标", filter: "名称包含",
    keys: "选中图表后，用方向键读取数值，按回车或点击可放大。",
    samples: "回答", samplesOf: "阶段", noSamples: "所选运行还没有任何阶段保存了回答。", close: "关闭", newest: "最新",
    noCurves: "所选运行还没有任何阶段记录了数值。", noMatch: "没有匹配的名称。", score: "得分 {score}", atStep: "第 {step} 步",
    nan: "非数值", noNumbers: "没有数值", noPositive: "没有正数", chartLabel: "{name}；最新：{newest}；按回车放大",
    noRuns: "没有可显示的运行。", d: "天", h: "小时", min: "分", s: "秒",
  },
};

const EVERY = 3000; // milliseconds between two looks
const PATIENCE = 15000; // for an answer
const MOST_POINTS = 4000; // of a metric; then the server is asked for fewer
const FIRST_RUNS = 8; // shown at first
const IMPORTANT = ["loss", "score", "kl", "accuracy"];

const by = (id) => document.getElementById(id);
const compact = (value, digits = 3) => Number(value.toPrecision(digits)).toLocaleString();

// --- What the user has chosen. It is kept in the address, so that a view can be reloaded and sent to others.

const given = new URLSearchParams(location.search);
const chosen = {
  runs: given.has("run") ? new Set(given.getAll("run")) : null, // null: the first ones
  stage: given.get("stage") ?? "", // "": the newest of the first run
  samples: given.get("samples") ?? "",
  smoothing: Math.min(0.98, Math.max(0, Number(given.get("smoothing")) || 0)),
  log: given.has("log"),
  filter: given.get("filter") ?? "",
};

function remember() {
  const query = new URLSearchParams([...(chosen.runs ?? [])].map((run) => ["run", run]));
  for (const name of ["stage", "samples", "filter"]) if (chosen[name]) query.set(name, chosen[name]);
  if (chosen.smoothing) query.set("smoothing", chosen.smoothing);
  if (chosen.log) query.set("log", "1");
  history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}${location.hash}`);
}

// --- What is known of the runs.

let runs = null; // as /api/runs has them; null: not known yet
let stage = ""; // whose curves are shown
let stageNames = [];
let samples = { stages: [], found: [] };
const curves = new Map(); // "STAGE RUN" -> {next, mark, points: Map of a metric to its points}

const curvesOf = (run, ofStage = stage) => curves.get(`${ofStage} ${run}`);
const isShown = (name, index) => (chosen.runs ? chosen.runs.has(name) : index < FIRST_RUNS);
const shownRuns = () => (runs ?? []).map((run, index) => ({ ...run, index })).filter(({ name, index, error }) => !error && isShown(name, index));
const pathOf = (run, what, query = {}) => `/api/runs/${encodeURIComponent(run)}/${what}?${new URLSearchParams(query)}`;
const get = (path) => api(path, undefined, { signal: AbortSignal.timeout(PATIENCE) });

/** Reads what a run's curves got since the last time; returns the answer. wanted "": the run's newest stage. */
async function readCurves(run, wanted) {
  const known = curvesOf(run, wanted || stage) ?? { next: 0, mark: "", points: new Map() };
  const answer = await get(pathOf(run, "curves", { stage: wanted, since: known.next, mark: known.mark }));
  const points = answer.reset || !known.next ? new Map() : known.points;
  let most = 0;
  for (const [metric, added] of Object.entries(answer.points)) {
    points.set(metric, (points.get(metric) ?? []).concat(added));
    most = Math.max(most, points.get(metric).length);
  }
  const isFull = most > MOST_POINTS;
  curves.set(`${answer.stage} ${run}`, { next: isFull ? 0 : answer.next, mark: isFull ? "" : answer.mark, points });
  return answer;
}

/** Reads the curves of all runs that are shown: of the stage that is chosen, or that the first of them is in. */
async function readAllCurves() {
  const names = shownRuns().map(({ name }) => name);
  if (!names.length) return;
  const first = await readCurves(names[0], chosen.stage);
  stage = first.stage ?? "";
  const answers = await Promise.all(names.slice(1).map((name) => readCurves(name, stage)));
  stageNames = [...new Set([first, ...answers].flatMap((answer) => answer.stages))];
}

async function readAllSamples() {
  const shown = shownRuns();
  const answers = await Promise.all(shown.map(({ name }) => get(pathOf(name, "samples", { stage: chosen.samples }))));
  const found = answers.flatMap((answer, i) => answer.samples.map((sample) => ({ ...sample, run: shown[i].name, index: shown[i].index, stage: answer.stage })));
  samples = { stages: [...new Set(answers.flatMap((answer) => answer.stages))], found };
}

// --- Looking again and again.

let timer = 0;
let isReading = false;
let isStale = false; // something was chosen while a look was on its way

async function refresh() {
  clearTimeout(timer);
  if (isReading) {
    isStale = true;
    return;
  }
  isReading = true;
  let goesOn = true;
  try {
    runs = (await get("/api/runs")).runs;
    await Promise.all([readAllCurves(), readAllSamples()]);
    say("");
    draw();
  } catch (error) {
    // An error without a status is that of a network.
    say(error.status ? error.message : t("offline"));
    // The key was asked for and not given: it is not asked for every three seconds.
    goesOn = error.status !== 401;
  }
  isReading = false;
  if (isStale) {
    isStale = false;
    refresh();
  } else if (goesOn && !document.hidden) {
    timer = setTimeout(refresh, EVERY);
  }
}

document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : refresh()));

function say(text) {
  const notice = by("notice");
  if (notice.textContent !== text) notice.textContent = text;
  notice.classList.toggle("bad", text !== "");
}

// --- The table of runs.

/** Seconds as a person says them: 45 s, 3 min 20 s, 2 h 5 min. */
function duration(seconds) {
  const whole = Math.round(seconds);
  for (const [unit, size, smaller, part] of [["d", 86400, "h", 3600], ["h", 3600, "min", 60], ["min", 60, "s", 1]]) {
    if (whole < size) continue;
    const rest = Math.floor((whole % size) / part);
    return `${Math.floor(whole / size)} ${t(unit)}${rest ? ` ${rest} ${t(smaller)}` : ""}`;
  }
  return `${whole} ${t("s")}`;
}

const rows = new Map(); // run -> {row, box, cells, link}

function rowOf(name, index) {
  const box = make("input", { type: "checkbox", onchange: () => choose(name, box.checked) });
  const link = reportLink(name);
  const cells = Array.from({ length: 7 }, () => make("td"));
  for (const i of [3, 4, 6]) cells[i].className = "number";
  const head = make("th", { scope: "row" }, make("label", {}, box, " ", swatch(index), ` ${name}`), " ", link);
  const row = make("tr", {}, head, ...cells);
  row.dataset.run = name;
  return { row, box, cells, link };
}

function choose(name, isOn) {
  chosen.runs ??= new Set(runs.map((run) => run.name).filter(isShown));
  if (isOn) chosen.runs.add(name);
  else chosen.runs.delete(name);
  changedWhatIsRead();
}

function reportLink(name) {
  const link = make("a", { href: pathOf(name, "report"), target: "_blank", className: "small" });
  link.addEventListener("click", async (event) => {
    if (!sessionStorage.getItem("key")) return;
    // A link sends no key, and a page made from the answer would have the policy of this one, without its own styles.
    event.preventDefault();
    const file = URL.createObjectURL(await (await request(link.href)).blob());
    make("a", { href: file, download: `${name.replaceAll("/", "-")}-report.html` }).click();
    setTimeout(() => URL.revokeObjectURL(file), 60000);
  });
  return link;
}

function drawRuns() {
  for (const [name, { row }] of rows) {
    if (runs.some((run) => run.name === name)) continue;
    row.remove();
    rows.delete(name);
  }
  runs.forEach((run, index) => {
    if (!rows.has(run.name)) {
      rows.set(run.name, rowOf(run.name, index));
      by("runs").append(rows.get(run.name).row);
    }
    const { box, cells, link } = rows.get(run.name);
    box.checked = !run.error && isShown(run.name, index);
    box.disabled = Boolean(run.error);
    link.hidden = !run.report;
    link.textContent = t("report");
    cells[0].colSpan = run.error ? cells.length : 1;
    for (const cell of cells.slice(1)) cell.hidden = Boolean(run.error);
    if (run.error) cells[0].replaceChildren(make("span", { className: "soft", textContent: run.error }));
    else fill(cells, run);
  });
}

function fill(cells, run) {
  const { state, alive, holder, step, num_steps: total, steps_per_second: rate, seconds_left: left, save } = run;
  const work = alive === null || state === "finished" ? "" : alive ? holder : t("dead");
  const ago = (seconds) => t("ago", { time: duration(seconds) });
  const stateName = make("b", { className: { running: "good", stopped: "bad" }[state] ?? "", textContent: t(state) });
  cells[0].replaceChildren(stateName, below([work, ago(run.age_seconds)].filter(Boolean).join(" · ")));
  cells[1].textContent = run.stage;
  cells[2].replaceChildren(total ? t("of", { step: step.toLocaleString(), total: total.toLocaleString() }) : step ? step.toLocaleString() : "–");
  if (total) cells[2].append(bar(step / total));
  cells[3].textContent = rate ? compact(rate) : "–";
  cells[4].textContent = left === null ? "–" : duration(left);
  cells[5].replaceChildren(...(save ? [t("atStep", { step: save.step.toLocaleString() }), below(ago(save.age_seconds))] : ["–"]));
  cells[6].textContent = run.goodput === null ? "–" : `${(100 * run.goodput).toFixed(1)} %`;
}

const below = (text) => make("div", { className: "soft small", textContent: text });

function bar(share) {
  const done = make("i");
  done.style.width = `${100 * Math.min(1, share)}%`;
  return make("div", { className: "progress", ariaHidden: "true" }, done);
}

// --- The charts.

const charts = new Map(); // metric -> Chart
let drawnNames = "";
let large = null; // the chart in the dialog

const prefixOf = (metric) => metric.split("/")[0];

/** Important ones first: lower is earlier. */
function importance(metric) {
  const at = IMPORTANT.indexOf(metric.split("/").at(-1));
  return at < 0 ? IMPORTANT.length : at;
}

/** {prefix: metrics} in the order in which they are shown: what is trained, then what is measured, then the others. */
function grouped(metrics) {
  const place = (prefix) => ({ train: 0, [stage]: 0, eval: 1, throughput: 3 })[prefix] ?? 2;
  const order = (a, b) => place(prefixOf(a)) - place(prefixOf(b)) || prefixOf(a).localeCompare(prefixOf(b));
  const sorted = [...metrics].sort((a, b) => order(a, b) || importance(a) - importance(b) || a.localeCompare(b));
  return Map.groupBy(sorted, prefixOf);
}

function seriesOf(metric) {
  const shown = shownRuns().map(({ name, index }) => ({ run: name, index, points: curvesOf(name)?.points.get(metric) ?? [] }));
  return shown.filter(({ points }) => points.length);
}

function drawCharts() {
  const shown = shownRuns();
  const metrics = new Set(shown.flatMap(({ name }) => [...(curvesOf(name)?.points.keys() ?? [])]));
  const groups = grouped(metrics);
  const names = JSON.stringify([...groups]);
  if (names !== drawnNames) arrange(groups);
  drawnNames = names;
  for (const metric of metrics) charts.get(metric).draw(seriesOf(metric), chosen);
  if (large) large.draw(seriesOf(large.name), chosen);
  filter();
}

/** Puts the charts under the titles of their groups. */
function arrange(groups) {
  const focused = document.activeElement;
  const sections = [...groups].map(([prefix, metrics]) => {
    for (const metric of metrics) if (!charts.has(metric)) charts.set(metric, new Chart(metric, { open: () => enlarge(metric) }));
    const grid = make("div", { className: "charts" }, ...metrics.map((metric) => charts.get(metric).element));
    return make("section", {}, make("h2", { textContent: prefix }), grid);
  });
  by("charts").replaceChildren(...sections);
  // What is moved in the page loses the focus.
  if (by("charts").contains(focused)) focused.focus({ preventScroll: true });
}

function filter() {
  const wanted = chosen.filter.trim().toLowerCase();
  let count = 0;
  for (const section of by("charts").children) {
    const figures = [...section.querySelectorAll("figure")];
    for (const figure of figures) figure.hidden = !figure.dataset.metric.toLowerCase().includes(wanted);
    const visible = figures.filter((figure) => !figure.hidden).length;
    section.hidden = !visible;
    count += visible;
  }
  by("nothing").hidden = count > 0;
  by("nothing").textContent = t(runs.length ? (charts.size && wanted ? "noMatch" : "noCurves") : "noRuns");
}

function enlarge(metric) {
  large = new Chart(metric, { large: true });
  large.draw(seriesOf(metric), chosen);
  by("large").append(large.element);
  by("large").setAttribute("aria-label", metric);
  by("large").showModal();
  large.plot.focus();
}

// Escape closes a dialog, and the focus goes back to where it was.
by("large").addEventListener("close", () => {
  large.element.remove();
  large = null;
});
by("large").addEventListener("click", (event) => {
  if (event.target === by("large")) by("large").close(); // beside it
});

// --- Responses.

let drawnSamples = "";

function drawSamples() {
  const content = JSON.stringify([samples.found, document.documentElement.lang]);
  by("no-samples").hidden = samples.found.length > 0;
  if (content === drawnSamples) return; // a text that was opened stays open
  drawnSamples = content;
  by("samples").replaceChildren(...samples.found.map(card));
}

function card({ run, index, stage: from, step, score, model, prompt, response }) {
  const facts = [run, from, model, step === null ? null : t("atStep", { step }), score === null ? null : t("score", { score: short(score) })];
  const asked = make("p", { className: "soft" });
  const answered = make("p");
  show(asked, prompt);
  show(answered, response);
  const head = make("h3", {}, swatch(index), ` ${facts.filter(Boolean).join(" · ")}`);
  return make("article", { className: "card" }, head, asked, answered);
}

// --- Controls.

/** Fills a select with stages, without taking an open one away from the user. */
function fillStages(select, names, value) {
  const wanted = ["", ...names, ...(value && !names.includes(value) ? [value] : [])];
  const labels = wanted.map((name) => (name || (select.id === "stage" && stage && !chosen.stage ? `${t("newest")} (${stage})` : t("newest"))));
  const content = JSON.stringify(labels);
  if (select.dataset.content !== content) {
    select.dataset.content = content;
    select.replaceChildren(...wanted.map((name, i) => make("option", { value: name, textContent: labels[i] })));
  }
  select.value = value;
}

function drawControls() {
  fillStages(by("stage"), stageNames, chosen.stage);
  fillStages(by("sample-stage"), samples.stages, chosen.samples);
  by("smoothing").value = chosen.smoothing;
  by("weight").textContent = chosen.smoothing.toFixed(2);
  by("log").checked = chosen.log;
  if (by("filter").value !== chosen.filter) by("filter").value = chosen.filter;
}

function draw() {
  drawControls();
  if (!runs) return;
  drawRuns();
  drawCharts();
  drawSamples();
}

function changed() {
  remember();
  draw();
}

function changedWhatIsRead() {
  changed();
  refresh();
}

by("stage").onchange = () => {
  chosen.stage = by("stage").value;
  changedWhatIsRead();
};
by("sample-stage").onchange = () => {
  chosen.samples = by("sample-stage").value;
  changedWhatIsRead();
};
by("smoothing").oninput = () => {
  chosen.smoothing = Number(by("smoothing").value);
  changed();
};
by("log").onchange = () => {
  chosen.log = by("log").checked;
  changed();
};
by("filter").oninput = () => {
  chosen.filter = by("filter").value;
  changed();
};

begin(TEXTS, "watch", () => {
  translate(by("large"));
  draw();
});
draw();
refresh();
