// A word at the foot of the page that goes away by itself, with one thing to do about it if there is any.

import { byId, make } from "./dom.js";

const SHOWN = 8000; // milliseconds
let going = 0;

export function toast(words, name = "", act = () => {}) {
  const place = byId("toast");
  const hide = () => {
    place.hidden = true;
    place.replaceChildren();
  };
  const button = name && make("button", { type: "button", class: "quiet", click: () => (hide(), act()) }, name);
  place.replaceChildren(words, ...(button ? [" ", button] : []));
  place.hidden = false;
  clearTimeout(going);
  going = setTimeout(hide, SHOWN);
}
