// People rank responses: by letters, best first, or by moving the cards. Every answer is sent at once.

import { api, begin, make, persistent, show, t } from "./common.js";

const TEXTS = {
  en: {
    welcome: "You will see prompts, each with several responses. Put the responses in order, the best first.",
    name: "Your name", start: "Start", change: "Change", progress: "Answers given", guidelines: "Guidelines",
    order: "Order, best first:", note: "Note (optional)", submit: "Submit", skip: "Skip", undo: "Undo", keys: "Keys", close: "Close",
    person: "Ranking as {name}", counts: "{answered} answered by you / {remaining} remaining in all",
    left: "about {minutes} min at your pace", agreement: "annotators agree on {percent}% of {pairs} pairs",
    prompt: "Prompt {number}", waiting: "Nothing to rank for you at the moment",
    waitingMore: "Others are ranking what is left, or it needs other people. This page looks again by itself.",
    done: "All prompts are answered. Thank you!", doneMore: "You can close this page.",
    user: "User", assistant: "Assistant", system: "System", tool: "Tool",
    response: "Response {label}", place: "Put {label} next in the order", up: "Move {label} up", down: "Move {label} down",
    tie: "Tie {label} with the one before it", standing: "rank {rank}", none: "none yet", pending: "the next one ties",
    missing: "Still without a place: {labels}", placed: "{label} has its place; Backspace takes out the last one",
    saving: "Saving …", saved: "Saved.", undone: "Taken back.", nothing: "There is nothing to undo.",
    elsewhere: "Not recorded: this prompt was answered meanwhile, in another tab or by others. Here is the next one.",
    failed: "Not recorded: {message}",
    keyLetters: "best first: a letter puts that response next", keyTie: "the next letter ties with the one before",
    keyBack: "takes out the last letter", keyEnter: "submits the order", keySkip: "skips this prompt", keyUndo: "takes back your newest answer",
    keyNote: "writes a note; Esc leaves it, Ctrl+Enter submits", keyHelp: "shows these keys",
  },
  zh: {
    welcome: "您会看到一些提示，每个提示有几个回答。请将回答从好到差排序。",
    name: "您的姓名", start: "开始", change: "更换", progress: "已完成的比例", guidelines: "标注指南",
    order: "顺序（从好到差）：", note: "备注（可不填）", submit: "提交", skip: "跳过", undo: "撤销", keys: "快捷键", close: "关闭",
    person: "标注者：{name}", counts: "您已完成 {answered} 个，总共还剩 {remaining} 个",
    left: "按您的速度约需 {minutes} 分钟", agreement: "标注者在 {pairs} 对回答中有 {percent}% 意见一致",
    prompt: "提示 {number}", waiting: "目前没有需要您排序的提示",
    waitingMore: "其他人正在处理剩余的提示，或者剩余的提示需要由其他人完成。本页会自动刷新。",
    done: "所有提示都已完成，谢谢！", doneMore: "您可以关闭此页面。",
    user: "用户", assistant: "助手", system: "系统", tool: "工具",
    response: "回答 {label}", place: "将 {label} 排在下一位", up: "将 {label} 上移", down: "将 {label} 下移",
    tie: "将 {label} 与前一个并列", standing: "第 {rank} 名", none: "尚未排序", pending: "下一个并列",
    missing: "尚未排序：{labels}", placed: "{label} 已排好；按退格键可去掉最后一个",
    saving: "正在保存……", saved: "已保存。", undone: "已撤销。", nothing: "没有可以撤销的回答。",
    elsewhere: "未记录：此提示已在另一个标签页中或由其他人完成。下面是下一个提示。",
    failed: "未记录：{message}",
    keyLetters: "从好到差依次输入字母", keyTie: "下一个字母与前一个并列",
    keyBack: "去掉最后一个字母", keyEnter: "提交顺序", keySkip: "跳过此提示", keyUndo: "撤销您最近的回答",
    keyNote: "写备注；Esc 离开，Ctrl+Enter 提交", keyHelp: "显示快捷键",
  },
};
const WAIT = 2000; // milliseconds between two looks while others work

const byId = (id) => document.getElementById(id);
let annotator = localStorage.getItem("annotator") ?? "";
let state = null; // what the server says
let labels = []; // A, B, ... of the responses, as many as there are
let groups = []; // the order: lists of labels that tie, best first
let sequence = []; // the labels as their cards stand on the page
let tieNext = false; // whether the next letter ties
let busy = false;
let timer = 0;

// --- The order.

const placed = () => groups.flat();
const unplaced = () => sequence.filter((label) => !placed().includes(label));
const isComplete = () => labels.length > 0 && placed().length === labels.length;
const rankOf = (label) => groups.findIndex((group) => group.includes(label)) + 1;

/** Puts a label next in the order. */
function place(label) {
  if (placed().includes(label)) return say("placed", { label });
  if (tieNext && groups.length) groups.at(-1).push(label);
  else groups.push([label]);
  tieNext = false;
  say();
  drawOrder();
}

/** Takes out what was typed last. */
function removeLast() {
  if (tieNext) tieNext = false;
  else if (groups.at(-1)?.pop() && !groups.at(-1).length) groups.pop();
  drawOrder();
}

/** Puts a card where another one is. All cards then have a place, and only ties of the others stay. */
function move(label, target) {
  const before = [...placed(), ...unplaced()];
  const position = before.indexOf(target);
  const tied = (a, b) => rankOf(a) > 0 && rankOf(a) === rankOf(b) && a !== label && b !== label;
  const after = before.filter((other) => other !== label);
  after.splice(position, 0, label);
  const moved = [];
  after.forEach((each, i) => (i && tied(after[i - 1], each) ? moved.at(-1).push(each) : moved.push([each])));
  groups = moved;
  arrange(after);
}

/** Moves a card by one place: -1 up, 1 down. */
function step(label, by) {
  const all = [...placed(), ...unplaced()];
  const target = all[all.indexOf(label) + by];
  if (target) move(label, target);
}

/** Ties a card with the one before it; if it is tied, unties it. */
function toggleTie(label) {
  const all = [...placed(), ...unplaced()];
  const i = all.indexOf(label);
  const flat = groups.map((group) => [...group]);
  for (const other of unplaced()) flat.push([other]);
  const k = flat.findIndex((group) => group.includes(label));
  const j = flat[k].indexOf(label);
  if (j > 0) flat.splice(k, 1, flat[k].slice(0, j), flat[k].slice(j));
  else if (i > 0) flat.splice(k - 1, 2, [...flat[k - 1], ...flat[k]]);
  groups = flat;
  arrange(all);
}

/** Lets the cards stand in this sequence. */
function arrange(next) {
  sequence = next;
  tieNext = false;
  const focused = document.activeElement;
  byId("cards").append(...sequence.map((label) => byId(`card-${label}`)));
  focused.focus(); // it is lost when an element is moved
  say();
  drawOrder();
}

// --- The page.

/** A line for what has happened; without a name it is emptied. */
function say(name = "", values = {}, kind = "") {
  byId("notice").className = `notice ${kind}`;
  byId("notice").textContent = name && t(name, values);
}

function drawOrder() {
  const text = groups.map((group) => group.join(" = ")).join(" > ");
  byId("order").textContent = text + (tieNext ? ` = … (${t("pending")})` : "") || t("none");
  for (const label of labels) {
    const rank = rankOf(label);
    byId(`rank-${label}`).textContent = rank ? t("standing", { rank }) : "";
  }
  byId("submit").disabled = busy || !isComplete();
  byId("skip").disabled = busy || state.index === null;
  byId("undo").disabled = busy || !state.can_undo;
}

function drawCounts() {
  const done = state.total - state.remaining;
  const percent = Math.round((100 * done) / state.total);
  const parts = [t("counts", state)];
  if (state.seconds_per_answer && state.remaining) parts.push(t("left", { minutes: Math.ceil((state.remaining * state.seconds_per_answer) / 60) }));
  if (state.agreement) parts.push(t("agreement", { percent: Math.round(100 * state.agreement.share), pairs: state.agreement.pairs }));
  byId("person").textContent = t("person", { name: annotator });
  byId("counts").textContent = parts.join(" · ");
  byId("bar").style.width = `${percent}%`;
  byId("progress").setAttribute("aria-valuenow", percent);
  byId("guidelines-box").hidden = !state.guidelines;
  byId("guidelines").textContent = state.guidelines;
}

function drawMessages() {
  const cards = state.messages.map(({ role, text }) => {
    const body = make("div");
    show(body, text);
    return make("div", { className: "card" }, make("div", { className: "soft small", textContent: t(role) }), body);
  });
  byId("messages").replaceChildren(...cards);
}

/** A button on a card; a click with the mouse leaves the focus where it is, so that Enter still submits. */
function cardButton(text, name, label, onclick) {
  const button = make("button", { type: "button", textContent: text, onclick, onmousedown: (event) => event.preventDefault() });
  button.setAttribute("aria-label", t(name, { label }));
  button.title = t(name, { label });
  return button;
}

function drawCard(label, text) {
  const bar = make(
    "div",
    { className: "row" },
    cardButton(label, "place", label, () => act(() => place(label))),
    cardButton("↑", "up", label, () => act(() => step(label, -1))),
    cardButton("↓", "down", label, () => act(() => step(label, 1))),
    cardButton("=", "tie", label, () => act(() => toggleTie(label))),
    make("span", { id: `rank-${label}`, className: "small soft" }),
  );
  const body = make("div");
  show(body, text);
  const card = make("div", { id: `card-${label}`, className: "card", draggable: true }, bar, body);
  card.setAttribute("role", "listitem");
  card.setAttribute("aria-label", t("response", { label }));
  card.ondragstart = (event) => event.dataTransfer.setData("text/plain", label);
  card.ondragover = (event) => event.preventDefault();
  card.ondrop = (event) => {
    event.preventDefault();
    const dragged = event.dataTransfer.getData("text/plain");
    // Something else may be dropped here: a file, or text of another page.
    if (labels.includes(dragged) && dragged !== label) act(() => move(dragged, label));
  };
  return card;
}

/** Draws everything from what the server says, without changing the order that the person has made. */
function draw() {
  if (!state) return;
  drawCounts();
  const { index, done } = state;
  byId("sample").hidden = index === null;
  byId("heading").textContent = index === null ? t(done ? "done" : "waiting") : t("prompt", { number: index + 1 });
  drawMessages();
  byId("cards").replaceChildren(...sequence.map((label) => drawCard(label, state.responses[labels.indexOf(label)])));
  drawOrder();
  drawKeys();
}

function drawKeys() {
  const last = labels.at(-1) ?? "D";
  const rows = [
    [`A … ${last}`, "keyLetters"], ["=", "keyTie"], ["Backspace", "keyBack"], ["Enter", "keyEnter"],
    [labels.includes("S") ? "Shift+S" : "S", "keySkip"], ["Ctrl+Z", "keyUndo"],
    ...(labels.includes("N") ? [] : [["N", "keyNote"]]), ["?", "keyHelp"],
  ];
  const cells = ([key, name]) => make("tr", {}, make("td", {}, make("kbd", { textContent: key })), make("td", { textContent: t(name) }));
  byId("help-rows").replaceChildren(...rows.map(cells));
}

// --- The server.

/** Shows what the server has answered: a new prompt begins without an order. */
function take(answer) {
  const isNew = state?.index !== answer.index || state?.answered !== answer.answered;
  state = answer;
  clearTimeout(timer);
  if (isNew) {
    labels = answer.responses.map((_, i) => String.fromCharCode(65 + i));
    groups = [];
    sequence = [...labels];
    tieNext = false;
    byId("note").value = "";
  }
  draw();
  if (isNew) {
    byId("heading").focus();
    scrollTo(0, 0);
  }
  if (answer.index === null) {
    byId("notice").textContent = t(answer.done ? "doneMore" : "waitingMore");
    if (!answer.done) timer = setTimeout(() => exchange(load), WAIT);
  }
}

const tell = (text) => (byId("notice").textContent = text);
const load = () => persistent(`/api/rank?annotator=${encodeURIComponent(annotator)}`, undefined, tell);

/** Asks the server and shows its answer; meanwhile nothing else is sent. Then says `name`. */
async function exchange(ask, name = "") {
  if (busy) return;
  busy = true;
  if (state) drawOrder();
  try {
    const answer = await ask();
    busy = false;
    say(name);
    take(answer);
  } catch (error) {
    busy = false;
    await fail(error);
  }
}

async function fail(error) {
  if (error.status === 409) {
    await exchange(load);
    return say("elsewhere", {}, "bad");
  }
  if (state) drawOrder();
  say("failed", { message: error.message }, "bad");
  if (!state) askName(error.message);
}

const send = (path, body, name) => exchange(() => persistent(path, { annotator, ...body }, tell), name);
const withNote = (body) => (byId("note").value.trim() ? { ...body, note: byId("note").value.trim() } : body);

function submit() {
  if (state.index === null) return;
  if (!isComplete()) return say("missing", { labels: unplaced().join(", ") }, "bad");
  const ranks = labels.map(rankOf);
  say("saving");
  send("/api/rank", withNote({ index: state.index, ranks }), "saved");
}

function skip() {
  if (state.index === null) return;
  say("saving");
  send("/api/rank", withNote({ index: state.index, skip: true }), "saved");
}

function undo() {
  if (!state.can_undo) return say("nothing");
  send("/api/rank/undo", { index: state.newest }, "undone");
}

// --- Keys.

/** Does something unless an answer is on its way. */
function act(work) {
  if (state && !busy) work();
}

/** The key as an ASCII sign where it has one: full-width letters, and keys that an input method has taken. */
function keyOf(event) {
  if (event.key !== "Process") return event.key.normalize("NFKC");
  if (event.code === "Equal") return "=";
  return event.code.startsWith("Key") ? event.code[3].toLowerCase() : "";
}

function press(key) {
  const label = key.length === 1 ? key.toUpperCase() : "";
  if (key === "Enter") submit();
  else if (key === "Backspace") removeLast();
  else if (key === "?") byId("help").showModal();
  else if (key === "S" || (key === "s" && !labels.includes("S"))) skip();
  else if (label === "N" && !labels.includes("N")) byId("note").focus();
  else if (key === "=" && groups.length && !isComplete()) (tieNext = true), drawOrder();
  else if (labels.includes(label)) place(label);
  else return false;
  return true;
}

function onKey(event) {
  if (byId("work").hidden || byId("help").open || event.altKey) return;
  // A key held down must not answer several prompts.
  if (event.repeat && event.key !== "Backspace") return;
  const key = keyOf(event);
  const control = event.ctrlKey || event.metaKey;
  if (event.target === byId("note")) {
    if (key === "Escape") byId("heading").focus();
    if (key === "Enter" && control) act(submit);
    return;
  }
  if (event.target.closest("input, select, textarea")) return;
  // These have their own use of Enter.
  if (key === "Enter" && event.target.closest("button, a, summary")) return;
  if (control) {
    if (key.toLowerCase() !== "z") return;
    event.preventDefault();
    return act(undo);
  }
  act(() => press(key) && event.preventDefault());
}

// --- Who ranks.

function askName(message = "") {
  clearTimeout(timer);
  byId("work").hidden = true;
  byId("who").hidden = false;
  byId("who-notice").textContent = message;
  byId("name").value = annotator;
  byId("name").focus();
}

function enter() {
  state = null;
  byId("who").hidden = true;
  byId("work").hidden = false;
  exchange(load);
}

byId("who").onsubmit = (event) => {
  event.preventDefault();
  annotator = byId("name").value.trim();
  localStorage.setItem("annotator", annotator);
  if (annotator) enter();
};
byId("change").onclick = () => act(() => askName());
byId("submit").onclick = () => act(submit);
byId("skip").onclick = () => act(skip);
byId("undo").onclick = () => act(undo);
byId("help-button").onclick = () => byId("help").showModal();
document.addEventListener("keydown", onKey);

begin(TEXTS, "rank", draw);
drawKeys();
if (annotator) enter();
else askName();
