// What all pages share: language, colors, the API key, requests, and how text of a model is shown.

const COMMON = {
  en: {
    rank: "Rank", chat: "Chat", tokens: "Tokens", watch: "Watch", theme: "Colors", light: "light", dark: "dark", auto: "as the system",
    key: "This server asks for its API key:", offline: "The server does not answer. Trying again …", more: "Show all",
  },
  zh: {
    rank: "排序", chat: "对话", tokens: "词元", watch: "观察", theme: "颜色", light: "浅色", dark: "深色", auto: "跟随系统",
    key: "此服务器需要 API 密钥：", offline: "服务器没有响应，正在重试……", more: "显示全部",
  },
};

// --- Language.

let texts = {};
const known = (value) => (["en", "zh"].includes(value) ? value : null);
export let language = known(localStorage.getItem("language")) ?? (navigator.language.startsWith("zh") ? "zh" : "en");

/** The text of this name in the user's language; {name} is replaced. */
export function t(name, values = {}) {
  const text = texts[language]?.[name] ?? COMMON[language][name] ?? name;
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

/** Fills all elements that have data-t, and attributes named by data-t-placeholder and data-t-label. */
export function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
  for (const element of root.querySelectorAll("[data-t-label]")) element.setAttribute("aria-label", t(element.dataset.tLabel));
}

// --- The bar at the top.

/** Begins a page: its texts {en: {...}, zh: {...}}, its name, and what to do when the language changes. */
export function begin(pageTexts, page, redraw = () => {}) {
  texts = pageTexts;
  const theme = localStorage.getItem("theme") ?? "auto";
  document.documentElement.dataset.theme = theme;
  const bar = make("header", { className: "bar" });
  const nav = make("nav");
  const names = (document.body.dataset.pages ?? "").split(" ").filter(Boolean);
  const fill = () => {
    nav.replaceChildren(make("span", { className: "brand", textContent: "jaxllm" }));
    for (const name of names) {
      const link = make("a", { href: `/${name}`, textContent: t(name) });
      if (name === page) link.setAttribute("aria-current", "page");
      nav.append(link);
    }
    const current = colors.value || theme;
    colors.replaceChildren(...["auto", "light", "dark"].map((name) => make("option", { value: name, textContent: t(name) })));
    colors.value = current;
    colors.setAttribute("aria-label", t("theme"));
  };
  const colors = make("select", {
    onchange: () => {
      localStorage.setItem("theme", colors.value);
      document.documentElement.dataset.theme = colors.value;
    },
  });
  const languages = make("select", {
    id: "language",
    onchange: () => {
      language = languages.value;
      localStorage.setItem("language", language);
      translate();
      fill();
      redraw();
    },
  });
  languages.setAttribute("aria-label", "Language 语言");
  languages.append(make("option", { value: "en", textContent: "English" }), make("option", { value: "zh", textContent: "中文" }));
  languages.value = language;
  fill();
  bar.append(nav, languages, colors);
  document.body.prepend(bar);
  translate();
}

// --- Elements and text.

/** A new element with these properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Characters that change the direction of a line, or that nobody sees.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
const LONGEST = 20000;

/** Text as it can be looked at: characters without a shape are shown by their number. */
export function visible(text) {
  return text.replace(HIDDEN, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

/** Shows text of a model in an element: never as markup, and only the beginning if it is very long. */
export function show(element, text) {
  const shown = visible(text.slice(0, LONGEST));
  element.classList.add("text");
  element.textContent = shown;
  if (text.length > LONGEST) {
    const more = make("button", { textContent: `${t("more")} (${text.length})`, onclick: () => (element.textContent = visible(text)) });
    element.append(" … ", more);
  }
}

// --- Requests.

const hash = new URLSearchParams(location.hash.slice(1));
if (hash.has("key")) {
  // The part after # is not sent to anyone; it is taken out of the address bar too.
  sessionStorage.setItem("key", hash.get("key"));
  history.replaceState(null, "", location.pathname + location.search);
}

/** fetch with the API key; asks for one if the server wants it. */
export async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    const key = sessionStorage.getItem("key");
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    const given = prompt(t("key"));
    if (!given) return response;
    sessionStorage.setItem("key", given);
  }
}

/** The JSON answer to a request; body: sent as JSON. Throws an Error with the server's message. */
export async function api(path, body = undefined, options = {}) {
  const sent = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await request(path, { ...sent, ...options });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(answer.error?.message ?? `HTTP ${response.status}`);
    error.status = response.status;
    throw error;
  }
  return answer;
}

/** `api`, again and again while the server does not answer; `notice` is told. */
export async function persistent(path, body, notice) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      return await api(path, body);
    } catch (error) {
      if (error.status) throw error;
      notice(t("offline"));
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }
}
