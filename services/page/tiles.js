// A slide's tiles in typed arrays, with a grid of buckets over them: which tile lies here, which are in view.

const MAX_BUCKETS = 2_000_000;
const RASTER_TILE_PX = 4, RASTER_SIDE_PX = 3072;

export class TileField {
  /** Columns of the answer, the level-0 px that one tile covers, and the slide's size in level-0 px. */
  constructor(columns, [tileW, tileH], [width, height]) {
    this.x = Int32Array.from(columns.x_l0);
    this.y = Int32Array.from(columns.y_l0);
    this.tissue = Float32Array.from(columns.tissue);
    this.length = this.x.length;
    [this.tileW, this.tileH, this.width, this.height] = [tileW, tileH, width, height];
    this.#fillBuckets();
  }

  #fillBuckets() {
    const {x, y, length} = this;
    let right = 0, bottom = 0;
    for (let i = 0; i < length; i++) {
      right = Math.max(right, x[i]);
      bottom = Math.max(bottom, y[i]);
    }
    // A bucket is no smaller than a tile: one that covers a point begins in its bucket, or one to the left or above.
    let times = 1;
    const across = () => [Math.floor(right / (this.tileW * times)) + 1, Math.floor(bottom / (this.tileH * times)) + 1];
    while (across()[0] * across()[1] > MAX_BUCKETS) times *= 2;
    [this.columns, this.rows] = across();
    [this.bucketW, this.bucketH] = [this.tileW * times, this.tileH * times];
    this.starts = new Int32Array(this.columns * this.rows + 1);
    const bucketOf = new Int32Array(length);
    for (let i = 0; i < length; i++) {
      bucketOf[i] = this.#row(y[i]) * this.columns + this.#column(x[i]);
      this.starts[bucketOf[i] + 1]++;
    }
    for (let b = 0; b < this.columns * this.rows; b++) this.starts[b + 1] += this.starts[b];
    const next = this.starts.slice();
    this.items = new Int32Array(length);
    for (let i = 0; i < length; i++) this.items[next[bucketOf[i]]++] = i;
  }

  #column(x) {
    return Math.min(this.columns - 1, Math.max(0, Math.floor(x / this.bucketW)));
  }

  #row(y) {
    return Math.min(this.rows - 1, Math.max(0, Math.floor(y / this.bucketH)));
  }

  /** Calls `visit(i)` for every tile that begins in the buckets of a rectangle (level-0 px), and some beside it. */
  #visit(x0, y0, x1, y1, visit) {
    const from = this.#column(x0), to = this.#column(x1);
    for (let row = this.#row(y0), last = this.#row(y1); row <= last; row++) {
      const end = this.starts[row * this.columns + to + 1];
      for (let at = this.starts[row * this.columns + from]; at < end; at++) visit(this.items[at]);
    }
  }

  /** The tile over a point; of several that overlap the one whose middle is nearest; -1 where there is none. */
  at(x, y) {
    let best = -1, least = Infinity;
    this.#visit(x - this.tileW, y - this.tileH, x, y, i => {
      const right = x - this.x[i], down = y - this.y[i];
      if (right < 0 || down < 0 || right >= this.tileW || down >= this.tileH) return;
      const far = Math.hypot(right - this.tileW / 2, down - this.tileH / 2);
      if (far < least) [best, least] = [i, far];
    });
    return best;
  }

  /** The tiles that intersect a rectangle, level-0 px. */
  within(x0, y0, x1, y1) {
    const found = [];
    this.#visit(x0 - this.tileW, y0 - this.tileH, x1, y1, i => {
      const isOutside = this.x[i] >= x1 || this.y[i] >= y1 || this.x[i] + this.tileW <= x0 || this.y[i] + this.tileH <= y0;
      if (!isOutside) found.push(i);
    });
    return found;
  }

  /** The next tile to the left, right, up or down (dx, dy of -1, 0, 1); the same one where there is none. */
  neighbour(from, dx, dy) {
    const {x, y, tileW, tileH} = this;
    let best = from, least = Infinity;
    const look = reach => {
      const x0 = dx ? x[from] + Math.min(0, dx * reach * tileW) : x[from] - reach * tileW;
      const y0 = dy ? y[from] + Math.min(0, dy * reach * tileH) : y[from] - reach * tileH;
      this.#visit(x0, y0, x0 + reach * tileW * (dx ? 1 : 2), y0 + reach * tileH * (dy ? 1 : 2), i => {
        const along = ((x[i] - x[from]) * dx) / tileW + ((y[i] - y[from]) * dy) / tileH;
        const aside = Math.abs(((x[i] - x[from]) * dy) / tileW) + Math.abs(((y[i] - y[from]) * dx) / tileH);
        // Ahead, within a cone of 45 degrees; straight on before aside.
        if (along <= 0.01 || aside > along || along + 2 * aside >= least) return;
        [best, least] = [i, along + 2 * aside];
      });
    };
    const most = Math.max(this.width / tileW, this.height / tileH) + 1;
    for (let reach = 2; best === from && reach < 2 * most; reach *= 2) look(reach);
    return best;
  }

  /** The tile nearest to a point. */
  nearest(x, y) {
    let best = 0, least = Infinity;
    for (let i = 0; i < this.length; i++) {
      const far = Math.hypot(this.x[i] + this.tileW / 2 - x, this.y[i] + this.tileH / 2 - y);
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  /** All tiles as a small picture: drawn in one go, however many they are. `colours`: RGBA as bytes, a word each. */
  raster(colours) {
    const zoom = Math.min(
      RASTER_TILE_PX / Math.min(this.tileW, this.tileH), RASTER_SIDE_PX / Math.max(this.width, this.height));
    const picture = new OffscreenCanvas(Math.ceil(this.width * zoom), Math.ceil(this.height * zoom));
    const pen = picture.getContext("2d");
    const image = pen.createImageData(picture.width, picture.height);
    const words = new Uint32Array(image.data.buffer);
    for (let i = 0; i < this.length; i++) {
      if (!colours[i]) continue;
      const left = Math.max(0, Math.round(this.x[i] * zoom)), top = Math.max(0, Math.round(this.y[i] * zoom));
      const right = Math.min(image.width, Math.max(left + 1, Math.round((this.x[i] + this.tileW) * zoom)));
      const bottom = Math.min(image.height, Math.max(top + 1, Math.round((this.y[i] + this.tileH) * zoom)));
      for (let y = top; y < bottom; y++) words.fill(colours[i], y * image.width + left, y * image.width + right);
    }
    pen.putImageData(image, 0, 0);
    return {picture, zoom};
  }
}
