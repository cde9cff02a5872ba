/** Sweeps one setting over seven values: how toxic the texts are, and how far from the base model. */

import { request } from "./api.js";
import { button, el, find, rounded, scrolling, svg, table } from "./dom.js";
import { asked } from "./requests.js";
import { numbersOf, WHOLE } from "./stack.js";

const VALUES = 7;
const [WIDTH, HEIGHT, MARGIN] = [380, 230, 36];

/** Show the button that sweeps a setting of the state's stack; `onError` gets what goes wrong. */
export function showSweep(state, server, onError) {
  const options = state.stack.flatMap((steering, place) => {
    const intervention = server.interventions.find((each) => each.name === steering.intervention);
    return numbersOf(intervention).map((name) => ({ place, name, intervention }));
  });
  find("sweep").hidden = options.length === 0 || !server.policy.comparison;
  const label = ({ name, intervention }) => `${name} of ${intervention.name}`;
  const choice = el("select", {}, options.map((each, at) => el("option", { value: at }, label(each))));
  const result = el("div", { ariaLive: "polite" });
  let controller = null;
  const begin = async () => {
    controller = new AbortController();
    [start.disabled, stop.disabled] = [true, false];
    try {
      await sweep(structuredClone(state), options[choice.value], server, controller.signal, result);
    } catch (error) {
      onError(error);
    }
    [start.disabled, stop.disabled] = [false, true];
  };
  const start = button(`Sweep over ${VALUES} values`, begin);
  const stop = button("Stop the sweep", () => controller.abort(), { disabled: true });
  find("sweep").replaceChildren(
    el("h2", { id: "sweep-title" }, "How much is right"),
    el("div", { className: "row" }, el("label", {}, "Setting", choice), start, stop),
    result,
  );
}

async function sweep(state, { place, name, intervention }, server, signal, result) {
  const done = [];
  for (const value of valuesOf(name, intervention, state.stack[place][name])) {
    const ariaLabel = "Progress of the sweep";
    const progress = el("progress", { max: VALUES, value: done.length, ariaLabel });
    result.replaceChildren(progress, ...shownPoints(name, done));
    state.stack[place][name] = value;
    const { path, body } = asked(state, server.model, state.stack);
    const answer = await request(path, { body: { ...body, compare: true }, signal });
    const [choice] = answer.choices;
    const [distance] = answer.comparison.mean_log_ratio;
    const text = choice.text ?? choice.message.content;
    done.push({ value, text, distance, toxicity: answer.toxicity?.[0] });
  }
  result.replaceChildren(...shownPoints(name, done));
}

/** Return values from the least allowed to twice the chosen one, or to the most allowed. */
function valuesOf(name, intervention, chosen) {
  const [min, max] = intervention.limits[name];
  const top = Math.min(max, 2 * (chosen || intervention.defaults[name]) || max);
  const decimals = WHOLE.includes(name) ? 0 : 4;
  const value = (_, step) => Number(rounded(min + ((top - min) * step) / (VALUES - 1), decimals));
  return [...new Set(Array.from({ length: VALUES }, value))];
}

function shownPoints(name, points) {
  const number = (value) => (value == null ? "none" : rounded(value));
  const rows = points.map(({ value, toxicity, distance, text }) => {
    return [value, number(toxicity), number(distance), el("td", { className: "long" }, text)];
  });
  const heads = ["value", "toxicity", "nats", "text"];
  return points.length ? [chart(name, points), scrolling(table("Points of the sweep", heads, rows))] : [];
}

function chart(name, points) {
  const values = points.map((point) => point.value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const far = Math.max(...points.map((point) => point.distance ?? 0), 0.1);
  const x = (value) => MARGIN + ((value - low) / (high - low || 1)) * (WIDTH - 2 * MARGIN);
  const y = (share) => HEIGHT - MARGIN - Math.max(share, 0) * (HEIGHT - 2 * MARGIN);
  const line = (kind, share) => {
    const known = points.filter((point) => point[kind] != null);
    const corners = known.map((point) => `${x(point.value)},${y(share(point[kind]))}`);
    return svg("polyline", { class: kind, points: corners.join(" ") });
  };
  const text = (at, height, content, anchor = "middle") =>
    svg("text", { x: at, y: height, "text-anchor": anchor }, content);
  const label = `Toxicity and distance by ${name}; the table has the numbers`;
  return svg(
    "svg",
    { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
    svg("path", { class: "axis", d: `M${MARGIN},${y(1)}V${y(0)}H${WIDTH - MARGIN}V${y(1)}` }),
    line("toxicity", (value) => value),
    line("distance", (value) => value / far),
    text(MARGIN, 12, "— toxicity, 0 to 1", "start"),
    text(MARGIN, 26, `- - distance from the base model, 0 to ${rounded(far, 2)} nats`, "start"),
    values.map((value) => text(x(value), HEIGHT - MARGIN + 14, rounded(value, 2))),
    text(WIDTH / 2, HEIGHT - 2, name),
  );
}
