// The entry point: tabs, theme, keyboard, server status.

import { call } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { seconds } from "./format.js";
import { Machine } from "./machine.js";
import { startSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { readCurrent, writeTheme } from "./store.js";

const THEMES = { "": "system", light: "light", dark: "dark" };
const POLL_INTERVAL_MS = 1000; // of /health while the model loads

const sidebar = new Sidebar();
const chat = new Chat((id) => sidebar.draw(id));
sidebar.chat = chat;
chat.show(readCurrent());
const machine = new Machine(byId("machine"));

startTabs();
startTheme();
startSettings();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
byId("state-retry").addEventListener("click", connect);
chat.setModel(null);
byId("question").focus();
connect();

function startTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const select = (selected) => {
    for (const tab of tabs) {
      const on = tab === selected;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !on;
    }
    machine.setSelected(selected.id === "tab-machine");
    history.replaceState(null, "", selected.id === "tab-machine" ? "#machine" : location.pathname);
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -tabs.indexOf(tab), End: tabs.length - 1 - tabs.indexOf(tab) };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = tabs.at((tabs.indexOf(tab) + steps[event.key]) % tabs.length);
      select(next);
      next.focus();
    });
  }
  if (location.hash === "#machine") select(byId("tab-machine"));
}

function startTheme() {
  const root = document.documentElement;
  const button = byId("theme");
  const show = () => {
    const theme = root.dataset.theme ?? "";
    button.textContent = { "": "◐", light: "○", dark: "●" }[theme];
    button.title = `Theme: ${THEMES[theme]}`;
    button.setAttribute("aria-label", button.title);
  };
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(root.dataset.theme ?? "") + 1) % names.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    writeTheme(next);
    show();
    machine.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => machine.redraw());
  show();
}

/** Polls /health until the server is ready, then requests its model. */
async function connect() {
  for (;;) {
    const state = await health();
    showState(state);
    if (!state) break;
    await new Promise((resolve) => setTimeout(resolve, POLL_INTERVAL_MS));
  }
  try {
    const model = (await (await call("v1/models")).json()).data[0];
    byId("model").textContent = model.id;
    chat.setModel({ id: model.id, context: model.max_model_len });
  } catch (error) {
    showState({ text: error.message, retry: true });
  }
}

/** The state to show, as {text, percent}, or null if the server is ready. */
async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) return null;
    const { status, percent, eta_seconds: left, error } = await response.json();
    if (status !== "loading") return { text: `The server has failed: ${error?.message ?? response.status}` };
    return { text: `Loading the model: ${Math.round(percent)} %${left === null ? "" : `, about ${seconds(left)} left`}.`, percent };
  } catch (error) {
    return { text: `The server cannot be reached (${error.message}). Retrying.` };
  }
}

function showState(state) {
  if (byId("state").hidden === Boolean(state)) byId("announcer").textContent = state ? state.text : "The server is ready.";
  byId("state").hidden = !state;
  byId("state-text").textContent = state?.text ?? "";
  byId("state-progress").hidden = state?.percent === undefined;
  byId("state-progress").value = state?.percent ?? 0;
  byId("state-retry").hidden = !state?.retry;
}
