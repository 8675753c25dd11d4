// Answers as they come: server-sent events of /v1/chat/completions and /v1/completions.

import { request, t } from "./common.js";

/** The events of a request that streams. Throws an Error with the server's message. */
export async function* events(path, body, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await request(path, options).catch(unreachable);
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) throw new Error(t("cut"));
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** What a browser throws if the network fails says little. */
function unreachable(error) {
  throw error instanceof TypeError ? new Error(t("unreachable")) : error;
}

async function refusal(response) {
  const answer = await response.json().catch(() => ({}));
  return new Error(answer.error?.message ?? `HTTP ${response.status}`);
}

/** One answer of several to a message, of the many fields that it will have. */
export const newAnswer = (model, choice) => ({ model, choice, text: "", finish: null, error: "", tokens: 0, seconds: 0, isChosen: choice === 0 });

/** Requests under way: answer -> what ends it. */
const running = new Map();

export const isRunning = (answer) => running.has(answer);
export const anyRunning = () => running.size > 0;

/** Ends an answer. Those of one request end together on the server; on the page each can end by itself. */
export function stop(answer) {
  if (!running.has(answer)) return;
  const { abort, changed } = running.get(answer);
  end(answer, "stopped");
  changed(answer);
  if (![...running.values()].some((other) => other.abort === abort)) abort.abort();
}

export function stopAll() {
  for (const answer of [...running.keys()]) stop(answer);
}

function end(answer, finish, error = "") {
  answer.finish = finish;
  answer.error = error;
  running.delete(answer);
}

/** Fills the answers of one model from one request; `changed` is told of each answer that has got something. */
export async function fill(answers, path, body, changed) {
  const abort = new AbortController();
  const begin = performance.now();
  for (const answer of answers) running.set(answer, { abort, changed });
  // With their log-probabilities tokens can be counted: a part of the stream has several.
  const sent = { ...body, logprobs: path.includes("chat") ? true : 0, stream: true };
  let fault = t("cut"); // of answers that have not ended when the stream has
  try {
    for await (const event of events(path, sent, abort.signal)) {
      for (const part of event.choices) {
        const answer = answers.find((each) => each.choice === part.index);
        if (running.has(answer)) add(answer, part, performance.now() - begin, changed);
      }
    }
  } catch (error) {
    fault = error.message;
  }
  for (const answer of answers.filter(isRunning)) {
    end(answer, "error", fault);
    changed(answer);
  }
}

function add(answer, part, milliseconds, changed) {
  answer.text += part.delta?.content ?? part.text ?? "";
  answer.tokens += (part.logprobs?.content ?? part.logprobs?.tokens ?? []).length;
  answer.seconds = milliseconds / 1000;
  if (part.finish_reason) end(answer, part.finish_reason);
  changed(answer);
}
