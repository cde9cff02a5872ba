/** Sweeps one setting over seven values: how toxic the texts are, and how far from the base model. */

import { request } from "./api.js";
import { el, find, rounded, scrolling, svg, table } from "./dom.js";
import { asked, textOf } from "./requests.js";
import { numbersOf, WHOLE } from "./stack.js";
import { seeded } from "./state.js";

const VALUES = 7;
const [WIDTH, HEIGHT, MARGIN] = [380, 230, 36];
let running = null; // the AbortController of the sweep

/** Offer the settings of the state's stack; `onError` gets what goes wrong in a sweep. */
export function showSweep(state, server, onError) {
  const named = (name) => server.interventions.find((each) => each.name === name);
  const options = state.stack.flatMap((steering, place) => {
    const intervention = named(steering.intervention);
    return numbersOf(intervention).map((name) => ({ place, name, intervention }));
  });
  find("sweep").hidden = options.length === 0 || !server.policy.comparison;
  const label = ({ name, intervention }) => `${name} of ${intervention.name}`;
  const before = find("sweep-choice").selectedOptions[0]?.text;
  const selected = (each) => label(each) === before;
  find("sweep-choice").replaceChildren(
    ...options.map((each, value) => el("option", { value, selected: selected(each) }, label(each))),
  );
  find("sweep-start").onclick = async () => {
    running = new AbortController();
    [find("sweep-start").disabled, find("sweep-stop").disabled] = [true, false];
    try {
      await sweep(seeded(state), options[find("sweep-choice").value], server, running.signal);
    } catch (error) {
      onError(error);
    }
    [find("sweep-start").disabled, find("sweep-stop").disabled] = [false, true];
  };
  find("sweep-stop").onclick = () => running.abort();
}

async function sweep(state, { place, name, intervention }, server, signal) {
  const [done, result] = [[], find("sweep-result")];
  const values = valuesOf(name, intervention, state.stack[place][name]);
  try {
    for (const value of values) {
      const ariaLabel = "Progress of the sweep";
      const progress = el("progress", { max: values.length, value: done.length, ariaLabel });
      result.replaceChildren(progress, ...shownPoints(name, done));
      state.stack[place][name] = value;
      const { path, body } = asked(state, server.model, state.stack);
      const answer = await request(path, { body: { ...body, compare: true }, signal });
      const [choice] = answer.choices;
      const [distance] = answer.comparison.mean_log_ratio;
      const text = choice.text ?? textOf(choice.message);
      done.push({ value, text, distance, toxicity: answer.toxicity?.[0] });
    }
  } finally {
    result.replaceChildren(...shownPoints(name, done));
  }
}

/** Return values from zero or the least allowed to twice the chosen one or the most allowed. */
function valuesOf(name, intervention, chosen) {
  const [min, max] = intervention.limits[name];
  const far = 2 * Math.abs(chosen || intervention.defaults[name]) || max;
  const [low, top] = [Math.max(min, -far), Math.min(max, far)];
  const fit = (value) => Math.min(Math.max(value, min), max);
  const exact = (_, step) => low + ((top - low) * step) / (VALUES - 1);
  const shown = (value) => (WHOLE.includes(name) ? Math.round(value) : Number(value.toPrecision(4)));
  return [...new Set(Array.from({ length: VALUES }, exact).map((value) => fit(shown(value))))];
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
  const y = (share) => HEIGHT - MARGIN - Math.max(share, -0.1) * (HEIGHT - 2 * MARGIN);
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
    values.map((value) => text(x(value), HEIGHT - MARGIN + 14, String(Number(value.toPrecision(2))))),
    text(WIDTH / 2, HEIGHT - 2, name),
  );
}
