// The list of slides: search, filters, order, and one page of it at a time, however many slides there are.

import {askJson, latest, pageOf} from "./api.js";
import {archiveHash, readView, slideHash} from "./address.js";
import {byId, count, make, slides} from "./words.js";

const PER_PAGE = 50;
const TYPING_MS = 200;
const filters = {q: byId("q"), status: byId("status"), sort: byId("sort")};
let shown = null, before = [], here = "", next = null;

/** Shows the list that the address names, and marks the slide that is open. */
export async function showList(isForced = false) {
  const {q = "", status = "", sort = "", label = ""} = readView();
  for (const [key, value] of Object.entries({q, status, sort})) {
    if (filters[key].value.trim() !== value) filters[key].value = value;  // A space at the end is still being typed.
  }
  byId("label").hidden = !label;
  byId("label-name").textContent = label.replace(":", ": ");
  const query = new URLSearchParams({limit: PER_PAGE});
  for (const [key, value] of Object.entries({q, status, sort, label})) if (value) query.set(key, value);
  const path = `v1/slides?${query}`;
  if (path !== shown || isForced) await load(path, path, []);
  else markOpen();
}

const load = latest(async (signal, path, first, earlier) => {
  const body = await askJson(path, signal);
  const page = pageOf(body, path);
  [shown, here, next, before] = [first, path, page.next, earlier];
  const from = before.length * PER_PAGE;
  byId("rows").replaceChildren(...body.slides.map(toRow));
  byId("none").hidden = body.slides.length > 0;
  byId("count").textContent = page.total > PER_PAGE
    ? `${count(from + 1)}–${count(from + body.slides.length)} of ${slides(page.total)}`
    : slides(page.total);
  byId("previous").disabled = !before.length;
  byId("next").disabled = next === null;
  byId("pages").hidden = page.total <= PER_PAGE;
  byId("list-body").scrollTop = 0;
  markOpen();
});

function toRow(slide) {
  const link = make("a", {href: slideHash(slide.slide_id), textContent: slide.slide_id});
  const labels = Object.entries(slide.labels ?? {}).filter(([, value]) => value !== "" && value !== null);
  const about = make("small", {textContent: labels.map(([column, value]) => `${column} ${value}`).join(" · ")});
  const status = make("td", {className: `status ${slide.status}`, textContent: slide.status});
  return make("tr", {},
    make("th", {scope: "row"}, link, ...(labels.length ? [about] : [])),
    status,
    make("td", {className: "number", textContent: slide.status === "ok" ? count(slide.num_tiles) : "–"}));
}

function markOpen() {
  for (const link of byId("rows").querySelectorAll("a")) {
    link.href = slideHash(link.textContent);
    const isOpen = link.textContent === readView().slide;
    link.closest("tr").classList.toggle("open", isOpen);
    if (isOpen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Connects the form and the pager; `change` takes what the address shall say, `guarded` shows what goes wrong. */
export function startList(change, guarded) {
  window.addEventListener("view-noted", markOpen);  // Links keep the run that is looked at.
  let timer = 0;
  const apply = () => {
    clearTimeout(timer);
    change(Object.fromEntries(Object.entries(filters).map(([key, field]) => [key, field.value.trim()])));
  };
  byId("filters").addEventListener("submit", event => {
    event.preventDefault();
    apply();
  });
  filters.q.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(apply, TYPING_MS);
  });
  for (const field of [filters.status, filters.sort]) field.addEventListener("change", apply);
  byId("label").addEventListener("click", () => change({label: ""}));
  byId("next").addEventListener("click", () => guarded(() => load(next, shown, [...before, here])));
  byId("previous").addEventListener("click", () => guarded(() => load(before.at(-1), shown, before.slice(0, -1))));
}
