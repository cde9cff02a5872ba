/** Edits what is asked: a prompt or a conversation, and how tokens are drawn. */

import { button, el, find, keepingFocus } from "./dom.js";

const ROLES = ["system", "user", "assistant"];
const SAMPLING = [
  ["max_tokens", "Length", { min: 1, step: 1 }],
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top-p", { min: 0, max: 1, step: 0.05 }],
  ["seed", "Seed", { step: 1 }],
];

/** Show the state's prompt, messages and sampling; `onChange` hears of each edit of the state. */
export function showAsk(state, onChange) {
  for (const radio of document.querySelectorAll("[name=kind]")) {
    radio.checked = radio.value === state.kind;
    radio.onchange = () => {
      state.kind = radio.value;
      showAsk(state, onChange);
      onChange();
    };
  }
  find("prompt-field").hidden = state.kind === "chat";
  find("messages").hidden = state.kind !== "chat";
  find("prompt").value = state.prompt;
  find("prompt").oninput = () => {
    state.prompt = find("prompt").value;
    onChange();
  };
  showMessages(state, onChange);
  find("sampling").replaceChildren(...SAMPLING.map((field) => samplingField(state, field, onChange)));
}

function samplingField(state, [name, label, limits], onChange) {
  const oninput = ({ target }) => {
    state[name] = Number.isNaN(target.valueAsNumber) ? null : target.valueAsNumber;
    onChange();
  };
  const input = el("input", { type: "number", ...limits, value: state[name] ?? "", oninput });
  return el("label", { "data-param": name }, label, input);
}

function showMessages(state, onChange) {
  const changed = () => {
    keepingFocus(() => showMessages(state, onChange));
    onChange();
  };
  const add = () => {
    state.messages.push({ role: "user", content: "" });
    changed();
  };
  const remove = (place) => {
    state.messages.splice(place, 1);
    changed();
  };
  const fields = state.messages.map((message, place) => messageField(message, place, remove, onChange));
  find("messages").replaceChildren(...fields, button("Add a message", add, { ariaLabel: "Add a message" }));
}

function messageField(message, place, remove, onChange) {
  const number = place + 1;
  const set = (name) => ({ target }) => {
    message[name] = target.value;
    onChange();
  };
  const label = { onchange: set("role"), ariaLabel: `Role of message ${number}` };
  const select = el("select", label, ROLES.map((role) => el("option", {}, role)));
  select.value = message.role;
  const shown = { rows: 2, oninput: set("content"), ariaLabel: `Text of message ${number}` };
  const text = el("textarea", { ...shown, value: message.content });
  const removal = button("Remove", () => remove(place), { ariaLabel: `Remove message ${number}` });
  const row = el("div", { className: "row" }, select, removal);
  return el("div", { className: "message", "data-param": `messages[${place}]` }, row, text);
}
