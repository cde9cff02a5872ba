/** Edits the stack of interventions, by what their manifests say of their settings. */

import { button, el, find, keepingFocus } from "./dom.js";

export const WHOLE = ["iterations"]; // settings that are whole numbers
const TELLING = ["direction_scale", "strength"]; // they change an answer more than others do
const POSITIONS = ["all", "prompt", "generated"];

/** Return a steering of an intervention with its default settings. */
export const steeringOf = (intervention) => ({ intervention: intervention.name, ...intervention.defaults });

/** Return the names of an intervention's settings that are numbers, the most telling ones first. */
export const numbersOf = (intervention) =>
  Object.keys(intervention?.limits ?? {}).sort((one, other) => TELLING.includes(other) - TELLING.includes(one));

/** Show the state's stack; `onChange` hears of each edit. */
export function showStack(state, interventions, limit, onChange) {
  const changed = () => {
    keepingFocus(() => showStack(state, interventions, limit, onChange));
    onChange();
  };
  const items = state.stack.map((steering, place) => {
    const intervention = interventions.find((each) => each.name === steering.intervention);
    return stackItem(state, steering, place, intervention, changed, onChange);
  });
  find("stack").replaceChildren(...items);
  const servable = interventions.filter((each) => each.servable);
  const chosen = find("choice").value;
  find("choice").replaceChildren(...servable.map((each) => el("option", {}, each.name)));
  if (servable.some((each) => each.name === chosen)) find("choice").value = chosen;
  find("add").disabled = state.stack.length >= limit || servable.length === 0;
  find("add").onclick = () => {
    state.stack.push(steeringOf(servable.find((each) => each.name === find("choice").value)));
    changed();
  };
}

function stackItem(state, steering, place, intervention, changed, onChange) {
  const param = `steering[${place}]`;
  const name = steering.intervention;
  const move = (to) => () => {
    state.stack.splice(place, 1);
    if (to !== null) state.stack.splice(to, 0, steering);
    changed();
  };
  const mover = (text, label, to, disabled = false) =>
    button(text, move(to), { disabled, ariaLabel: `${label} ${name}` });
  const up = mover("↑", "Move up", place - 1, place === 0);
  const down = mover("↓", "Move down", place + 1, place === state.stack.length - 1);
  const remove = mover("Remove", "Remove", null);
  const head = el("div", { className: "row" }, el("strong", {}, name), up, down, remove);
  const settings = Object.keys(intervention?.defaults ?? {});
  const fields = settings.map((setting) => settingField(steering, setting, intervention, param, onChange));
  const text = intervention?.description ?? "The registry has no intervention of this name.";
  return el("li", { "data-param": param }, head, el("small", {}, text), fields);
}

function settingField(steering, name, intervention, param, onChange) {
  const value = steering[name] ?? intervention.defaults[name];
  const ariaLabel = `${name} of ${intervention.name}`;
  const field = { className: "setting", "data-param": `${param}.${name}` };
  const limits = intervention.limits[name];
  if (!limits) {
    const onchange = ({ target }) => {
      steering[name] = target.value;
      onChange();
    };
    const options = [...new Set([...POSITIONS, value])].map((each) => el("option", {}, each));
    const select = el("select", { onchange, ariaLabel }, options);
    select.value = value;
    return el("div", field, el("span", {}, name), select);
  }
  const [min, max] = limits;
  // Where the limit is far from the default, the slider covers what is near it.
  const reach = Math.min(max, 4 * Math.abs(intervention.defaults[name]) || max);
  const step = WHOLE.includes(name) ? 1 : Number(((reach - min) / 100).toPrecision(1)) || "any";
  const oninput = ({ target }) => {
    const isEmpty = Number.isNaN(target.valueAsNumber);
    if (isEmpty) delete steering[name]; // the server then takes the default
    else steering[name] = target.valueAsNumber;
    const other = target === slider ? number : slider;
    other.value = isEmpty ? intervention.defaults[name] : target.value;
    onChange();
  };
  const range = { type: "range", min, max: reach, step, value, oninput };
  const slider = el("input", { ...range, ariaLabel: `${ariaLabel}, slider` });
  const number = el("input", { ...range, type: "number", max, step: "any", value, ariaLabel });
  return el("div", field, el("span", {}, name), slider, number);
}
