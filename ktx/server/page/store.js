// Conversations and settings in this browser: bounded, and of several tabs the last writer of a conversation counts.

const LIST = "ktx.list";
const TALK = "ktx.talk.";
const MOST = 100; // conversations
const LETTERS = 4_000_000; // of all of them together; browsers keep about five million
const unkept = new Map(); // what a browser without storage holds until the page is left

const get = (name) => {
  try {
    return localStorage.getItem(name) ?? unkept.get(name) ?? null;
  } catch {
    return unkept.get(name) ?? null;
  }
};

const parsed = (text, otherwise) => {
  try {
    return JSON.parse(text) ?? otherwise;
  } catch {
    return otherwise; // something else wrote there
  }
};

function put(name, text) {
  try {
    localStorage.setItem(name, text);
    unkept.delete(name);
    return true;
  } catch {
    unkept.set(name, text);
    return false;
  }
}

function drop(name) {
  unkept.delete(name);
  try {
    localStorage.removeItem(name);
  } catch {
    return; // a browser that keeps nothing
  }
}

/** [{id, title, size}], the latest first. */
export function list() {
  const found = parsed(get(LIST), []);
  return Array.isArray(found) ? found.filter((one) => typeof one?.id === "string") : [];
}

/** A conversation, or null. An answer that was running when the page was left has stopped. */
export function read(id) {
  const talk = parsed(get(TALK + id), null);
  if (!Array.isArray(talk?.messages)) return null;
  for (const message of talk.messages) if (message.state === "running") message.state = "stopped";
  return talk;
}

/** Writes a conversation and forgets the oldest ones that no longer fit. Whether the browser kept it. */
export function write(talk) {
  const text = JSON.stringify(talk);
  const before = list();
  const place = before.findIndex((one) => one.id === talk.id);
  if (place >= 0) before.splice(place, 1);
  before.unshift({ id: talk.id, title: talk.title, size: text.length });
  let sum = 0;
  const kept = before.filter((one, i) => (i < MOST && (sum += one.size) <= LETTERS) || one.id === talk.id);
  before.filter((one) => !kept.includes(one)).forEach((one) => drop(TALK + one.id));
  let done = put(TALK + talk.id, text);
  while (!done && kept.length > 1) {
    drop(TALK + kept.pop().id);
    done = put(TALK + talk.id, text);
  }
  return put(LIST, JSON.stringify(kept)) && done;
}

export function rename(id, title) {
  const talk = read(id);
  if (talk) put(TALK + id, JSON.stringify({ ...talk, title }));
  put(LIST, JSON.stringify(list().map((one) => (one.id === id ? { ...one, title } : one))));
}

export function forget(id) {
  drop(TALK + id);
  put(LIST, JSON.stringify(list().filter((one) => one.id !== id)));
}

export const readSettings = () => parsed(get("ktx.settings"), {});
export const writeSettings = (settings) => put("ktx.settings", JSON.stringify(settings));
export const writeTheme = (theme) => (theme ? put("ktx.theme", theme) : drop("ktx.theme"));

/** The conversation that this tab showed before it was loaded anew. */
export const shownBefore = () => {
  try {
    return sessionStorage.getItem("ktx.shown");
  } catch {
    return null;
  }
};

export function rememberShown(id) {
  try {
    sessionStorage.setItem("ktx.shown", id);
  } catch (error) {
    console.info("This page begins with a new conversation each time:", error.message);
  }
}
