/** What the user has chosen. All of it is in the page's address, after the #. */

/** The state of a page that is opened without one; a null stack is chosen from the registry. */
export const INITIAL = {
  view: "playground",
  kind: "completion",
  prompt: "The driver shouted: you damn",
  messages: [{ role: "user", content: "Write one sentence about my rude neighbour." }],
  stack: null, // of objects as the field `steering` takes them
  ...{ max_tokens: 24, temperature: 0, top_p: 1, seed: 0 },
};

const isText = (value) => typeof value === "string";
const isNumber = (value) => value === null || Number.isFinite(value); // null: not sent
const isSteering = (value) =>
  isText(value?.intervention) && Object.values(value).every((each) => isText(each) || Number.isFinite(each));
const isList = (check) => (value) => Array.isArray(value) && value.every(check);
const CHECKS = {
  view: (value) => ["playground", "registry"].includes(value),
  kind: (value) => ["completion", "chat"].includes(value),
  prompt: isText,
  messages: isList((each) => isText(each?.role) && isText(each?.content)),
  stack: (value) => value === null || isList(isSteering)(value),
  ...Object.fromEntries(["max_tokens", "temperature", "top_p", "seed"].map((name) => [name, isNumber])),
};

/** Return the state that an address has after its #, and a sentence if not all of it can be used. */
export function fromAddress(hash) {
  const state = structuredClone(INITIAL);
  if (hash.length < 2) return [state, null];
  try {
    const given = JSON.parse(decodeURIComponent(hash.slice(1)));
    const isValid = (name) => Object.hasOwn(CHECKS, name) && CHECKS[name](given[name]);
    const wrong = Object.keys(given).filter((name) => !isValid(name));
    for (const name of Object.keys(given).filter(isValid)) state[name] = given[name];
    return [state, wrong.length ? `The link has values that cannot be used: ${wrong.join(", ")}.` : null];
  } catch {
    return [state, "The link is not whole, so the page shows what a new one does."];
  }
}

/** Return a copy with a seed: answers that draw apart would differ by chance, and look steered. */
export function seeded(state) {
  const isGiven = state.seed !== null && state.seed >= 0;
  return { ...structuredClone(state), seed: isGiven ? state.seed : Math.floor(2 ** 31 * Math.random()) };
}

let waiting = null;

/** Put a state into the page's address, soon: browsers refuse a change for each step of a slider. */
export function toAddress(state) {
  clearTimeout(waiting);
  const put = () => history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  waiting = setTimeout(put, 200);
}
