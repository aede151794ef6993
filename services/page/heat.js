// What colours the tiles: nothing, their tissue, or what a run says of them.

import {askJson, latest} from "./api.js";
import {noteView, readView} from "./address.js";
import {colourAll, rankShare, ranks, signShare, signs} from "./colours.js";
import {byId, digits, make, percent, signed} from "./words.js";

const OPACITY = 0.62;
const VALUES = ["attention", "contribution"];

/** Colours the tiles as the address says. */
export async function showColours(scene, view, signal) {
  if (scene.runsOf !== scene.id) {
    const {runs} = await askJson(`v1/runs?${new URLSearchParams({slide_id: scene.id})}`, signal);
    scene.runsOf = scene.id;
    byId("run").replaceChildren(...runs.map(({run}) => make("option", {value: run, textContent: run})));
    byId("run-field").hidden = !runs.length;
    byId("no-runs").hidden = runs.length > 0;
    for (const option of byId("colour").options) {
      if (VALUES.includes(option.value)) option.disabled = !runs.length;
    }
  }
  const names = [...byId("run").options].map(option => option.value);
  byId("run").value = names.includes(view.run) ? view.run : names[0];
  const usual = names.includes(view.run) ? "attention" : "";
  byId("colour").value = view.colour ?? usual;
  await paint(scene, signal);
}

async function paint(scene, signal) {
  const colour = byId("colour").value, {field, viewer} = scene;
  scene.values = null;
  say("");
  byId("prediction").textContent = "";
  byId("ramp-field").hidden = true;
  if (colour === "tissue") {
    viewer.setColours(colourAll(field.tissue, ranks, OPACITY));
    showRamp(ranks, "0 % tissue", "100 %");
    return;
  }
  if (!VALUES.includes(colour) || !byId("run").value) {
    viewer.setColours(null);
    return;
  }
  const run = byId("run").value;
  let answer;
  try {
    answer = await askJson(`v1/runs/${encodeURIComponent(run)}/slides/${encodeURIComponent(scene.id)}`, signal);
  } catch (error) {
    if (signal.aborted) throw error;
    viewer.setColours(null);
    say(`Not drawn: ${error.message}.`);
    return;
  }
  if (answer.manifest_hash !== scene.record.manifest_hash) {
    viewer.setColours(null);
    say("Not drawn: the slide was tiled again just now; open it again.");
    return;
  }
  const [attention, contribution] = VALUES.map(name => Float32Array.from(answer.columns[name], value => value ?? NaN));
  scene.values = {attention, contribution, share: rankShare(attention)};
  byId("prediction").textContent = predicted(answer);
  if (colour === "attention") {
    viewer.setColours(colourAll(scene.values.share, ranks, OPACITY));
    showRamp(ranks, "lowest attention", "highest, by rank");
  } else if (!answer.what) {
    viewer.setColours(null);
    say(`Not drawn: the aggregator ${answer.aggregator} tells no contributions.`);
  } else {
    const {end, share} = signShare(contribution);
    viewer.setColours(colourAll(share, signs, OPACITY + 0.1));
    showRamp(signs, `lowers it (−${digits(end)})`, `raises it (+${digits(end)})`);
    say(`Contributions to: ${answer.what}.`);
  }
}

function predicted({outputs, predictions, checkpoint, aggregator}) {
  const told = outputs.map((output, i) => `${output}: ${predictions[i] === null ? "–" : digits(predictions[i])}`);
  return `Prediction: ${told.join(" · ")} (${aggregator}, ${checkpoint}). For research, not for diagnosis.`;
}

function say(text) {
  byId("colour-said").textContent = text;
}

function showRamp(of, low, high) {
  const ramp = byId("ramp"), pen = ramp.getContext("2d");
  for (let x = 0; x < ramp.width; x++) {
    pen.fillStyle = `rgb(${of(x / (ramp.width - 1)).join(" ")})`;
    pen.fillRect(x, 0, 1, ramp.height);
  }
  [byId("ramp-low").textContent, byId("ramp-high").textContent] = [low, high];
  byId("ramp-field").hidden = false;
}

/** What the run that is drawn says of a tile; empty if none is. */
export function tellValue({values}, row) {
  if (!values) return "";
  if (Number.isNaN(values.attention[row])) return "not seen by the model";
  const parts = [`attention above ${percent(values.share[row])} of tiles`];
  if (!Number.isNaN(values.contribution[row])) parts.push(`contribution ${signed(values.contribution[row])}`);
  return parts.join(", ");
}

export function startColours(scene, guarded) {
  const follow = latest(async signal => {
    if (!scene.field) return;
    const colour = byId("colour").value;
    noteView({colour, run: VALUES.includes(colour) ? byId("run").value : null});
    await showColours(scene, readView(), signal);
  });
  byId("colour").addEventListener("change", () => guarded(follow));
  byId("run").addEventListener("change", () => {
    if (!VALUES.includes(byId("colour").value)) byId("colour").value = "attention";
    guarded(follow);
  });
}
