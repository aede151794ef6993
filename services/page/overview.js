// The archive as a whole: counts, tiles per slide, and why slides failed.

import {askJson} from "./api.js";
import {archiveHash, slideHash} from "./address.js";
import {REASONS, byId, count, digits, make, percent, slides} from "./words.js";

const STATUS = {ok: "ready", empty: "without tissue", failed: "failed"};

export async function showOverview(signal) {
  const stats = await askJson("v1/stats", signal);
  byId("figures").replaceChildren(...figures(stats));
  showHistogram(stats);
  showLeftOut(stats.rejected ?? {});
  showFailures(stats.failures ?? [], stats.status.failed);
}

function figures(stats) {
  const perSlide = stats.tiles_per_slide;
  const scales = stats.tile_mpp.filter(Boolean).map(mpp => digits(mpp, 4)).join(", ");
  const told = [
    ...Object.entries(STATUS).map(([status, word]) => [
      make("a", {href: archiveHash({status}), textContent: count(stats.status[status])}), word, status,
    ]),
    [count(stats.num_tiles), "tiles"],
    [count(Math.round(perSlide.p50)), "in the median slide"],
    [count(perSlide.max), "in the largest"],
  ];
  if (stats.num_bad_tiles) told.push([count(stats.num_bad_tiles), "damaged tiles left out", "failed"]);
  if (scales) told.push([scales, "µm per pixel"]);
  return told.map(([number, word, kind = ""]) =>
    make("div", {className: kind}, make("dd", {}, number), make("dt", {textContent: word})));
}

function showHistogram({histogram, status}) {
  const {edges = [], counts = []} = histogram ?? {};
  const most = Math.max(1, ...counts);
  byId("bars").replaceChildren(...counts.map((number, i) => {
    const range = edges[i + 1] - 1 > edges[i] ? `${count(edges[i])} – ${count(edges[i + 1] - 1)}` : count(edges[i]);
    const bar = make("span", {className: "bar"});
    bar.style.inlineSize = `${(100 * number) / most}%`;
    const share = status.ok ? percent(number / status.ok) : "";
    return make("tr", {},
      make("th", {scope: "row", textContent: range}),
      make("td", {}, bar),
      make("td", {textContent: count(number), title: share}));
  }));
  byId("histogram").hidden = !counts.length;
}

function showLeftOut(rejected) {
  const told = Object.entries(rejected).filter(([, number]) => number);
  byId("left-out").hidden = !told.length;
  byId("left-out-rows").replaceChildren(...told.map(([reason, number]) =>
    make("li", {}, make("strong", {textContent: count(number)}), ` ${REASONS[reason] ?? reason}`)));
}

function showFailures(failures, numFailed) {
  byId("failures").hidden = !numFailed;
  byId("failure-rows").replaceChildren(...failures.map(({reason, num_slides: number, slide_ids: ids}) => {
    const links = ids.map(id => make("li", {}, make("a", {href: slideHash(id), textContent: id})));
    if (number > ids.length) {
      const rest = make("a", {href: archiveHash({status: "failed"}), textContent: `and ${count(number - ids.length)} more`});
      links.push(make("li", {}, rest));
    }
    return make("details", {},
      make("summary", {}, make("span", {className: "number", textContent: count(number)}), make("span", {textContent: reason})),
      make("ul", {className: "ids"}, ...links));
  }));
  const told = failures.reduce((sum, {num_slides: number}) => sum + number, 0);
  if (told < numFailed) {
    byId("failure-rows").append(make("p", {}, `${slides(numFailed - told)} failed for other reasons.`));
  }
}

