// A short notification that disappears after a timeout, with at most one action.

import { byId, make } from "./dom.js";

const TIMEOUT_MS = 8000;
let timer = 0;

export function toast(message, label = "", action = () => {}) {
  const element = byId("toast");
  const hide = () => {
    element.hidden = true;
    element.replaceChildren();
  };
  const button = label && make("button", { type: "button", class: "quiet", click: () => (hide(), action()) }, label);
  element.replaceChildren(message, ...(button ? [" ", button] : []));
  element.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, TIMEOUT_MS);
}
