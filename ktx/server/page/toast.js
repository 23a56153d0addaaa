// A short notification that disappears after a timeout, with at most one action.

import { button, byId } from "./dom.js";

const TIMEOUT_MS = 8000;
let timer = 0;

export function toast(message, label = "", action = () => {}) {
  const element = byId("toast");
  const hide = () => {
    element.hidden = true;
    element.replaceChildren();
  };
  element.replaceChildren(message, ...(label ? [" ", button(label, () => (hide(), action()))] : []));
  element.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, TIMEOUT_MS);
}
