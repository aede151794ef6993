// The pixels of one tile, as training reads them.

import {askPicture, latest, slidePath} from "./api.js";
import {noteView} from "./address.js";
import {byId, count, digits} from "./words.js";

const SMALL_PX = 128;  // Enlarged px are shown as they are, not smeared.
let tellTile = () => "";
let shown = "";

/** Shows a tile's pixels; a row of -1 shows none. */
export const showPixels = latest(async (signal, scene, row) => {
  const tile = `${scene.id} ${row}`;
  byId("tile").hidden = row < 0;
  if (tile === shown) return;
  shown = "";
  if (row < 0) return;
  const picture = byId("pixels");
  byId("tile-name").textContent = `Tile ${count(row)}`;
  byId("tile-facts").textContent = tellTile(row).split(" · ").slice(1, 3).join(", ");
  byId("tile-said").textContent = "Reading the slide …";
  picture.classList.add("waiting");
  try {
    const {bitmap} = await askPicture(slidePath(scene.id, `/tiles/${row}/pixels`), signal);
    [picture.width, picture.height] = [bitmap.width, bitmap.height];
    picture.classList.toggle("small", bitmap.width < SMALL_PX);
    picture.getContext("2d").drawImage(bitmap, 0, 0);
    const sideUm = scene.record.tile_px * scene.record.tile_mpp;
    byId("tile-said").textContent = `${bitmap.width} × ${bitmap.height} px, ${digits(sideUm)} µm wide, as training reads it`;
    picture.hidden = false;
    shown = tile;
  } catch (error) {
    if (signal.aborted) throw error;
    picture.hidden = true;
    byId("tile-said").textContent = `No pixels: ${error.message}.`;
  } finally {
    if (!signal.aborted) picture.classList.remove("waiting");
  }
});

export function startPixels(scene, tell) {
  tellTile = tell;
  byId("tile-close").addEventListener("click", () => {
    noteView({tile: null});
    scene.viewer.moveTo(-1);
    showPixels(scene, -1);
    byId("map").focus();
  });
}
