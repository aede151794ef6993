// What is looked at, kept in the address: back works, and a link shows somebody else the same.

const KEYS = [
  "slide", "q", "status", "sort", "label", "tile", "k", "seed", "epoch", "part", "num_parts", "run", "colour",
];
const LIST_KEYS = ["q", "status", "sort", "label"];

/** The view that the address names: strings by key, those without a value left out. */
export function readView() {
  const given = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(KEYS.filter(key => given.get(key)).map(key => [key, given.get(key)]));
}

export function hashOf(view) {
  const kept = KEYS.filter(key => view[key] != null && view[key] !== "").map(key => [key, view[key]]);
  return `#${new URLSearchParams(kept)}`;
}

/** A link to a slide: the list stays as it is filtered, and the run that is looked at stays the same. */
export function slideHash(id) {
  const view = readView();
  const kept = [...LIST_KEYS, "run", "colour"].map(key => [key, view[key]]);
  return hashOf({...Object.fromEntries(kept), slide: id});
}

/** A link to the archive with the list filtered so. */
export function archiveHash(changes = {}) {
  const view = readView();
  return hashOf({...Object.fromEntries(LIST_KEYS.map(key => [key, view[key]])), ...changes});
}

/** Changes what the address says without a new step for the back button, and draws nothing anew but links. */
export function noteView(changes) {
  history.replaceState(null, "", hashOf({...readView(), ...changes}));
  window.dispatchEvent(new Event("view-noted"));
}
