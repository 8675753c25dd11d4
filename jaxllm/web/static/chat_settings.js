// Settings of the Chat page: how answers are drawn. They are remembered, and become a config or a command line.

import { make, t } from "./common.js";

// name: as the server reads it. config: as SamplingConfig names it. initial: what an empty field stands for.
const NUMBERS = [
  { name: "temperature", config: "temperature", initial: 1, min: 0, max: 100, step: 0.1 },
  { name: "top_p", config: "top_p", initial: 1, min: 0, max: 1, step: 0.05 },
  { name: "top_k", config: "top_k", initial: 0, min: 0, step: 1 },
  { name: "min_p", config: "min_p", initial: 0, min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", config: "max_new_tokens", min: 1, step: 1 },
  { name: "repetition_penalty", config: "repetition_penalty", initial: 1, min: 0, step: 0.05 },
  { name: "presence_penalty", config: "presence_penalty", initial: 0, min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", config: "frequency_penalty", initial: 0, min: -2, max: 2, step: 0.1 },
  { name: "seed", step: 1 },
];
const MOST_ANSWERS = 4;
const KEY = "chat";

const by = (id) => document.getElementById(id);
const isWhole = ({ step }) => step === 1;

/** What is remembered: the texts of the fields by their names, and what the page keeps beside them. */
export const remembered = JSON.parse(localStorage.getItem(KEY) ?? "{}");

export function remember(values) {
  Object.assign(remembered, values);
  localStorage.setItem(KEY, JSON.stringify(remembered));
}

// --- Fields.

const fieldOf = (name) => by(`set-${name}`);
const names = () => ["system", ...NUMBERS.map(({ name }) => name), "stop", "n"];

function label(name, field, className = "") {
  field.id = `set-${name}`;
  field.value = remembered[name] ?? field.value;
  field.addEventListener("input", () => remember({ [name]: field.value }));
  const words = make("span");
  words.dataset.t = name;
  return make("label", { className }, words, field);
}

function numberField(number) {
  const { initial = "", min = "", max = "", step } = number;
  // A number between two steps is as good.
  const field = make("input", { type: "number", min, max, step: isWhole(number) ? 1 : "any", placeholder: initial, inputMode: "decimal" });
  return label(number.name, field);
}

/** Makes the fields; their names come with `translate`. */
export function makeFields() {
  const counts = Array.from({ length: MOST_ANSWERS }, (_, i) => make("option", { value: i + 1, textContent: i + 1 }));
  by("fields").append(
    label("system", make("textarea", { rows: 2 }), "wide"),
    ...NUMBERS.map(numberField),
    label("n", make("select", {}, ...counts)),
    label("stop", make("textarea", { rows: 2, spellcheck: false }), "wide"),
  );
}

export function resetFields() {
  for (const name of names()) {
    fieldOf(name).value = name === "n" ? "1" : "";
    delete remembered[name];
  }
  remember({});
}

/** The first field that holds no valid value, with its fault; null: all do. */
export function invalidField() {
  const field = names().map(fieldOf).find((each) => !each.checkValidity());
  return field ? { field, message: `${field.labels[0].firstChild.textContent}: ${field.validationMessage}` } : null;
}

// --- What they say.

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
const stopTexts = () =>
  fieldOf("stop")
    .value.split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (escape) => ESCAPES[escape]));

/** The fields of a request that are not as the server has them anyway. */
export function samplingFields() {
  const given = NUMBERS.filter(({ name }) => fieldOf(name).value !== "").map(({ name }) => [name, Number(fieldOf(name).value)]);
  const fields = Object.fromEntries(given);
  if (stopTexts().length) fields.stop = stopTexts();
  if (numAnswers() > 1) fields.n = numAnswers();
  return fields;
}

export const numAnswers = () => Number(fieldOf("n").value);
export const systemPrompt = () => fieldOf("system").value;

// --- For use elsewhere.

/** The settings as a part of a config. */
export function asConfig() {
  const lines = NUMBERS.filter(({ config }) => config).flatMap(({ name, config, initial }) => {
    const value = fieldOf(name).value === "" ? initial : Number(fieldOf(name).value);
    return value === undefined ? [] : [`    ${config}: ${value}`];
  });
  return ["sample:", "  sampling:", ...lines].join("\n") + "\n";
}

/** A request as a command for a terminal. */
export function asCurl(path, body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${location.origin}${path}`, "-H 'Content-Type: application/json'"];
  if (sessionStorage.getItem("key")) parts.push('-H "Authorization: Bearer $JAXLLM_API_KEY"');
  return [...parts, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ") + "\n";
}

/** Shows a text to be copied, and copies it if the browser lets us. */
export async function offer(text) {
  by("copied").hidden = false;
  by("copied").value = text;
  by("copied").select();
  // There is no clipboard on pages without https, and the user may have refused it.
  const isCopied = await (navigator.clipboard?.writeText(text) ?? Promise.reject()).then(() => true, () => false);
  by("copy-notice").textContent = t(isCopied ? "copiedNotice" : "copyYourself");
}
