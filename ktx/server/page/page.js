// Where the page begins: views, theme, keys, and what the server says of itself.

import { call } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { List } from "./sidebar.js";
import { Machine } from "./machine.js";
import { startSettings } from "./settings.js";
import { shownBefore, writeTheme } from "./store.js";
import { seconds } from "./format.js";

const THEMES = { "": "as the system", light: "light", dark: "dark" };
const WAIT = 1000; // milliseconds between two questions after the server's state

const list = new List();
const chat = new Chat((id) => list.draw(id));
list.chat = chat;
chat.show(shownBefore());
const machine = new Machine(byId("machine"));

startTabs();
startTheme();
startSettings();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
byId("state-retry").addEventListener("click", watch);
chat.meet(null);
byId("question").focus();
watch();

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !on;
    }
    machine.visible(chosen.id === "tab-machine");
    history.replaceState(null, "", chosen.id === "tab-machine" ? "#machine" : location.pathname);
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -tabs.indexOf(tab), End: tabs.length - 1 - tabs.indexOf(tab) };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = tabs.at((tabs.indexOf(tab) + steps[event.key]) % tabs.length);
      choose(next);
      next.focus();
    });
  }
  if (location.hash === "#machine") choose(byId("tab-machine"));
}

function startTheme() {
  const button = byId("theme");
  const show = () => {
    const theme = document.documentElement.dataset.theme ?? "";
    button.textContent = { "": "◐", light: "○", dark: "●" }[theme];
    button.title = `Theme: ${THEMES[theme]}`;
    button.setAttribute("aria-label", button.title);
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    writeTheme(next);
    show();
    machine.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => machine.redraw());
  show();
}

/** Asks how the server is until it is well, then for its model. */
async function watch() {
  for (;;) {
    const state = await health();
    tell(state);
    if (!state) break;
    await new Promise((resolve) => setTimeout(resolve, WAIT));
  }
  try {
    const found = (await (await call("v1/models")).json()).data[0];
    byId("model").textContent = found.id;
    chat.meet({ id: found.id, context: found.max_model_len });
  } catch (error) {
    tell({ words: error.message, retry: true });
  }
}

/** Null when the server is well, else what is to be told: {words, percent}. */
async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) return null;
    const { status, percent, eta_seconds: left, error } = await response.json();
    if (status !== "loading") return { words: `The server is in trouble: ${error?.message ?? response.status}` };
    return { words: `Loading the model: ${Math.round(percent)} %${left === null ? "" : `, about ${seconds(left)} left`}.`, percent };
  } catch (error) {
    return { words: `The server cannot be reached (${error.message}). This page goes on trying.` };
  }
}

function tell(state) {
  if (byId("state").hidden === Boolean(state)) byId("said").textContent = state ? state.words : "The server is ready.";
  byId("state").hidden = !state;
  byId("state-words").textContent = state?.words ?? "";
  byId("state-progress").hidden = state?.percent === undefined;
  byId("state-progress").value = state?.percent ?? 0;
  byId("state-retry").hidden = !state?.retry;
}
