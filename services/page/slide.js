// One slide: what is known of it, its picture, its areas and its tiles on the map.

import {askJson, askPicture, latest, pageOf, slidePath} from "./api.js";
import {archiveHash, noteView, readView} from "./address.js";
import {showColours, startColours, tellValue} from "./heat.js";
import {showPixels, startPixels} from "./pixels.js";
import {showStep, startStep} from "./step.js";
import {TileField} from "./tiles.js";
import {Viewer} from "./viewer.js";
import {AREAS, REASONS, byId, count, digits, make, millimetres, percent, sentence, tiles} from "./words.js";

const TILES_PER_ANSWER = 100_000;
/** What is open: `id`, `record`, the `field` of tiles (null without any), and the `viewer`. */
const scene = {id: null, record: null, field: null, viewer: null, drawn: null, values: null};

/** Shows the slide that the address names. */
export const showSlide = latest(async signal => {
  const view = readView();
  if (view.slide === scene.id && scene.record) {
    await follow(view, signal);
    return;
  }
  Object.assign(scene, {id: view.slide, record: null, field: null, drawn: null, values: null});
  scene.viewer.clear();
  byId("slide-name").textContent = view.slide;
  for (const id of ["facts", "areas-legend", "labels"]) byId(id).replaceChildren();
  for (const id of ["picture-note", "read-out", "spoken", "prediction", "colour-said", "step-said"]) {
    byId(id).textContent = "";
  }
  for (const id of ["tile", "ramp-field"]) byId(id).hidden = true;
  byId("verdict").textContent = "Loading …";
  byId("verdict").className = "verdict";
  const record = await askJson(slidePath(view.slide), signal);
  scene.record = record;
  showFacts(record);
  byId("map-room").hidden = !record.width_l0;
  byId("side").hidden = !record.num_tiles;
  if (!record.width_l0) return;
  scene.viewer.show([record.width_l0, record.height_l0], record.mpp_x);
  const withTiles = async () => {
    await showTiles(record, signal);
    await follow(readView(), signal);
  };
  await Promise.all([showPictures(record, signal), record.num_tiles ? withTiles() : null]);
});

export function closeSlide() {
  showSlide.stop();
  Object.assign(scene, {id: null, record: null, field: null});
  scene.viewer.clear();
}

/** What the address says beside the slide: run, step, tile. */
async function follow(view, signal) {
  if (!scene.field) return;
  await Promise.all([showColours(scene, view, signal), showStep(scene, view, signal)]);
  const row = view.tile === undefined ? -1 : Number(view.tile);
  const isThere = Number.isInteger(row) && row >= 0 && row < scene.field.length;
  if (isThere) {
    scene.viewer.moveTo(row);
    byId("read-out").textContent = tellTile(row);
  }
  await showPixels(scene, isThere ? row : -1);
}

function showFacts(record) {
  const verdict = byId("verdict");
  verdict.className = `verdict ${record.status}`;
  verdict.textContent = {
    ok: `${tiles(record.num_tiles)} of tissue, ready for training`,
    empty: "No tissue was found: this slide has no tiles.",
    failed: `This slide cannot be used. ${sentence(record.error.replace(`slide ${record.slide_id}: `, ""))}`,
  }[record.status];
  if (record.status !== "ok") {
    const href = archiveHash({status: record.status});
    verdict.append(" ", make("a", {href, textContent: record.status === "empty" ? "All slides without tissue" : "All failed slides"}));
  }
  const left = Object.entries(REASONS).map(([reason, word]) => [record[`rejected_${reason}`], word]).filter(([n]) => n);
  const {mpp_x: mpp, mpp_y: mppY} = record;
  const scale = mpp === mppY ? digits(mpp, 4) : `${digits(mpp, 4)} × ${digits(mppY, 4)}`;
  const facts = {
    Size: record.width_l0 &&
      (mpp ? `${millimetres(record.width_l0, mpp)} × ${millimetres(record.height_l0, mppY)} mm` : ""),
    Pixels: record.width_l0 && `${count(record.width_l0)} × ${count(record.height_l0)}`,
    Scale: mpp && `${scale} µm per px (${SOURCES[record.mpp_source] ?? record.mpp_source})`,
    Note: record.mpp_conflict && record.mpp_other ? `another source says ${digits(record.mpp_other, 4)} µm per px` : "",
    Tissue: record.tissue_mm2 && `${digits(record.tissue_mm2)} mm²`,
    Tiles: record.num_tiles && `${count(record.num_tiles)} of ${record.tile_px} px at ${digits(record.tile_mpp, 4)} µm per px`,
    "Left out": left.map(([number, word]) => `${count(number)} ${word}`).join(", "),
    Damaged: record.num_bad_tiles && `${tiles(record.num_bad_tiles)} left out`,
    Scanner: record.vendor,
    Manifest: record.num_tiles && make("code", {textContent: record.manifest_hash.slice(0, 12), title: record.manifest_hash}),
  };
  const told = Object.entries(facts).filter(([, fact]) => fact);
  byId("facts").replaceChildren(...told.map(([name, fact]) =>
    make("div", {}, make("dt", {textContent: name}), make("dd", {}, fact))));
  const labels = Object.entries(record.labels ?? {}).filter(([, value]) => value !== "" && value !== null);
  byId("labels").replaceChildren(...labels.map(([column, value]) => {
    const href = archiveHash({...readView(), label: `${column}:${value}`});
    return make("a", {href, title: "list slides with this label", textContent: `${column}: ${value}`});
  }));
}

const SOURCES = {vendor: "from the scanner", tiff: "from the file", csv: "from a list", default: "assumed"};

async function showPictures(record, signal) {
  try {
    for (const name of ["thumbnail", "areas"]) {  // One after the other: the service draws both when it is asked for one.
      const {bitmap, headers} = await askPicture(slidePath(record.slide_id, `/${name}`), signal);
      scene.viewer.setPicture(name, bitmap, Number(headers.get("Slidegrad-Px-L0")));
      if (name === "areas") showLegend(JSON.parse(headers.get("Slidegrad-Legend")));
    }
  } catch (error) {
    if (signal.aborted) throw error;
    byId("picture-note").textContent = `No picture: ${error.message}.`;  // The tiles can still be looked at.
  }
}

function showLegend(areas) {
  byId("areas-legend").replaceChildren(...areas.map(({name, colour, share}) => {
    const swatch = make("span", {className: "swatch"});
    swatch.style.backgroundColor = colour;
    return make("li", {}, swatch, `${AREAS[name] ?? name} ${percent(share)}`);
  }));
}

async function showTiles(record, signal) {
  const columns = {x_l0: [], y_l0: [], tissue: []};
  const limit = Math.min(TILES_PER_ANSWER, Math.max(1, record.num_tiles));
  let path = `${slidePath(record.slide_id, "/tiles")}?limit=${limit}`, body;
  while (path) {
    body = await askJson(path, signal);
    if (body.manifest_hash !== record.manifest_hash) throw new Error("The slide was tiled again just now; open it again.");
    for (const name of Object.keys(columns)) columns[name] = columns[name].concat(body.columns[name]);
    path = pageOf(body, path).next;
  }
  scene.field = new TileField(columns, body.footprint_l0, [record.width_l0, record.height_l0]);
  scene.viewer.setField(scene.field);
}

/** One tile in a line. */
function tellTile(row) {
  const {field, record} = scene;
  const place = [[field.x[row], record.mpp_x], [field.y[row], record.mpp_y]].map(([px, mpp]) => millimetres(px, mpp));
  const parts = [`Tile ${count(row)}`, `tissue ${percent(field.tissue[row])}`, `${place.join(" × ")} mm from the top left`];
  if (scene.drawn) parts.push(scene.drawn[row] ? "in this step" : "not in this step");
  const value = tellValue(scene, row);
  if (value) parts.push(value);
  return parts.join(" · ");
}

export function startSlide(guarded) {
  const readOut = byId("read-out");
  const pick = row => {
    noteView({tile: row});
    readOut.textContent = byId("spoken").textContent = tellTile(row);
    guarded(() => showPixels(scene, row));
  };
  const viewer = new Viewer(byId("map"), byId("scale-bar"), {
    onHover: row => {
      const told = row < 0 ? viewer.cursor : row;
      readOut.textContent = told < 0 ? "" : tellTile(told);
    },
    onMove: row => (readOut.textContent = byId("spoken").textContent = tellTile(row)),
    onPick: pick,
  });
  scene.viewer = viewer;
  byId("zoom-in").addEventListener("click", () => viewer.zoom(1.5));
  byId("zoom-out").addEventListener("click", () => viewer.zoom(1 / 1.5));
  byId("zoom-fit").addEventListener("click", () => viewer.fit());
  for (const name of ["thumbnail", "areas", "tiles"]) {
    const box = byId(`layer-${name}`);
    const apply = () => {
      viewer.setLayer(name, box.checked);
      if (name === "areas") byId("areas-legend").hidden = !box.checked;
    };
    apply();
    box.addEventListener("change", apply);
  }
  startStep(scene, guarded);
  startColours(scene, guarded);
  startPixels(scene, tellTile);
}
