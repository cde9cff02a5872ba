/** Shows what the registry holds, and takes uploads. */

import { ApiError, request } from "./api.js";
import { button, el, facts, find, scrolling, table } from "./dom.js";

let form = null; // stays while the list is loaded anew, with what it says

/** Show the registry; `onStored` hears of each upload, `onError` of what goes wrong. */
export function showRegistry(interventions, onStored, onError) {
  const detail = el("section", { hidden: true, ariaLive: "polite" });
  const show = (name) => async () => {
    try {
      const found = await request(`v1/interventions/${encodeURIComponent(name)}`);
      detail.replaceChildren(...described(found));
      detail.hidden = false;
      detail.scrollIntoView({ block: "nearest" });
    } catch (error) {
      onError(Object.assign(error, { param: null })); // it would name the upload's field
    }
  };
  const rows = interventions.map((each) => [
    el("td", {}, button(each.name, show(each.name))),
    each.kind,
    each.base_model.id,
    each.servable ? "yes" : `no: ${each.reason}`,
    when(each.created),
  ]);
  const heads = ["name", "kind", "for the model", "servable", "stored"];
  const title = "Stored interventions";
  const list = el("section", {}, el("h2", {}, title), scrolling(table(title, heads, rows)));
  find("registry").replaceChildren(list, detail, (form ??= uploadForm(onStored, onError)));
}

function described({ name, base_model, defaults, limits, ...found }) {
  const { method, license, size, digest } = found;
  const about = [["Method", method], ["License", license], ["Size", `${size} bytes`], ["Digest", digest]];
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const training = Object.entries(found.training).map(([key, value]) => [key, said(value)]);
  const history = found.history.map(({ event, digest, at }) => [event, digest ?? "none", when(at)]);
  const range = (key) => limits[key]?.join(" to ") ?? "";
  const settings = Object.keys(defaults).map((key) => [key, defaults[key], range(key)]);
  const part = (title, heads, rows) =>
    [el("h2", {}, title), scrolling(table(`${title} of ${name}`, heads, rows))];
  return [
    el("h2", {}, name),
    el("p", {}, found.description),
    ...found.warnings.map((warning) => el("p", { className: "error" }, warning)),
    facts([...about, ["Model", `${base_model.id}, ${base_model.architecture}`]]),
    ...part("Settings", ["setting", "default", "limits"], settings),
    ...part("Training", ["what", "value"], training),
    ...part("History", ["event", "digest", "at"], history),
  ];
}

function uploadForm(onStored, onError) {
  const file = el("input", { type: "file", accept: ".safetensors" });
  const name = el("input", { autocomplete: "off", placeholder: "from its manifest" });
  const said = el("p", { role: "status" });
  const send = async (chosen) => {
    if (!chosen) return;
    const sent = new FormData();
    if (name.value) sent.append("name", name.value);
    sent.append("file", chosen);
    said.replaceChildren(`Uploading ${chosen.name}`);
    try {
      const stored = await request("v1/interventions", { form: sent });
      const remarks = [stored.reason ?? "", ...stored.warnings].join(" ");
      said.replaceChildren(`Stored as ${stored.name}, sha256:${stored.digest}. ${remarks}`);
      onStored();
    } catch (error) {
      const refused = error instanceof ApiError && error.status < 500 ? "Refused: " : "";
      said.replaceChildren(el("span", { className: "error" }, `${refused}${error.message}`));
      if (error.status === 401 || error.status === 403) onError(error);
    }
  };
  const over = (is) => (event) => {
    event.preventDefault();
    drop.classList.toggle("over", is);
    if (event.type === "drop") send(event.dataTransfer.files[0]);
  };
  const label = (text, field, param) => el("label", { "data-param": param }, text, field);
  const fields = [label("Name", name, "name"), label("File", file, "file")];
  const row = el("div", { className: "row" }, fields, button("Upload", () => send(file.files[0])));
  const help = "Drop a .safetensors file here, or choose one.";
  const listeners = { ondragover: over(true), ondragleave: over(false), ondrop: over(false) };
  const drop = el("section", { className: "drop", ariaLabel: "Upload", ...listeners });
  drop.append(el("h2", {}, "Upload an artifact"), el("p", {}, help), row, said);
  return drop;
}

const when = (time) => new Date(time).toLocaleString();
