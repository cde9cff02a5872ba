/** Puts the page together: loads what the server has, runs requests, remembers what was done. */

import { keys, request } from "./api.js";
import { showPanes, applied } from "./answers.js";
import { showAsk } from "./ask.js";
import { button, el, find, rounded } from "./dom.js";
import { clearErrors, showError } from "./errors.js";
import { showRegistry } from "./registry.js";
import { asCurl, asked, asPython, stream, traced } from "./requests.js";
import { showStack, steeringOf } from "./stack.js";
import { fromAddress, fromValue, toAddress } from "./state.js";
import { showSweep } from "./sweep.js";
import { showTokens } from "./tokens.js";

const HISTORY = "steerserve.history";
const REMEMBERED = 20; // runs
const FIRST = "detox-argre"; // the intervention that a new page shows, if the server has it
const POLICIES = {
  optional: "",
  required: "This server requires steering: there is no base model to compare with.",
  locked: "This server's steering is locked: a request can neither change nor drop it.",
};

let state = fromAddress(location.hash);
let server = null; // the model, the interventions and the policy
let running = null; // the AbortController of the run
let sent = null; // the request of the last steered answer

async function load() {
  clearErrors();
  try {
    const [models, interventions, policy] = await Promise.all(
      ["v1/models", "v1/interventions", "v1/steering"].map((path) => request(path)),
    );
    server = { model: models.data[0].id, interventions: interventions.data, policy };
    find("keys").hidden = true;
    show();
  } catch (error) {
    fail(error);
  }
}

/** Show the state. */
function show() {
  const { interventions, policy } = server;
  const servable = interventions.filter((each) => each.servable);
  const first = servable.find((each) => each.name === FIRST) ?? servable[0];
  state.stack ??= first ? [steeringOf(first)] : [];
  const isLocked = policy.policy === "locked";
  find("model").replaceChildren(server.model);
  find("policy").hidden = policy.policy === "optional";
  find("policy").replaceChildren(POLICIES[policy.policy], isLocked ? applied(policy.default) : "");
  find("stack").hidden = find("adding").hidden = isLocked;
  showAsk(state, remember);
  showStack(state, interventions, policy.max_interventions, () => {
    remember();
    showSweep(state, server, fail);
  });
  showSweep(state, server, fail);
  showRegistry(interventions, stored, fail);
  showHistory();
  for (const view of ["playground", "registry"]) {
    find(view).hidden = state.view !== view;
    find(`show-${view}`).ariaPressed = String(state.view === view);
  }
}

const remember = () => toAddress(state);

async function stored(sentence) {
  await load();
  find("registry").append(el("p", { role: "status" }, sentence));
}

function fail(error) {
  if (error.name === "AbortError") return;
  if ([401, 403].includes(error.status) && error.code !== "steering_locked") find("keys").hidden = false;
  showError(error);
}

/** Stream the answers, then colour the steered one, all of it until `running` is aborted. */
async function run() {
  running?.abort();
  clearErrors();
  remember();
  const [of, policy, controller] = [structuredClone(state), server.policy, new AbortController()];
  const request = (steering) => traced(asked(of, server.model, steering), policy.toxicity);
  sent = request(policy.policy === "locked" ? undefined : of.stack);
  const requests = policy.comparison ? [request(null), sent] : [sent];
  const titles = ["Base model", "Steered model"].slice(-requests.length);
  const panes = showPanes(titles, of);
  running = controller;
  setRunning(true);
  find("tokens").hidden = true;
  const answering = requests.map((each, place) => answer(each, panes[place], controller));
  const answers = await Promise.all(answering);
  const steered = answers.at(-1);
  try {
    if (steered && policy.comparison)
      await showTokens(steered, panes.at(-1), server.model, controller.signal);
  } catch (error) {
    fail(error);
  }
  if (steered) record(of, answers);
  if (running === controller) setRunning(false);
}

async function answer(asking, pane, controller) {
  try {
    const answered = await stream(asking, controller.signal, (text) => pane.append(text));
    pane.finish(answered);
    return answered;
  } catch (error) {
    pane.fail(error.name === "AbortError" ? "Stopped." : error.message);
    fail(error);
    return null;
  }
}

function setRunning(is) {
  find("stop").disabled = !is;
  for (const id of ["copy-curl", "copy-python"]) find(id).disabled = false;
}

function record(of, answers) {
  const texts = answers.map((each) => each && { text: each.text, toxicity: each.toxicity });
  const remembered = [{ state: of, texts }, ...runs()].slice(0, REMEMBERED);
  sessionStorage.setItem(HISTORY, JSON.stringify(remembered));
  showHistory();
}

const runs = () => JSON.parse(sessionStorage.getItem(HISTORY) ?? "[]");

function showHistory() {
  const items = runs().map((each) => {
    const onclick = () => {
      state = fromValue(each.state);
      remember();
      show();
    };
    const { kind, messages, prompt, stack } = each.state;
    const asking = kind === "chat" ? messages.at(-1)?.content : prompt;
    const names = stack.map((one) => one.intervention).join(", ") || "no steering";
    const scores = each.texts.map((one) => (one?.toxicity == null ? "?" : rounded(one.toxicity, 2)));
    return el("li", {}, button(`${asking} (${names}), toxicity ${scores.join(" → ")}`, onclick));
  });
  const none = el("li", { className: "quiet" }, "What you run is listed here, in this tab.");
  find("history").replaceChildren(...(items.length ? items : [none]));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    find("copied").replaceChildren("Copied.");
  } catch {
    find("copied").replaceChildren(el("pre", {}, text)); // a browser may forbid the clipboard
  }
}

find("form").onsubmit = (event) => {
  event.preventDefault();
  run();
};
find("form").onkeydown = ({ key, ctrlKey, metaKey, target }) => {
  if (key === "Enter" && (ctrlKey || metaKey) && target instanceof HTMLTextAreaElement) run();
};
find("stop").onclick = () => running.abort();
find("copy-curl").onclick = () => copy(asCurl(sent));
find("copy-python").onclick = () => copy(asPython(sent));
find("keys").onsubmit = (event) => {
  event.preventDefault();
  keys.set(find("key").value, find("admin-key").value);
  load();
};
for (const view of ["playground", "registry"]) {
  find(`show-${view}`).onclick = () => {
    state.view = view;
    remember();
    show();
  };
}
addEventListener("hashchange", () => {
  state = fromAddress(location.hash);
  if (server) show();
});
load();
