/** Colours the steered answer's tokens by how much likelier the steering has made them. */

import { request } from "./api.js";
import { el, find, rounded, scrolling, table } from "./dom.js";
import { ALTERNATIVES, piecesOf, tokensOf } from "./requests.js";

const FULL = 3; // nats, either way: the strongest colour
const STRONGEST = 60; // percent of colour, so that the text stays readable

/** Have the base model score a steered answer's tokens, and colour them in its pane. */
export async function showTokens(answer, pane, model, signal) {
  const count = answer.tokens.length;
  if (count === 0 || !answer.promptIds) return;
  const prompt = [...answer.promptIds, ...answer.ids.slice(0, count)];
  const scoring = { echo: true, max_tokens: 0, logprobs: ALTERNATIVES, steering: null };
  const reply = await request("v1/completions", { body: { model, prompt, ...scoring }, signal });
  const base = tokensOf(reply.choices[0].logprobs).slice(-count);
  const pieces = piecesOf(answer);
  const tokens = answer.tokens.map((token, place) => ({
    ...token,
    piece: pieces[place],
    base: base[place],
    ratio: token.logprob - base[place].logprob,
  }));
  const mean = tokens.reduce((sum, token) => sum + token.ratio, 0) / count;
  const detail = el("div", { className: "columns", ariaLive: "polite" });
  const elements = tokens.map((token, place) => tokenElement(token, place, detail));
  const list = { role: "listbox", ariaLabel: "Tokens of the steered answer", onkeydown: move };
  pane.divide(el("span", list, elements));
  const help = "Point at a token, or go through them with the arrow keys, to see what else was likely.";
  find("tokens").replaceChildren(
    el("h2", { id: "tokens-title" }, "Where it acts"),
    el("p", {}, `On average, log p steered − log p base is ${signed(mean)} nats a token.`),
    legend(),
    el("p", { className: "quiet" }, help),
    detail,
    el("details", {}, el("summary", {}, "As a table"), scrolling(tokenTable(tokens))),
  );
  find("tokens").hidden = false;
}

function tokenElement(token, place, detail) {
  const select = ({ target }) => {
    for (const other of target.parentElement.children) {
      other.tabIndex = other === target ? 0 : -1;
      other.ariaSelected = String(other === target);
    }
    const base = { ...token.base, text: token.text };
    detail.replaceChildren(alternatives("Steered model", token), alternatives("Base model", base));
  };
  const item = { role: "option", ariaSelected: "false", tabIndex: place === 0 ? 0 : -1 };
  const shows = { title: `${signed(token.ratio)} nats`, onfocus: select, onmouseenter: select };
  return coloured(el("span", { ...item, ...shows }, token.piece), token.ratio);
}

/** Move the focus to the next or the previous token. */
function move(event) {
  const { nextSibling: next, previousSibling: last } = document.activeElement;
  const target = { ArrowRight: next, ArrowDown: next, ArrowLeft: last, ArrowUp: last }[event.key];
  if (event.key.startsWith("Arrow")) event.preventDefault();
  target?.focus();
}

function coloured(element, ratio) {
  element.className = ratio < 0 ? "token rarer" : "token";
  const weight = (Math.min(Math.abs(ratio), FULL) / FULL) * STRONGEST;
  element.style.setProperty("--weight", `${weight.toFixed(1)}%`);
  return element;
}

function legend() {
  const steps = Array.from({ length: 2 * FULL + 1 }, (_, step) => step - FULL);
  const boxes = steps.map((step) => coloured(el("span", {}, step > 0 ? `+${step}` : String(step)), step));
  const scale = el("span", { className: "legend" }, boxes);
  return el("p", { className: "row" }, "log p steered − log p base, in nats", scale);
}

function alternatives(title, { text, logprob, top }) {
  const known = top.some(([each]) => each === text) ? top : [...top, [text, logprob]];
  const sorted = [...known].sort(([, one], [, other]) => other - one);
  const name = (each) => (each === text ? el("td", {}, el("strong", {}, shown(each))) : shown(each));
  const rows = sorted.map(([each, value]) => [name(each), percent(value)]);
  const heads = ["token", "probability"];
  return el("section", {}, el("h2", {}, title), table(`Likely tokens: ${title}`, heads, rows));
}

function tokenTable(tokens) {
  const rows = tokens.map(({ text, logprob, base, ratio }) => [
    shown(text),
    rounded(logprob),
    rounded(base.logprob),
    signed(ratio),
    base.top.slice(0, 3).map(([each]) => shown(each)).join(" "),
  ]);
  const heads = ["token", "log p steered", "log p base", "difference", "likeliest to the base model"];
  return table("Tokens of the steered answer", heads, rows);
}

const shown = (text) => JSON.stringify(text); // with its blanks and line breaks
const signed = (number) => `${Number(rounded(number, 2)) < 0 ? "−" : "+"}${rounded(Math.abs(number), 2)}`;
const percent = (logprob) => `${Number((100 * Math.exp(logprob)).toPrecision(3))} %`;
