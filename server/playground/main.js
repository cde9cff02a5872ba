/** Puts the page together: loads what the server has, runs requests, remembers what was done. */

import { keys, request } from "./api.js";
import { showPanes, applied } from "./answers.js";
import { showAsk } from "./ask.js";
import { button, el, find, rounded } from "./dom.js";
import { clearErrors, showError } from "./errors.js";
import { showRegistry } from "./registry.js";
import { asCurl, asked, asPython, stream, traced } from "./requests.js";
import { showStack, steeringOf } from "./stack.js";
import { fromAddress, seeded, toAddress } from "./state.js";
import { showSweep } from "./sweep.js";
import { showTokens } from "./tokens.js";

const HISTORY = "steerserve.history";
const REMEMBERED = 20; // runs
const FIRST = "detox-argre"; // the intervention that a new page shows, if the server has it
const POLICIES = {
  required: "This server requires steering: there is no base model to compare with.",
  locked: "This server's steering is locked: a request can neither change nor drop it.",
};

let [state, fault] = fromAddress(location.hash); // the fault of a link, until it is shown
let server = null; // the model, the interventions and the policy
let running = null; // the AbortController of the run
let runs = JSON.parse(sessionStorage.getItem(HISTORY) ?? "[]");
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
    showRegistry(interventions.data, load, fail);
  } catch (error) {
    fail(error);
  }
}

/** Show the state, by what the server has. */
function show() {
  const { interventions, policy } = server;
  const servable = interventions.filter((each) => each.servable);
  const first = servable.find((each) => each.name === FIRST) ?? servable[0];
  state.stack ??= first ? [steeringOf(first)] : [];
  const isLocked = policy.policy === "locked";
  find("model").replaceChildren(server.model);
  find("policy").hidden = policy.policy === "optional";
  find("policy").replaceChildren(POLICIES[policy.policy] ?? "", isLocked ? applied(policy.default) : "");
  find("stack").hidden = find("adding").hidden = isLocked;
  showAsk(state, remember);
  showStack(state, interventions, policy.max_interventions, () => {
    remember();
    showSweep(state, server, fail);
  });
  showSweep(state, server, fail);
  showHistory();
  showView();
  if (fault) showError(new Error(fault));
  fault = null;
}

function showView() {
  for (const view of ["playground", "registry"]) {
    find(view).hidden = state.view !== view;
    find(`show-${view}`).ariaPressed = String(state.view === view);
  }
}

const remember = () => toAddress(state);

function fail(error) {
  if (error.name === "AbortError") return;
  if ([401, 403].includes(error.status) && error.code !== "steering_locked") {
    [find("key").value, find("admin-key").value] = [keys.get(), keys.admin()];
    find("keys").hidden = false;
  }
  showError(error);
}

/** Stream the answers, then colour the steered one; Stop ends both. */
async function run(event) {
  event.preventDefault();
  if (server === null) return load();
  running?.abort();
  clearErrors();
  find("copied").replaceChildren();
  remember();
  const [of, policy, controller] = [seeded(state), server.policy, new AbortController()];
  const asking = (steering) => traced(asked(of, server.model, steering), policy.toxicity);
  sent = asking(policy.policy === "locked" ? undefined : of.stack);
  const requests = policy.comparison ? [asking(null), sent] : [sent];
  const panes = showPanes(["Base model", "Steered model"].slice(-requests.length), of);
  running = controller;
  setRunning(true);
  find("tokens").hidden = true;
  const answers = await Promise.all(requests.map((each, place) => answer(each, panes[place], controller)));
  const steered = answers.at(-1);
  try {
    if (steered && policy.comparison)
      await showTokens(steered, panes.at(-1), server.model, controller.signal);
  } catch (error) {
    fail(error);
  }
  if (steered) record(of, answers, steered.steering);
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

function record(of, answers, steering) {
  const names = steering.map((each) => each.intervention).join(", ") || "no steering";
  const scores = answers.map((each) => (each?.toxicity == null ? "?" : rounded(each.toxicity, 2)));
  const asking = of.kind === "chat" ? of.messages.at(-1)?.content : of.prompt;
  const text = `${asking} (${names}), toxicity ${scores.join(" → ")}`;
  runs = [{ state: of, text }, ...runs].slice(0, REMEMBERED);
  try {
    sessionStorage.setItem(HISTORY, JSON.stringify(runs));
  } catch {
    // The tab's storage is full: the list lives until the page is left.
  }
  showHistory();
}

function showHistory() {
  const items = runs.map((each) => {
    const onclick = () => {
      state = structuredClone(each.state);
      remember();
      show();
    };
    return el("li", {}, button(each.text, onclick));
  });
  find("history").replaceChildren(...items);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    find("copied").replaceChildren("Copied.");
  } catch {
    find("copied").replaceChildren(el("pre", {}, text)); // a browser may forbid the clipboard
  }
}

find("form").onsubmit = run;
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
    showView();
  };
}
addEventListener("hashchange", () => {
  [state, fault] = fromAddress(location.hash);
  if (server) show();
});
showAsk(state, remember);
showView();
load();
