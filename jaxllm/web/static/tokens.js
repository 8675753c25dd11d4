// The Tokens page: a text as a model sees it: its tokens, how probable each was, and what else was likely.

import { api, begin, make, persistent, t, visible } from "./common.js";

const TEXTS = {
  en: {
    title: "Tokens", model: "Model", other: "Compare with", noOther: "no other", text: "Text", look: "Look", examples: "Examples:",
    summary: "The text as a whole", detail: "The chosen token", working: "Working …", failed: "{model}: {message}",
    unreachable: "The server does not answer. Your text is still here; try again.",
    keys: "Arrow keys move from token to token. Under each is its probability, given what is before it.",
    tokensOf: "Tokens of the text: {model}", token: "Token {number} of {count}", id: "id {id}",
    label: "{text}, {percent}", logprob: "log-probability {value}", joint: "log-probability of the text up to here {value}",
    rankOf: "number {rank} of what was likely", beyond: "not among the {count} likeliest",
    candidate: "Likely here", probability: "Probability", logprobHead: "Log-probability", idHead: "Id", actual: "← in the text",
    shade: "Probability:", orMore: "{value} or more", below: "below {value}",
    jointHead: "Joint log-probability (nats)", jointPower: "Joint probability", bits: "Bits per token", perplexity: "Perplexity",
    count: "Tokens", characters: "Characters per token", bytes: "Bytes per token",
    english: "Tokens per 750 English words", chinese: "Tokens per 500 Chinese characters", rule: "Rule of thumb", tokenizer: "{name} (tokenizer)",
    prefers: "{better} finds this text more probable than {worse}: by {nats} nats, a factor of {power}.", same: "Both find this text as probable.",
    apart: "The two tokenizers cut this text differently, so each model has its own tokens below. Log-probabilities of the whole text can still be compared.",
  },
  zh: {
    title: "词元", model: "模型", other: "对比模型", noOther: "不对比", text: "文本", look: "查看", examples: "示例：",
    summary: "整段文本", detail: "所选词元", working: "正在计算……", failed: "{model}：{message}",
    unreachable: "服务器没有响应。您的文本还在，请重试。",
    keys: "用方向键在词元之间移动。每个词元下方是它在前文之后出现的概率。",
    tokensOf: "文本的词元：{model}", token: "第 {number} 个词元，共 {count} 个", id: "编号 {id}",
    label: "{text}，{percent}", logprob: "对数概率 {value}", joint: "到此为止的文本的对数概率 {value}",
    rankOf: "在候选中排第 {rank}", beyond: "不在最可能的 {count} 个候选中",
    candidate: "此处的候选", probability: "概率", logprobHead: "对数概率", idHead: "编号", actual: "← 文本中的词元",
    shade: "概率：", orMore: "不低于 {value}", below: "低于 {value}",
    jointHead: "联合对数概率（奈特）", jointPower: "联合概率", bits: "每词元比特数", perplexity: "困惑度",
    count: "词元数", characters: "每词元字符数", bytes: "每词元字节数",
    english: "每 750 个英文单词的词元数", chinese: "每 500 个汉字的词元数", rule: "经验值", tokenizer: "{name}（分词器）",
    prefers: "{better} 认为这段文本比 {worse} 认为的更可能：相差 {nats} 奈特，即 {power} 倍。", same: "两个模型认为这段文本同样可能。",
    apart: "两个分词器对这段文本的切分不同，因此下面分别列出两个模型的词元；整段文本的对数概率仍可比较。",
  },
};

const EXAMPLES = [
  "The soup is good, and the bread was still warm.",
  "In the beginning there was nothing, which exploded.",
  "今天天气很好，我们去公园散步吧。",
  "学而时习之，不亦说乎？",
];
const ALTERNATIVES = 10;
// Columns of the summary that a tokenizer alone can fill.
const COUNTS = ["count", "characters", "bytes", "english", "chinese"];
// Lower ends of the shades p0, p1, ...; what is below the last one is p5.
const SHADES = [0.5, 0.1, 0.01, 0.001, 0.0001];

const by = (id) => document.getElementById(id);
let views = []; // of the text: one of each model, {model, tokens, logprob, compression, rule_of_thumb}
let chosen = 0; // index of the token that is looked at
let asked = 0; // number of the newest request: answers to older ones come too late

// --- Numbers.

const nats = (value) => value.toFixed(4);
const short = (value) => (value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4, useGrouping: false }));

/** A probability in percent, with three digits that count. */
function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value >= 0.001) return `${Number(value.toPrecision(3))}%`;
  return `${value.toExponential(0)}%`;
}

const power = (logprob) => `10^${(logprob / Math.LN10).toFixed(1)}`;
const shadeOf = (logprob) => `p${SHADES.filter((end) => Math.exp(logprob) < end).length}`;

// --- Text of tokens.

const bytesOf = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function decoded(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

/** The text of bytes; those of an incomplete character by their numbers: <E4>. */
function textOf(hex) {
  const bytes = bytesOf(hex);
  let text = "";
  for (let i = 0; i < bytes.length; ) {
    const whole = [1, 2, 3, 4].map((length) => decoded(bytes.subarray(i, i + length))).find((found) => found !== null);
    text += whole ?? `<${bytes[i].toString(16).toUpperCase().padStart(2, "0")}>`;
    i += whole === undefined ? 1 : new TextEncoder().encode(whole).length;
  }
  return text;
}

/** The same with signs for spaces and ends of lines; a token without text, such as one that ends texts, by its id. */
const pieceOf = (token) => (token.bytes ? signed(textOf(token.bytes)) : `<|${token.id}|>`);
const signed = (text) => visible(text.replaceAll("\r", "␍")).replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

const rankOf = (token) => token.alternatives.findIndex((other) => other.id === token.id) + 1;

function rankText(token) {
  const rank = rankOf(token);
  return rank ? t("rankOf", { rank }) : t("beyond", { count: token.alternatives.length });
}

/** Whether all models see the same tokens. */
const areAlike = () => views.every((view) => view.tokens.map(({ bytes }) => bytes).join(" ") === views[0].tokens.map(({ bytes }) => bytes).join(" "));

// --- The text as a whole.

function drawSummary() {
  const rule = short(views[0].rule_of_thumb);
  const columns = [
    ["jointHead", (view) => nats(view.logprob)],
    ["jointPower", (view) => power(view.logprob)],
    ["bits", (view) => short(-view.logprob / Math.LN2 / view.tokens.length)],
    ["perplexity", (view) => short(Math.exp(-view.logprob / view.tokens.length))],
    ["count", (view) => String(view.count ?? view.tokens.length)],
    ["characters", (view) => short(view.compression.characters_per_token)],
    ["bytes", (view) => short(view.compression.bytes_per_token)],
    ["english", (view) => short(view.compression.tokens_per_750_english_words), rule],
    ["chinese", (view) => short(view.compression.tokens_per_500_chinese_characters), rule],
  ];
  const cell = (name, text) => {
    const element = make("td", { className: "number", textContent: text });
    element.dataset.name = name;
    return element;
  };
  const row = (title, of) => make("tr", {}, make("th", { scope: "row", textContent: title }), ...columns.map((column) => cell(column[0], of(column))));
  const heads = columns.map(([name]) => make("th", { scope: "col", className: "number", textContent: t(name) }));
  by("heads").replaceChildren(make("tr", {}, make("td"), ...heads));
  // Other tokenizers have no probabilities.
  const ofTokenizer = (other) => ([name, of]) => (COUNTS.includes(name) ? of(other) : "");
  by("numbers").replaceChildren(
    ...views.map((view) => row(view.model, ([, of]) => of(view))),
    ...Object.entries(views[0].others).map(([name, other]) => row(t("tokenizer", { name }), ofTokenizer(other))),
    row(t("rule"), ([, , known = ""]) => known),
  );
  by("difference").textContent = views.length > 1 ? differenceText() : "";
}

function differenceText() {
  const [first, second] = views;
  const difference = first.logprob - second.logprob;
  const [better, worse] = difference > 0 ? [first, second] : [second, first];
  const values = { better: better.model, worse: worse.model, nats: nats(Math.abs(difference)), power: power(Math.abs(difference)) };
  const text = Math.abs(difference) < 5e-5 ? t("same") : t("prefers", values);
  return areAlike() ? text : `${t("apart")} ${text}`;
}

function drawLegend() {
  const percents = SHADES.map((end) => `${100 * end}%`);
  const names = [...percents.map((value) => t("orMore", { value })), t("below", { value: percents.at(-1) })];
  by("legend").replaceChildren(t("shade"), ...names.map((text, i) => make("span", { className: `swatch p${i}`, textContent: text })));
}

// --- The tokens.

/** Boxes of tokens: one for all models where they see the same tokens, or one for each. */
function drawTokens() {
  const boxes = areAlike() ? [views] : views.map((view) => [view]);
  by("texts").replaceChildren(...boxes.map(tokenBox));
}

function tokenBox(shown) {
  const box = make("div", { className: "tokens card" });
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", t("tokensOf", { model: shown.map((view) => view.model).join(", ") }));
  shown[0].tokens.forEach((token, i) => {
    box.append(tokenElement(shown, i));
    if (token.text?.includes("\n")) box.append(make("br"));
  });
  box.onkeydown = (event) => moveByKey(event, box);
  box.onclick = (event) => option(event)?.focus();
  box.addEventListener("focusin", (event) => choose(option(event), shown));
  // Browsers also tell of a mouse that rests while the page moves below it.
  box.onmousemove = (event) => (event.movementX || event.movementY) && option(event) && choose(option(event), shown);
  return box;
}

const option = (event) => event.target.closest(".token");

function tokenElement(shown, i) {
  const token = shown[0].tokens[i];
  const percents = shown.map((view) => percent(view.tokens[i].logprob));
  const element = make("span", { className: `token ${shadeOf(token.logprob)}`, tabIndex: i ? -1 : 0 }, make("b", { textContent: pieceOf(token) }));
  element.append(...percents.map((text) => make("small", { textContent: text })));
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", "false");
  element.setAttribute("aria-label", `${t("label", { text: pieceOf(token), percent: percents.join(", ") })}; ${rankText(token)}`);
  element.dataset.i = i;
  return element;
}

/** Shows what is known of a token, to which Tab comes back. */
function choose(element, shown) {
  for (const other of by("texts").querySelectorAll("[aria-selected='true']")) other.setAttribute("aria-selected", "false");
  element.setAttribute("aria-selected", "true");
  for (const other of element.parentElement.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  element.tabIndex = 0;
  chosen = Number(element.dataset.i);
  drawDetail(shown);
}

function moveByKey(event, box) {
  const all = [...box.querySelectorAll(".token")];
  const i = all.indexOf(option(event));
  const last = all.length - 1;
  const targets = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: last, ArrowDown: beside(all, i, 1), ArrowUp: beside(all, i, -1) };
  if (i < 0 || !(event.key in targets) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  all[Math.min(Math.max(targets[event.key], 0), last)].focus();
}

/** The token above (-1) or below (1) another one. */
function beside(all, i, step) {
  const middle = (element) => element.offsetLeft + element.offsetWidth / 2;
  const isFurther = (element) => step * (element.offsetTop - all[i].offsetTop) > 0;
  let next = i;
  while (all[next] && !isFurther(all[next])) next += step;
  if (!all[next]) return i;
  const line = all.filter((element) => element.offsetTop === all[next].offsetTop);
  const distance = (element) => Math.abs(middle(element) - middle(all[i]));
  return all.indexOf(line.reduce((best, element) => (distance(element) < distance(best) ? element : best)));
}

// --- One token.

function drawDetail(shown) {
  const token = shown[0].tokens[chosen];
  const title = `${pieceOf(token)} · ${t("token", { number: chosen + 1, count: shown[0].tokens.length })}`;
  by("detail").replaceChildren(make("h2", { textContent: title }), make("div", { className: "columns" }, ...shown.map(candidates)));
}

/** What a model expected where the token is. */
function candidates(view) {
  const token = view.tokens[chosen];
  const joint = view.tokens.slice(0, chosen + 1).reduce((sum, { logprob }) => sum + logprob, 0);
  const facts = [t("id", { id: token.id }), percent(token.logprob), t("logprob", { value: nats(token.logprob) }), rankText(token)];
  const line = `${facts.join(" · ")} · ${t("joint", { value: nats(joint) })}`;
  const heads = ["candidate", "probability", "", "logprobHead", "idHead"].map((name) => make("th", { scope: "col", textContent: name && t(name) }));
  // A token that was not expected stands below those that were.
  const all = rankOf(token) ? token.alternatives : [...token.alternatives, token];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...all.map((each) => candidate(each, token))));
  return make("div", {}, ...(views.length > 1 ? [make("h3", { textContent: view.model })] : []), make("p", { className: "small", textContent: line }), make("div", { className: "scroll" }, table));
}

function candidate(each, token) {
  const isActual = each.id === token.id;
  const bar = make("i");
  bar.style.width = `${100 * Math.exp(each.logprob)}%`;
  const piece = make("td", { className: "piece", textContent: pieceOf(each) + (isActual ? ` ${t("actual")}` : "") });
  const number = (text) => make("td", { className: "number", textContent: text });
  const meter = make("td", {}, make("span", { className: "meter" }, bar));
  return make("tr", { className: isActual ? "actual" : "" }, piece, number(percent(each.logprob)), meter, number(nats(each.logprob)), number(String(each.id)));
}

// --- The server.

const say = (text, kind = "") => Object.assign(by("notice"), { textContent: text, className: `notice ${kind}` });

async function ask(model, text) {
  try {
    return { model, ...(await api("/api/tokens", { model, text, alternatives: ALTERNATIVES })) };
  } catch (error) {
    throw new Error(error.status ? t("failed", { model, message: error.message }) : t("unreachable"));
  }
}

async function look() {
  const number = ++asked;
  const names = [by("model").value, by("other").value].filter(Boolean);
  say(t("working"));
  try {
    const answers = await Promise.all(names.map((name) => ask(name, by("text").value)));
    if (number !== asked) return;
    views = answers;
    chosen = 0;
    say("");
    draw();
    by("texts").querySelector(".token").focus();
  } catch (error) {
    if (number === asked) say(error.message, "bad");
  }
}

function draw() {
  drawLegend();
  drawChoices();
  by("result").hidden = !views.length;
  if (!views.length) return;
  drawSummary();
  drawTokens();
  drawDetail(areAlike() ? views : views.slice(0, 1));
}

// --- What is asked for. It is kept while the tab is open.

let names = [];

function drawChoices() {
  const fill = (select, options) => {
    const value = select.value || sessionStorage.getItem(`tokens-${select.id}`);
    select.replaceChildren(...options);
    if (names.includes(value)) select.value = value;
  };
  const options = () => names.map((name) => make("option", { value: name, textContent: name }));
  fill(by("model"), options());
  fill(by("other"), [make("option", { value: "", textContent: t("noOther") }), ...options()]);
}

for (const id of ["model", "other", "text"]) by(id).addEventListener("input", () => sessionStorage.setItem(`tokens-${id}`, by(id).value));
by("text").value = sessionStorage.getItem("tokens-text") ?? "";
by("examples").append(
  ...EXAMPLES.map((text) =>
    make("button", {
      type: "button",
      textContent: text.slice(0, 14) + (text.length > 14 ? " …" : ""),
      title: text,
      onclick: () => {
        by("text").value = text;
        by("text").dispatchEvent(new Event("input"));
        look();
      },
    }),
  ),
);
by("ask").onsubmit = (event) => {
  event.preventDefault();
  look();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
  event.preventDefault();
  look();
});

begin(TEXTS, "tokens", draw);
drawLegend();
try {
  const { models } = await persistent("/api/models", undefined, (text) => say(text, "bad"));
  names = models.map((model) => model.name);
  drawChoices();
  say("");
} catch (error) {
  say(error.message, "bad");
}
