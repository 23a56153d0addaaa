// Conversations and settings in the browser's storage, bounded. If several tabs write a conversation, the last write wins.

const LIST_KEY = "ktx.list";
const KEY_PREFIX = "ktx.talk."; // followed by the conversation's id
const MAX_CONVERSATIONS = 100;
const MAX_CHARS = 4_000_000; // of all conversations; browsers store about five million
const fallback = new Map(); // values that the browser did not store

const get = (key) => {
  try {
    return localStorage.getItem(key) ?? fallback.get(key) ?? null;
  } catch {
    return fallback.get(key) ?? null;
  }
};

const parse = (text, otherwise) => {
  try {
    return JSON.parse(text) ?? otherwise;
  } catch {
    return otherwise; // not written by this page
  }
};

function put(key, text) {
  try {
    localStorage.setItem(key, text);
    fallback.delete(key);
    return true;
  } catch {
    fallback.set(key, text);
    return false;
  }
}

function drop(key) {
  fallback.delete(key);
  try {
    localStorage.removeItem(key);
  } catch {
    return; // no storage
  }
}

/** The stored conversations as [{id, title, size}], latest first; `size` is in characters. */
export function list() {
  const entries = parse(get(LIST_KEY), []);
  return Array.isArray(entries) ? entries.filter((entry) => typeof entry?.id === "string") : [];
}

/** A conversation, or null. An answer that was running when the page was closed is marked as stopped. */
export function read(id) {
  const conversation = parse(get(KEY_PREFIX + id), null);
  if (!Array.isArray(conversation?.messages)) return null;
  for (const message of conversation.messages) if (message.state === "running") message.state = "stopped";
  return conversation;
}

/** Stores a conversation and evicts the oldest that no longer fit. Returns whether it was stored. */
export function write(conversation) {
  const text = JSON.stringify(conversation);
  const entries = list();
  const index = entries.findIndex((entry) => entry.id === conversation.id);
  if (index >= 0) entries.splice(index, 1);
  entries.unshift({ id: conversation.id, title: conversation.title, size: text.length });
  let chars = 0;
  const retained = entries.filter(({ id, size }, i) => (i < MAX_CONVERSATIONS && (chars += size) <= MAX_CHARS) || id === conversation.id);
  entries.filter((entry) => !retained.includes(entry)).forEach((entry) => drop(KEY_PREFIX + entry.id));
  let stored = put(KEY_PREFIX + conversation.id, text);
  while (!stored && retained.length > 1) {
    drop(KEY_PREFIX + retained.pop().id);
    stored = put(KEY_PREFIX + conversation.id, text);
  }
  return put(LIST_KEY, JSON.stringify(retained)) && stored;
}

export function rename(id, title) {
  const conversation = read(id);
  if (conversation) put(KEY_PREFIX + id, JSON.stringify({ ...conversation, title }));
  put(LIST_KEY, JSON.stringify(list().map((entry) => (entry.id === id ? { ...entry, title } : entry))));
}

export function remove(id) {
  drop(KEY_PREFIX + id);
  put(LIST_KEY, JSON.stringify(list().filter((entry) => entry.id !== id)));
}

export const readSettings = () => parse(get("ktx.settings"), {});
export const writeSettings = (settings) => put("ktx.settings", JSON.stringify(settings));
export const writeTheme = (theme) => (theme ? put("ktx.theme", theme) : drop("ktx.theme"));

/** The id of the conversation that this tab showed last, or null. */
export const readCurrent = () => {
  try {
    return sessionStorage.getItem("ktx.shown");
  } catch {
    return null;
  }
};

export function writeCurrent(id) {
  try {
    sessionStorage.setItem("ktx.shown", id);
  } catch (error) {
    console.info("No session storage; reloading starts a new conversation:", error.message);
  }
}
