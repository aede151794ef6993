// Which tiles a training step draws from the slide: the numbers can be changed, the map follows.

import {askJson, latest, slidePath} from "./api.js";
import {noteView, readView} from "./address.js";
import {byId, count, tiles} from "./words.js";

const TYPING_MS = 150;
const USUAL = {k: null, seed: "0", epoch: "0", part: "0", num_parts: "1"};
const KEYS = Object.keys(USUAL);
const field = key => byId(`step-${key}`);

/** Shows the step that the address names, or none. */
export async function showStep(scene, view, signal) {
  const isOn = view.k !== undefined;
  byId("step-on").checked = isOn;
  for (const key of KEYS) {
    if (document.activeElement !== field(key)) field(key).value = view[key] ?? USUAL[key] ?? usualK(scene);
  }
  if (isOn) await draw(scene, signal);
  else tell(scene, null, "");
}

const usualK = scene => String(Math.max(1, Math.min(100, Math.round(scene.field.length / 4))));

async function draw(scene, signal) {
  const query = new URLSearchParams(KEYS.map(key => [key, field(key).value.trim()]));
  let body;
  try {
    body = await askJson(`${slidePath(scene.id, "/sample")}?${query}`, signal);
  } catch (error) {
    if (signal.aborted) throw error;
    tell(scene, null, `${error.message}.`);
    return;
  }
  if (body.manifest_hash !== scene.record.manifest_hash) {
    tell(scene, null, "The slide was tiled again just now; open it again.");
    return;
  }
  const drawn = new Uint8Array(scene.field.length);
  for (const row of body.columns.row) drawn[row] = 1;
  const distinct = drawn.reduce((sum, is) => sum + is, 0), asked = body.columns.row.length;
  const part = Number(query.get("num_parts")) > 1 ? `, part ${query.get("part")} of ${query.get("num_parts")}` : "";
  const again = asked > distinct ? `; ${count(asked)} in all, some more than once` : "";
  tell(scene, drawn, `${tiles(distinct)} of ${count(scene.field.length)}${part}${again}.`);
}

function tell(scene, drawn, text) {
  scene.drawn = drawn;
  scene.viewer.setDrawn(drawn);
  byId("step-said").textContent = text;
}

export function startStep(scene, guarded) {
  let timer = 0;
  const follow = latest(async signal => {
    if (!scene.field) return;
    const isOn = byId("step-on").checked;
    noteView(Object.fromEntries(KEYS.map(key => [key, isOn ? field(key).value.trim() : null])));
    await showStep(scene, readView(), signal);
  });
  byId("step-on").addEventListener("change", () => guarded(follow));
  byId("step").addEventListener("submit", event => event.preventDefault());
  for (const key of KEYS) {
    field(key).addEventListener("input", () => {
      byId("step-on").checked = true;
      clearTimeout(timer);
      timer = setTimeout(() => guarded(follow), TYPING_MS);
    });
  }
}
