// The settings dialog. Empty fields are left out of the request.

import { byId } from "./dom.js";
import { readSettings, writeSettings } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "system", "thinking"];
const THINKING = { on: true, off: false };

/** The request fields that the settings set. */
export function samplingFields() {
  const settings = readSettings();
  const fields = {};
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) fields[name] = settings[name];
  if (settings.thinking in THINKING) {
    const on = THINKING[settings.thinking];
    fields.chat_template_kwargs = { enable_thinking: on, thinking: on }; // model families use either name
  }
  return fields;
}

export const systemPrompt = () => String(readSettings().system ?? "");

export function startSettings() {
  const [dialog, form] = [byId("settings"), byId("settings-form")];
  const show = () => {
    const settings = readSettings();
    for (const name of FIELDS) form.elements[name].value = settings[name] ?? "";
  };
  const save = () => {
    const settings = {};
    for (const name of NUMBERS) {
      const field = form.elements[name];
      if (field.value !== "" && field.validity.valid) settings[name] = field.valueAsNumber;
    }
    for (const name of ["system", "thinking"]) if (form.elements[name].value) settings[name] = form.elements[name].value;
    writeSettings(settings);
  };
  form.addEventListener("input", save);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
  });
  byId("reset-settings").addEventListener("click", () => {
    writeSettings({});
    show();
  });
  byId("open-settings").addEventListener("click", () => {
    show();
    dialog.showModal();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // a click outside the form
}
