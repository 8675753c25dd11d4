// Ratings on the Chat page: the answers to the newest message in an order, best first, for a reward model.

import { api, t } from "./common.js";
import { isRunning } from "./chat_stream.js";

const by = (id) => document.getElementById(id);
const MOST = 26; // as many as there are letters

export const letterOf = (turn, answer) => String.fromCharCode(65 + turn.answers.indexOf(answer));

/** Whether an answer is whole: one that was stopped or has failed says nothing of its model. */
const isWhole = (answer) => ["stop", "length"].includes(answer.finish);
const wholeAnswers = (turn) => turn.answers.filter(isWhole);

/** An order such as BA=C or B>A=C: {ranks: {B: 1, A: 2, C: 2}, fault: what is wrong with it, or ""}. */
export function readOrder(text, letters) {
  const ranks = {};
  let rank = 0;
  let ties = false;
  // NFKC turns full-width letters and signs, which Chinese keyboards type, into ASCII.
  for (const sign of text.normalize("NFKC").toUpperCase().replace(/[\s>]/g, "")) {
    if (sign === "=") {
      ties = rank > 0;
      continue;
    }
    if (!letters.includes(sign)) return { ranks, fault: t("noLetter", { sign, letters: letters.join(", ") }) };
    if (sign in ranks) return { ranks, fault: t("twice", { letter: sign }) };
    rank += ties ? 0 : 1;
    ranks[sign] = rank;
    ties = false;
  }
  const missing = letters.filter((letter) => !(letter in ranks));
  return { ranks, fault: missing.length ? t("missing", { letters: missing.join(", ") }) : "" };
}

let page; // {newest, messages, rated}: see startRating
let isSending = false;

/** Begins to rate.

newest     function: the newest turn, or undefined
messages   function of a turn and a model: what the model was given
rated      function of a turn: called when its rating is written
*/
export function startRating(functions) {
  page = functions;
  by("annotator").value = localStorage.getItem("annotator") ?? "";
  by("annotator").oninput = () => localStorage.setItem("annotator", by("annotator").value.trim());
  by("order").oninput = drawRating;
  by("tie").onclick = () => putNext("=");
  by("clear").onclick = () => {
    by("order").value = "";
    putNext("");
  };
  by("rate").onsubmit = (event) => {
    event.preventDefault();
    submit();
  };
}

/** Puts a letter or = at the end of the order. */
export function putNext(sign) {
  by("order").value += sign;
  by("order").focus();
  drawRating();
}

export const canRate = () => !by("rate").hidden && !by("rate-fields").hidden;

function obstacle(turn) {
  if (turn.mode !== "chat") return t("rateText");
  if (turn.answers.some(isRunning)) return t("rateWait");
  const whole = wholeAnswers(turn);
  if (whole.length < 2) return t("rateFew");
  if (turn.answers.length > MOST) return t("rateMany", { most: MOST });
  const given = new Set(whole.map((answer) => JSON.stringify(page.messages(turn, answer.model))));
  return given.size > 1 ? t("rateDiffer") : "";
}

const order = (turn) => readOrder(by("order").value, wholeAnswers(turn).map((answer) => letterOf(turn, answer)));

/** Shows whether and how the newest answers can be rated, and what is missing. */
export function drawRating() {
  const turn = page.newest();
  by("rate").hidden = !turn || turn.answers.length < 2;
  if (by("rate").hidden) return;
  const reason = turn.rating ? t("written", turn.rating) : obstacle(turn);
  by("rate-fields").hidden = Boolean(reason);
  const fault = reason || order(turn).fault;
  by("rate-submit").disabled = isSending || Boolean(fault);
  say(fault || t("rateReady"));
}

const say = (text, kind = "") => Object.assign(by("rate-notice"), { textContent: text, className: `small ${kind}` });

async function submit() {
  const turn = page.newest();
  const { ranks, fault } = order(turn);
  if (isSending || fault || turn.rating) return;
  const annotator = by("annotator").value.trim();
  if (!annotator) {
    by("annotator").focus();
    return say(t("whoRates"), "bad");
  }
  isSending = true;
  drawRating();
  const whole = wholeAnswers(turn);
  const body = {
    messages: page.messages(turn, whole[0].model),
    responses: whole.map((answer) => answer.text),
    ranks: whole.map((answer) => ranks[letterOf(turn, answer)]),
    annotator,
  };
  let failure = "";
  try {
    const { path } = await api("/api/ratings", body);
    turn.rating = { path, ranks };
  } catch (error) {
    failure = error.status ? error.message : t("unreachable");
  }
  isSending = false;
  if (turn.rating) finish(turn);
  drawRating();
  if (failure) say(failure, "bad");
}

/** The conversation goes on from each model's best answer. */
function finish(turn) {
  by("order").value = "";
  const rank = (answer) => turn.rating.ranks[letterOf(turn, answer)] ?? Infinity;
  for (const model of new Set(turn.answers.map((answer) => answer.model))) {
    const own = turn.answers.filter((answer) => answer.model === model);
    const best = own.reduce((first, answer) => (rank(answer) < rank(first) ? answer : first));
    for (const answer of own) answer.isChosen = answer === best;
  }
  page.rated(turn);
}
