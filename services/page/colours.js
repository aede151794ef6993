// From a tile's number to its colour. Attention by its rank among the slide's tiles, since it is a softmax over
// thousands; contributions linear from 0, since they have a sign; both as `slidegrad heatmap` draws them.

// Anchors of matplotlib's viridis, evenly apart; blue to orange as the pictures of `slidegrad heatmap`.
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const SIGNS = ["0072b2", "f4f4f4", "d55e00"];
const QUANTILE = 0.99;
export const PLAIN = [0, 114, 178], DRAWN = [0, 200, 120];

const channels = hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16));

/** A colour scale: 0 to 1 gives [red, green, blue]. */
function scale(anchors) {
  const stops = anchors.map(channels);
  return share => {
    const at = Math.min(1, Math.max(0, share)) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low].map((channel, i) => Math.round(channel + (stops[low + 1][i] - channel) * (at - low)));
  };
}

export const ranks = scale(VIRIDIS);
export const signs = scale(SIGNS);

/** One word of a picture's bytes; processors of today are little-endian. */
export const pack = ([red, green, blue], alpha) => ((Math.round(alpha * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** Where each value stands among all, 0 to 1, ties in the middle; NaN stays NaN. */
export function rankShare(values) {
  const sorted = values.filter(value => !Number.isNaN(value)).sort();
  const bound = (value, isAfter) => {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (isAfter(sorted[middle], value)) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  return values.map(value => {
    if (Number.isNaN(value)) return NaN;
    if (sorted.length === 1) return 0.5;
    const first = bound(value, (a, b) => a >= b), after = bound(value, (a, b) => a > b);
    return (first + after - 1) / 2 / (sorted.length - 1);
  });
}

/** Where each contribution stands between the ends of the colours (0 and 1; 0.5 is none), and what lies at the end. */
export function signShare(values) {
  const sizes = values.filter(value => !Number.isNaN(value)).map(Math.abs).sort();
  // The quantile between its two neighbours, as numpy has it; where nearly all are 0, the largest; where all are, any.
  const at = QUANTILE * (sizes.length - 1), low = Math.floor(at);
  const quantile = sizes.length ? sizes[low] + (sizes[Math.ceil(at)] - sizes[low]) * (at - low) : 0;
  const end = quantile || sizes[sizes.length - 1] || 1;
  return {end, share: values.map(value => Math.min(1, Math.max(0, 0.5 + (0.5 * value) / end)))};
}

/** Colours of all tiles, for `TileField.raster`; a tile without a value has none. */
export function colourAll(shares, of, alpha) {
  const table = Uint32Array.from({length: 256}, (_, i) => pack(of(i / 255), alpha));
  return Uint32Array.from(shares, share => (Number.isNaN(share) ? 0 : table[Math.round(255 * share)]));
}
