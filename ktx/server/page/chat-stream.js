// Streams one chat completion into a message.

import { call, events } from "./api.js";
import { samplingFields, systemPrompt } from "./settings.js";

/** An empty message of the assistant. `state` is running, done, stopped or failed. */
export const newAnswer = () => ({ role: "assistant", text: "", thought: "", state: "running", error: "", numbers: {} });

/** The `messages` field of the request: text only, without answers that are empty. */
function requestMessages(conversation) {
  const system = systemPrompt();
  const messages = conversation.messages.filter((message) => message.role === "user" || message.text);
  return [...(system ? [{ role: "system", content: system }] : []), ...messages.map(({ role, text }) => ({ role, content: text }))];
}

export class ChatStream {
  constructor(conversation, message, onChange) {
    Object.assign(this, { conversation, message, onChange });
    this.controller = new AbortController();
    this.started = performance.now();
    this.finishReason = null;
    this.numDeltas = 0;
  }

  /** Resolves when the answer is done, stopped or failed; never rejects. */
  async run(model) {
    const { message } = this;
    try {
      const messages = requestMessages(this.conversation);
      const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...samplingFields() };
      const response = await call("v1/chat/completions", { body, signal: this.controller.signal });
      for await (const event of events(response)) this.onEvent(event);
      message.state = "done";
    } catch (error) {
      message.state = this.controller.signal.aborted ? "stopped" : "failed";
      if (message.state === "failed") message.error = error.message;
    }
    message.numbers.seconds = this.elapsed();
    message.numbers.finish = this.finishReason;
    this.onChange();
  }

  stop() {
    this.controller.abort();
  }

  /** Seconds since the request was sent. */
  elapsed() {
    return (performance.now() - this.started) / 1000;
  }

  onEvent(event) {
    const { message } = this;
    const choice = event.choices?.[0];
    const { content, reasoning_content: reasoning } = choice?.delta ?? {};
    if (content || reasoning) {
      const { numbers } = message;
      numbers.first ??= this.elapsed();
      numbers.last = this.elapsed();
      numbers.pieces = this.numDeltas += 1;
      if (content && message.thought) numbers.thinking ??= numbers.last - numbers.first;
      message.thought += reasoning ?? "";
      message.text += content ?? "";
    }
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    if (event.usage) this.setUsage(event.usage);
    this.onChange();
  }

  setUsage(usage) {
    const { numbers } = this.message;
    numbers.prompt = usage.prompt_tokens;
    numbers.answer = usage.completion_tokens;
    numbers.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    numbers.reasoning = usage.completion_tokens_details?.reasoning_tokens ?? 0;
  }
}

/** Decode speed. Until usage arrives it counts deltas, which hold one or a few tokens. */
export function tokensPerSecond({ first, last, answer, pieces }) {
  const tokens = answer ?? pieces;
  return tokens > 1 && last > first ? (tokens - 1) / (last - first) : null;
}
