// The map of a slide on a canvas: pictures and tiles, which part of them is seen, and which tile is meant.
// All coordinates but places on the canvas are level-0 px; `scale` is screen px per level-0 px.

import {DRAWN, PLAIN, pack} from "./colours.js";
import {listen} from "./gestures.js";
import {digits} from "./words.js";

const MARGIN = 0.96, LEAST_ZOOM = 0.5, MOST_TILE_PX = 420;
const LINES_FROM_PX = 9, MOST_RECTANGLES = 8000;
const css = ([red, green, blue], alpha) => `rgba(${red}, ${green}, ${blue}, ${alpha})`;

export class Viewer {
  /** Told of the tile under the pointer (`onHover`), of one moved to by keys (`onMove`), of one chosen (`onPick`). */
  constructor(canvas, bar, {onHover, onMove, onPick}) {
    Object.assign(this, {canvas, bar, onHover, onMove, onPick});
    this.pen = canvas.getContext("2d");
    this.layers = {thumbnail: true, areas: true, tiles: true};
    this.clear();
    new ResizeObserver(() => this.#resize()).observe(canvas);
    listen(this);
  }

  clear() {
    for (const {bitmap} of Object.values(this.pictures ?? {})) bitmap.close();
    Object.assign(this, {size: null, field: null, pictures: {}, colours: null, drawn: null, cursor: -1, hover: -1});
    this.rasters = {};
    this.bar.hidden = true;
    this.redraw();
  }

  /** Shows a slide of this size (level-0 px, microns per px), as a whole. */
  show(size, mpp) {
    Object.assign(this, {size, mpp});
    this.fit();
  }

  setField(field) {
    this.field = field;
    this.setColours(null);
  }

  /** A picture of the whole slide, drawn under the tiles in the order of their names' coming. */
  setPicture(name, bitmap, pxL0) {
    this.pictures[name] = {bitmap, pxL0};
    this.redraw();
  }

  /** Colours of all tiles (`colours.colourAll`), or null for plain ones. */
  setColours(colours) {
    this.colours = colours;
    if (this.field) {
      this.rasters.tiles = this.field.raster(colours ?? new Uint32Array(this.field.length).fill(pack(PLAIN, 0.28)));
    }
    this.redraw();
  }

  /** Which tiles are drawn for a step: 1 for each of them; null for none. */
  setDrawn(drawn) {
    this.drawn = drawn;
    this.rasters.drawn = drawn && this.field.raster(Uint32Array.from(drawn, is => (is ? pack(DRAWN, 0.75) : 0)));
    this.redraw();
  }

  setLayer(name, isShown) {
    this.layers[name] = isShown;
    this.redraw();
  }

  fit() {
    if (!this.size) return;
    this.#measure();
    this.scale = this.#fitScale();
    [this.x, this.y] = [0, 1].map(axis => (this.size[axis] - this.room[axis] / this.scale) / 2);
    this.redraw();
  }

  zoom(factor, at = this.room.map(side => side / 2)) {
    if (!this.size) return;
    const most = this.field ? MOST_TILE_PX / Math.max(this.field.tileW, this.field.tileH) : 1;
    const fit = this.#fitScale();
    const scale = Math.min(Math.max(most, 4 * fit), Math.max(LEAST_ZOOM * fit, this.scale * factor));
    this.x += at[0] / this.scale - at[0] / scale;
    this.y += at[1] / this.scale - at[1] / scale;
    this.scale = scale;
    this.#keepInSight();
  }

  pan(right, down) {
    if (!this.size) return;
    this.x += right / this.scale;
    this.y += down / this.scale;
    this.#keepInSight();
  }

  /** Puts the cursor on a tile, and moves the map if it lies outside. */
  moveTo(row) {
    this.cursor = row;
    if (row < 0) return this.redraw();
    const {field, room, scale} = this;
    const middle = [field.x[row] + field.tileW / 2, field.y[row] + field.tileH / 2];
    const place = [(middle[0] - this.x) * scale, (middle[1] - this.y) * scale];
    if (place.some((at, axis) => at < 0.05 * room[axis] || at > 0.95 * room[axis])) {
      [this.x, this.y] = [0, 1].map(axis => middle[axis] - room[axis] / scale / 2);
    }
    return this.redraw();
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.#draw();
    });
  }

  #fitScale() {
    return MARGIN * Math.min(this.room[0] / this.size[0], this.room[1] / this.size[1]);
  }

  #keepInSight() {
    // The middle of the map stays over the slide, so that nobody gets lost.
    [this.x, this.y] = [this.x, this.y].map((start, axis) => {
      const half = this.room[axis] / this.scale / 2;
      return Math.min(this.size[axis] - half, Math.max(-half, start));
    });
    this.redraw();
  }

  #measure() {
    const box = this.canvas.getBoundingClientRect(), sharp = window.devicePixelRatio || 1;
    this.room = [Math.max(1, box.width), Math.max(1, box.height)];
    [this.canvas.width, this.canvas.height] = this.room.map(side => Math.round(side * sharp));
    this.sharp = sharp;
  }

  #resize() {
    const before = this.room;
    this.#measure();
    if (!this.size) return;
    if (!before || before[0] <= 1) return void this.fit();
    this.pan((before[0] - this.room[0]) / 2, (before[1] - this.room[1]) / 2);
  }

  #draw() {
    const {pen, canvas, sharp} = this;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.size) return;
    const zoom = this.scale * sharp;
    pen.setTransform(zoom, 0, 0, zoom, -this.x * zoom, -this.y * zoom);
    pen.fillStyle = "#fff";  // Glass.
    pen.fillRect(0, 0, ...this.size);
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, ...this.size);  // The pictures' last px may reach past the slide's edge.
    pen.clip();
    for (const [name, {bitmap, pxL0}] of Object.entries(this.pictures)) {
      if (!this.layers[name]) continue;
      pen.globalAlpha = name === "areas" ? 0.45 : 1;
      pen.imageSmoothingEnabled = name !== "areas";
      pen.drawImage(bitmap, 0, 0, bitmap.width * pxL0, bitmap.height * pxL0);
    }
    pen.globalAlpha = 1;
    pen.restore();
    if (this.field) this.#drawTiles();
    this.#drawBar();
  }

  #drawTiles() {
    const {field, scale} = this;
    const isLarge = Math.min(field.tileW, field.tileH) * scale >= LINES_FROM_PX;
    const seen = isLarge ? field.within(this.x, this.y, this.x + this.room[0] / scale, this.y + this.room[1] / scale) : null;
    const isNear = seen !== null && seen.length <= MOST_RECTANGLES;
    if (this.layers.tiles) {
      if (this.colours || !isNear) this.#drawRaster(this.rasters.tiles);
      if (isNear) this.#outline(seen, this.colours ? "rgba(255, 255, 255, 0.3)" : css(PLAIN, 0.75), 1);
    }
    if (this.drawn) {
      const chosen = isNear && seen.filter(row => this.drawn[row]);
      if (chosen) this.#outline(chosen, css(DRAWN, 1), 2, css(DRAWN, 0.35));
      else this.#drawRaster(this.rasters.drawn);
    }
    if (this.hover >= 0) this.#outline([this.hover], "#000", 1.5);
    if (this.cursor >= 0) {
      this.#outline([this.cursor], "#fff", 5);
      this.#outline([this.cursor], "#000", 2.5);
    }
  }

  #drawRaster({picture, zoom}) {
    this.pen.imageSmoothingEnabled = this.scale < zoom;
    this.pen.drawImage(picture, 0, 0, picture.width / zoom, picture.height / zoom);
  }

  #outline(rows, stroke, width, fill) {
    const {pen, field} = this;
    pen.beginPath();
    for (const row of rows) pen.rect(field.x[row], field.y[row], field.tileW, field.tileH);
    if (fill) {
      pen.fillStyle = fill;
      pen.fill();
    }
    pen.strokeStyle = stroke;
    pen.lineWidth = width / this.scale;
    pen.stroke();
  }

  #drawBar() {
    this.bar.hidden = !this.mpp;
    if (!this.mpp) return;
    const roomUm = (0.3 * Math.min(this.room[0], 500) * this.mpp) / this.scale;
    const power = 10 ** Math.floor(Math.log10(roomUm));
    const lengthUm = power * [5, 2, 1].find(step => step * power <= roomUm);
    this.bar.style.width = `${(lengthUm / this.mpp) * this.scale}px`;
    this.bar.textContent = lengthUm >= 1000 ? `${digits(lengthUm / 1000)} mm` : `${digits(lengthUm)} µm`;
  }

  /** The tile at a place on the canvas, screen px; -1 where there is none. */
  rowAt([right, down]) {
    return this.field && this.size ? this.field.at(this.x + right / this.scale, this.y + down / this.scale) : -1;
  }

  /** Points at a tile, as the mouse does. */
  setHover(row) {
    if (row === this.hover) return;
    this.hover = row;
    this.onHover(row);
    this.redraw();
  }

  /** Puts the cursor on a tile and shows it. */
  pick(row) {
    if (row < 0) return;
    this.moveTo(row);
    this.onPick(row);
  }

  /** Moves the cursor to the next tile that way; the first time to the one in the middle of what is seen. */
  step(dx, dy) {
    const {field, room, scale} = this;
    const middle = [this.x + room[0] / scale / 2, this.y + room[1] / scale / 2];
    this.moveTo(this.cursor < 0 ? field.nearest(...middle) : field.neighbour(this.cursor, dx, dy));
    this.onMove(this.cursor);
  }
}
