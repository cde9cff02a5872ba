/** Speaks to the server by its public API. Keys are kept for the tab only. */

const KEY = "steerserve.key";
const ADMIN_KEY = "steerserve.adminKey";

/** An error that the API has answered with: its sentence, and the field that it names. */
export class ApiError extends Error {
  constructor(status, { message, param, code }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code });
    this.retryAfter = retryAfter === null ? null : Number(retryAfter); // seconds
  }
}

/** The server could not be reached, or its answer has broken off. */
export class GoneError extends Error {}

/** Return the address of a path of this server; a proxy may have put a path before the page's. */
export const address = (path) => new URL(path, location.href).href;

export const keys = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  admin: () => sessionStorage.getItem(ADMIN_KEY) ?? "",
  set(key, adminKey) {
    sessionStorage.setItem(KEY, key);
    sessionStorage.setItem(ADMIN_KEY, adminKey);
  },
};

/** Return the body of an answer; throw ApiError, GoneError, or an AbortError once `signal` aborts. */
export async function request(path, { body, form, signal } = {}) {
  const response = await send(path, { body, form, signal });
  return reached(() => response.json());
}

/** Yield the events of a stream, and throw as `request` does. */
export async function* events(path, body, signal) {
  const response = await send(path, { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const sentence = "The server has gone in the middle of its answer.";
  for (let rest = ""; ; ) {
    const { done, value } = await reached(() => reader.read(), sentence);
    if (done) throw new GoneError(sentence); // a whole stream ends with [DONE]
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(response.status, chunk.error);
      yield chunk;
    }
  }
}

async function send(path, { body, form, signal }) {
  const headers = {};
  const key = (form && keys.admin()) || keys.get(); // forms are uploads
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const method = body || form ? "POST" : "GET";
  const sent = { method, headers, signal, body: body ? JSON.stringify(body) : form };
  const response = await reached(() => fetch(address(path), sent));
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const plain = { message: `The server answered with the status ${response.status}.` };
  throw new ApiError(response.status, answer?.error ?? plain, response.headers.get("Retry-After"));
}

/** Return what a call of the network returns; browsers throw a TypeError where nothing comes. */
async function reached(call, sentence = "The server cannot be reached.") {
  try {
    return await call();
  } catch (error) {
    throw error instanceof TypeError ? new GoneError(sentence) : error;
  }
}
