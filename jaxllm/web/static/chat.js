// The Chat page: one message to one or several models at once, their answers side by side as they come, and ratings.

import { begin, language, make, persistent, show, t, translate, visible } from "./common.js";
import { canRate, drawRating, letterOf, putNext, startRating } from "./chat_rate.js";
import {
  asConfig, asCurl, invalidField, makeFields, numAnswers, offer, remember, remembered, resetFields, samplingFields, systemPrompt,
} from "./chat_settings.js";
import { anyRunning, fill, isRunning, newAnswer, stop, stopAll } from "./chat_stream.js";
import { TEXTS } from "./chat_texts.js";

const PATHS = { chat: "/v1/chat/completions", text: "/v1/completions" };
const MOST_SPOKEN = 1000; // characters of an answer that a screen reader is given at once

const by = (id) => document.getElementById(id);

// turn     {text, system, mode, isBlind, sampling, answers, rating: null or {path, ranks}}
// answer   see newAnswer
let models = []; // as /api/models describes them
let turns = [];
let before = null; // the turns of the conversation before this one
let editing = null; // {draft: what was in the box} while the newest message is written anew
const views = new WeakMap(); // answer -> the elements that show it

const mode = () => remembered.mode ?? "chat";
const newest = () => turns.at(-1);
const say = (text, kind = "") => Object.assign(by("notice"), { textContent: text, className: `notice small ${kind}` });

// --- Which models.

const isBarred = (model) => mode() === "chat" && Boolean(model.chat_refusal);

/** The names of the models that are asked. At first it is the last one that can be: it has been trained longest. */
function chosenModels() {
  const possible = models.filter((model) => !isBarred(model)).map(({ name }) => name);
  const wanted = remembered.models ?? possible.slice(-1);
  return possible.filter((name) => wanted.includes(name));
}

function drawModels() {
  const compact = new Intl.NumberFormat(language, { notation: "compact", maximumSignificantDigits: 3 });
  const boxes = models.map((model) => {
    const box = make("input", { type: "checkbox", value: model.name, disabled: isBarred(model), onchange: chooseModels });
    box.checked = chosenModels().includes(model.name);
    const about = t("about", { parameters: compact.format(model.num_params), context: model.max_length });
    return make("label", {}, box, make("span", { textContent: model.name }), make("span", { className: "soft small", textContent: about }));
  });
  by("models").replaceChildren(...boxes);
  const barred = models.filter(isBarred).map(({ name, chat_refusal }) => `${name}: ${chat_refusal}`);
  by("refusals").textContent = barred.join("\n");
  by("refusals").hidden = !barred.length;
  for (const radio of document.querySelectorAll("[name=mode]")) radio.checked = radio.value === mode();
  by("mode-hint").hidden = mode() === "chat";
  by("set-max_tokens").placeholder = mode() === "chat" ? t("asFits") : "16";
}

function chooseModels() {
  const boxes = [...by("models").querySelectorAll("input:not(:disabled)")];
  const hidden = (remembered.models ?? []).filter((name) => !boxes.some((box) => box.value === name));
  remember({ models: [...hidden, ...boxes.filter((box) => box.checked).map((box) => box.value)] });
}

// --- What a model is given.

const hasSpoken = (answer) => answer.text !== "" || ["stop", "length"].includes(answer.finish);

/** The conversation of a model up to a turn's message; it has seen its own answers only. */
function messages(turn, model) {
  const position = turns.includes(turn) ? turns.indexOf(turn) : turns.length;
  const given = turn.system ? [{ role: "system", content: turn.system }] : [];
  for (const earlier of turns.slice(0, position)) {
    const answer = earlier.answers.find((each) => each.model === model && each.isChosen);
    if (earlier.mode !== "chat" || !answer || !hasSpoken(answer)) continue;
    given.push({ role: "user", content: earlier.text }, { role: "assistant", content: answer.text });
  }
  return [...given, { role: "user", content: turn.text }];
}

function bodyOf(turn, model) {
  const input = turn.mode === "chat" ? { messages: messages(turn, model) } : { prompt: turn.text };
  return { model, ...input, ...turn.sampling };
}

function newTurn(text) {
  const answers = chosenModels().flatMap((model) => Array.from({ length: numAnswers() }, (_, choice) => newAnswer(model, choice)));
  const isBlind = by("blind").checked;
  const system = mode() === "chat" ? systemPrompt() : "";
  return { text, system, mode: mode(), isBlind, sampling: samplingFields(), answers: isBlind ? shuffled(answers) : answers, rating: null };
}

function shuffled(list) {
  const keyed = list.map((item) => [crypto.getRandomValues(new Uint32Array(1))[0], item]);
  return keyed.sort(([a], [b]) => a - b).map(([, item]) => item);
}

// --- Sending.

function send() {
  const text = by("prompt").value;
  if (!text.trim()) return;
  if (anyRunning()) return say(t("stillRunning"));
  if (!chosenModels().length) return say(t("noModel"), "bad");
  if (!checkSettings()) return;
  if (editing) turns.pop();
  by("prompt").value = editing?.draft ?? "";
  editing = null;
  const turn = newTurn(text);
  turns.push(turn);
  say("");
  by("order").value = "";
  for (const model of new Set(turn.answers.map((answer) => answer.model))) ask(turn, model);
  draw();
  scrollTo(0, document.body.scrollHeight);
  by("prompt").focus();
}

function checkSettings() {
  const invalid = invalidField();
  if (!invalid) return true;
  by("settings").open = true;
  invalid.field.focus();
  say(invalid.message, "bad");
  return false;
}

function ask(turn, model) {
  const answers = turn.answers.filter((answer) => answer.model === model);
  fill(answers, PATHS[turn.mode], bodyOf(turn, model), (answer) => changed(turn, answer));
}

/** Asks one model again after an error. */
function askAgain(turn, model) {
  for (const answer of turn.answers.filter((each) => each.model === model)) Object.assign(answer, newAnswer(model, answer.choice));
  ask(turn, model);
  draw();
}

// Answers whose text is drawn with the next frame: tokens may come faster.
const waiting = new Map();

function changed(turn, answer) {
  if (!waiting.size) requestAnimationFrame(drawWaiting);
  waiting.set(answer, turn);
  if (answer.finish === null) return;
  drawAnswer(turn, answer);
  tellFinished(turn, answer);
  drawRating();
  by("stop-all").disabled = !anyRunning();
  if (!anyRunning()) keep();
}

function drawWaiting() {
  const isAtEnd = innerHeight + scrollY > document.body.scrollHeight - 100;
  for (const [answer, turn] of waiting) drawAnswer(turn, answer);
  waiting.clear();
  if (isAtEnd) scrollTo(0, document.body.scrollHeight);
}

/** Only whole answers are read out, not each token. */
function tellFinished(turn, answer) {
  const text = answer.error || answer.text.slice(0, MOST_SPOKEN);
  by("finished").replaceChildren(
    ...[...by("finished").children].slice(-turn.answers.length),
    make("p", { textContent: `${nameOf(turn, answer)}: ${visible(text)}` }),
  );
}

// --- The conversation.

const isHidden = (turn) => turn.isBlind && by("blind").checked && !turn.rating;

/** How an answer is called: by its letter while its model is hidden. */
const nameOf = (turn, answer) => (isHidden(turn) ? t("answer", { letter: letterOf(turn, answer) }) : answer.model);

function drawTurns() {
  by("turns").replaceChildren(...turns.map(turnElement));
}

function turnElement(turn) {
  const body = make("div");
  show(body, turn.text);
  const head = make("div", { className: "row small soft" }, make("span", { textContent: t(turn.mode === "chat" ? "user" : "beginning") }));
  if (turn === newest()) head.append(make("button", { type: "button", textContent: t("edit"), onclick: edit }));
  const question = make("div", { className: "card question" }, head, body);
  const answers = make("div", { className: "columns" }, ...turn.answers.map((answer) => answerCard(turn, answer)));
  return make("section", { className: "turn" }, question, answers);
}

function answerCard(turn, answer) {
  const button = (text, onclick) => make("button", { type: "button", textContent: text, onclick });
  const again = () => askAgain(turn, answer.model);
  const view = {
    name: make("span", { className: "name" }),
    numbers: make("span", { className: "small soft numbers" }),
    stop: button(t("stopOne"), () => stop(answer)),
    body: make("div"),
    finish: make("span", { className: "small finish" }),
    again: button(t("again"), again),
    goOn: button(t("goOn"), () => choose(turn, answer)),
  };
  const head = make("div", { className: "row" }, ...letterElements(turn, answer), view.name, view.numbers, view.stop);
  view.card = make("article", { className: "card answer" }, head, view.body, make("div", { className: "row" }, view.finish, view.again, view.goOn));
  views.set(answer, view);
  drawAnswer(turn, answer);
  return view.card;
}

/** Its letter, which puts the newest answers in order. */
function letterElements(turn, answer) {
  if (turn.answers.length < 2) return [];
  const letter = letterOf(turn, answer);
  if (turn !== newest()) return [make("span", { className: "letter", textContent: letter })];
  const button = make("button", { type: "button", className: "letter", textContent: letter, onclick: () => canRate() && putNext(letter) });
  button.setAttribute("aria-label", t("place", { letter }));
  return [button];
}

function drawAnswer(turn, answer) {
  const view = views.get(answer);
  if (!view) return; // of a conversation that has ended
  show(view.body, answer.text);
  const rank = turn.rating?.ranks[letterOf(turn, answer)];
  const isLast = turn === newest();
  view.name.textContent = nameOf(turn, answer) + (rank ? ` · ${t("rank_", { rank })}` : "");
  // How fast an answer comes tells which model it is.
  view.numbers.textContent = answer.tokens && !isHidden(turn) ? speed(answer) : "";
  view.stop.hidden = !isRunning(answer);
  view.finish.textContent = answer.error || (answer.finish ? t(`finish_${answer.finish}`) : t("coming"));
  view.finish.classList.toggle("bad", Boolean(answer.error));
  view.again.hidden = !answer.error || !isLast || turn.answers.some((each) => each.model === answer.model && isRunning(each));
  // In a blind comparison it would tell which answers are of one model.
  view.goOn.hidden = !isLast || isHidden(turn) || turn.mode !== "chat" || turn.answers.filter((each) => each.model === answer.model).length < 2;
  view.goOn.setAttribute("aria-pressed", answer.isChosen);
  view.goOn.textContent = t(answer.isChosen ? "goesOn" : "goOn");
  view.card.setAttribute("aria-label", nameOf(turn, answer));
  view.card.setAttribute("aria-busy", isRunning(answer));
}

function speed({ tokens, seconds }) {
  return t("speed", { tokens, rate: (tokens / Math.max(seconds, 0.001)).toFixed(1) });
}

/** The conversation of its model goes on from this answer. */
function choose(turn, answer) {
  for (const other of turn.answers) if (other.model === answer.model) other.isChosen = other === answer;
  for (const other of turn.answers) drawAnswer(turn, other);
  keep();
}

function draw() {
  drawModels();
  drawTurns();
  drawRating();
  by("stop-all").disabled = !anyRunning();
  by("back").hidden = !before;
  keep();
}

// --- A conversation lasts while the tab is open; what is typed, too.

function keep() {
  sessionStorage.setItem("chat-draft", by("prompt").value);
  try {
    sessionStorage.setItem("chat-turns", JSON.stringify(turns));
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    say(t("tooLong"));
  }
}

function restore() {
  by("prompt").value = sessionStorage.getItem("chat-draft") ?? "";
  turns = JSON.parse(sessionStorage.getItem("chat-turns") ?? "[]");
  for (const answer of turns.flatMap((turn) => turn.answers)) answer.finish ??= "stopped";
}

function startAnew() {
  if (!turns.length) return by("prompt").focus();
  stopAll();
  endEdit();
  before = turns;
  turns = [];
  say("");
  draw();
  by("prompt").focus();
}

function goBack() {
  stopAll();
  endEdit();
  [turns, before] = [before, turns.length ? turns : null];
  draw();
}

function edit() {
  if (!turns.length || editing) return;
  if (anyRunning()) return say(t("stillRunning"));
  editing = { draft: by("prompt").value };
  by("prompt").value = newest().text;
  by("prompt").focus();
  say(t("editing"));
}

/** Leaves the newest message as it is. What has been typed stays in the box. */
function endEdit() {
  if (!editing) return;
  const typed = by("prompt").value === newest().text ? "" : by("prompt").value;
  by("prompt").value = [typed, editing.draft].filter(Boolean).join("\n");
  editing = null;
  keep();
  say("");
}

// --- Keys.

/** Whether a key belongs to an input method, which is composing a character. */
const isComposing = (event) => event.isComposing || event.keyCode === 229;

by("prompt").onkeydown = (event) => {
  if (isComposing(event)) return;
  if (event.key === "ArrowUp" && !by("prompt").value) {
    event.preventDefault();
    edit();
  }
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  if (!event.repeat) send();
};

document.addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if (event.key === "Escape") return anyRunning() ? stopAll() : endEdit();
  if (event.altKey && !event.ctrlKey) return altKey(event);
  if (event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  // A letter is typed into the order.
  if (canRate() && event.key.length === 1 && letters().includes(event.key.toUpperCase())) by("order").focus();
});

const letters = () => newest().answers.map((answer) => letterOf(newest(), answer));

function altKey(event) {
  if (event.code === "KeyN") startAnew();
  else if (event.code === "KeyR" && canRate()) by("order").focus();
  else return;
  event.preventDefault();
}

// --- The page.

by("ask").onsubmit = (event) => {
  event.preventDefault();
  send();
};
by("prompt").oninput = () => sessionStorage.setItem("chat-draft", by("prompt").value);
by("stop-all").onclick = stopAll;
by("new").onclick = startAnew;
by("back").onclick = goBack;
by("blind").checked = remembered.blind ?? false;
by("blind").onchange = () => {
  remember({ blind: by("blind").checked });
  draw();
};
for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.onchange = () => {
    remember({ mode: radio.value });
    drawModels();
  };
}
by("reset").onclick = resetFields;
by("copy-config").onclick = () => checkSettings() && offer(asConfig());
by("copy-curl").onclick = () => {
  const model = chosenModels()[0];
  if (!model) return say(t("noModel"), "bad");
  if (checkSettings()) offer(asCurl(PATHS[mode()], bodyOf(newTurn(by("prompt").value), model)));
};

makeFields();
begin(TEXTS, "chat", draw);
startRating({ newest, messages, rated: draw });
restore();
translate();
draw();
by("prompt").focus();
try {
  models = (await persistent("/api/models", undefined, (text) => say(text, "bad"))).models;
  say("");
} catch (error) {
  say(error.message, "bad");
}
draw();
