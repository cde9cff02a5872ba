/** Makes requests of the state, and text for those who want to send them elsewhere. */

import { address, events, keys } from "./api.js";

export const ALTERNATIVES = 5; // of each token

/** Return the path and the body that ask for an answer; an undefined steering is not sent. */
export function asked(state, model, steering) {
  const isChat = state.kind === "chat";
  const { prompt, messages, max_tokens, temperature, top_p, seed } = state;
  const body = { model, ...(isChat ? { messages } : { prompt }) };
  for (const [name, value] of Object.entries({ max_tokens, temperature, top_p, seed }))
    if (value !== null) body[name] = value;
  if (steering !== undefined) body.steering = steering;
  return { path: isChat ? "v1/chat/completions" : "v1/completions", body };
}

/** Return a request with what a stream needs to be coloured, and scored if the server scores. */
export function traced({ path, body }, toxicity) {
  const inChat = { logprobs: true, top_logprobs: ALTERNATIVES };
  const traces = body.messages ? inChat : { logprobs: ALTERNATIVES };
  const stream = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  return { path, body: { ...body, ...traces, ...stream, ...(toxicity ? { toxicity } : {}) } };
}

/** Stream an answer, with the log-probabilities of its tokens; `onText` gets each piece of its text. */
export async function stream({ path, body }, signal, onText) {
  const begun = performance.now();
  const answer = { text: "", tokens: [], ids: [], promptIds: null, firstToken: null };
  for await (const chunk of events(path, body, signal)) {
    answer.usage = chunk.usage ?? answer.usage;
    answer.toxicity = chunk.toxicity?.[0] ?? answer.toxicity;
    answer.steering = chunk.steering ?? answer.steering;
    for (const choice of chunk.choices) {
      answer.promptIds ??= choice.prompt_token_ids ?? chunk.prompt_token_ids ?? null;
      answer.reason = choice.finish_reason ?? answer.reason;
      answer.ids.push(...(choice.token_ids ?? []));
      answer.tokens.push(...tokensOf(choice.logprobs));
      if (choice.token_ids?.length) answer.firstToken ??= (performance.now() - begun) / 1000;
      const text = choice.text ?? textOf(choice.delta);
      if (text) onText(text);
      answer.text += text;
    }
  }
  return answer;
}

/** Return all that a message says; a model that reasons says that first. */
export const textOf = (message) => (message.reasoning_content ?? "") + (message.content ?? "");

/** Return a choice's tokens, in one form for completions and for chats. */
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, bytes, top_logprobs }) => ({
      text: token,
      logprob,
      bytes,
      top: top_logprobs.map((each) => [each.token, each.logprob]),
    }));
  }
  return logprobs.tokens.map((text, place) => ({
    text,
    logprob: logprobs.token_logprobs[place],
    offset: logprobs.text_offset[place],
    top: Object.entries(logprobs.top_logprobs[place] ?? {}).sort(([, one], [, other]) => other - one),
  }));
}

/** Return what each token adds to the answer's text: a character of several tokens is the last one's. */
export function piecesOf({ text, tokens }) {
  const decoder = new TextDecoder();
  const characters = [...text]; // offsets count whole characters
  const piece = ({ bytes, offset }, place) =>
    bytes
      ? decoder.decode(new Uint8Array(bytes), { stream: true })
      : characters.slice(offset, tokens[place + 1]?.offset).join("");
  return tokens.map(piece);
}

/** Return a command for a shell that sends the request. */
export function asCurl({ path, body }) {
  const key = keys.get() ? ` -H "Authorization: Bearer $OPENAI_API_KEY"` : "";
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return `curl -gN '${address(path)}' -H 'Content-Type: application/json'${key} -d '${quoted}'`;
}

/** Return a program that sends the request by OpenAI's client. */
export function asPython({ path, body: { model, prompt, messages, stream, ...others } }) {
  const [call, piece] = messages ? ["chat.completions", "delta.content"] : ["completions", "text"];
  const asking = messages ? `messages=${python(messages)}` : `prompt=${python(prompt)}`;
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${python(address("v1"))}, api_key=os.environ.get("OPENAI_API_KEY", "none"))
chunks = client.${call}.create(
    model=${python(model)},
    ${asking},
    stream=${python(stream)},
    extra_body=${python(others)},
)
for chunk in chunks:
    if chunk.choices:
        print(chunk.choices[0].${piece} or "", end="", flush=True)
`;
}

function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Object.entries(value).map(([name, item]) => `${python(name)}: ${python(item)}`);
  return `{${items.join(", ")}}`;
}
