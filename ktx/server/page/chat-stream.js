// One answer: asks for it, reads the stream into a message, and says when something has changed.

import { call, events } from "./api.js";
import { asked, systemPrompt } from "./settings.js";

/** A new message of the assistant's. `state`: running, done, stopped or failed. */
export const emptyAnswer = () => ({ role: "assistant", text: "", thought: "", state: "running", error: "", numbers: {} });

/** What of a conversation is sent: texts alone, without answers that hold none. */
function history(talk) {
  const system = systemPrompt();
  const said = talk.messages.filter((message) => message.role === "user" || message.text);
  return [...(system ? [{ role: "system", content: system }] : []), ...said.map(({ role, text }) => ({ role, content: text }))];
}

export class Answering {
  constructor(talk, message, changed) {
    Object.assign(this, { talk, message, changed });
    this.abort = new AbortController();
    this.started = performance.now();
    this.finish = null;
    this.pieces = 0;
  }

  /** Resolves when the answer has ended, however it did. */
  async run(model) {
    const { message } = this;
    try {
      const body = { model, messages: history(this.talk), stream: true, stream_options: { include_usage: true }, ...asked() };
      const response = await call("v1/chat/completions", { body, signal: this.abort.signal });
      for await (const event of events(response)) this.hear(event);
      message.state = "done";
    } catch (error) {
      message.state = this.abort.signal.aborted ? "stopped" : "failed";
      if (message.state === "failed") message.error = error.message;
    }
    message.numbers.seconds = this.elapsed();
    message.numbers.finish = this.finish;
    this.changed();
  }

  stop() {
    this.abort.abort();
  }

  elapsed() {
    return (performance.now() - this.started) / 1000;
  }

  hear(event) {
    const { message } = this;
    const choice = event.choices?.[0];
    const { content, reasoning_content: thought } = choice?.delta ?? {};
    if (content || thought) {
      const { numbers } = message;
      numbers.first ??= this.elapsed();
      numbers.last = this.elapsed();
      numbers.pieces = this.pieces += 1;
      if (content && message.thought) numbers.thinking ??= numbers.last - numbers.first;
      message.thought += thought ?? "";
      message.text += content ?? "";
    }
    this.finish = choice?.finish_reason ?? this.finish;
    if (event.usage) this.count(event.usage);
    this.changed();
  }

  count(usage) {
    const { numbers } = this.message;
    numbers.prompt = usage.prompt_tokens;
    numbers.answer = usage.completion_tokens;
    numbers.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    numbers.reasoning = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  }
}

/** Tokens a second from the first to the last; while it runs, pieces of the stream, of which each is a token or a few. */
export function speed({ first, last, answer, pieces }) {
  const tokens = answer ?? pieces;
  return tokens > 1 && last > first ? (tokens - 1) / (last - first) : null;
}
