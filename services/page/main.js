// The page: what the address names is shown, and what goes wrong is said in one place.

import {latest, setToken} from "./api.js";
import {archiveHash, noteView, readView} from "./address.js";
import {showList, startList} from "./list.js";
import {showOverview} from "./overview.js";
import {closeSlide, showSlide, startSlide} from "./slide.js";
import {byId, sentence} from "./words.js";

async function guarded(task) {
  try {
    await task();
    return true;
  } catch (error) {
    if (error.status !== 401) byId("said").textContent = sentence(error.message);
    return false;
  }
}

const overview = latest(showOverview);

async function show(isForced = false) {
  const {slide} = readView();
  byId("said").textContent = "";
  document.title = slide ? `${slide} – Slidegrad` : "Slidegrad";
  document.body.classList.toggle("has-slide", Boolean(slide));
  byId("overview").hidden = Boolean(slide);
  byId("slide").hidden = !slide;
  byId("back").href = archiveHash();
  byId("title").href = archiveHash();
  if (!slide) closeSlide();
  const main = slide ? () => showSlide() : () => overview();
  const went = await Promise.all([guarded(() => showList(isForced)), guarded(main)]);
  // On a narrow screen the list, and the link that was followed, gave way to the slide.
  if (slide && byId("list").offsetParent === null) byId("slide-name").focus();
  if (slide && !went[1]) byId("verdict").textContent = byId("said").textContent;
}

/** A change of the list: the slide that is open stays open. */
function change(changes) {
  noteView(changes);
  guarded(() => showList());
}

window.addEventListener("needs-token", () => {
  byId("house").hidden = true;
  byId("door").hidden = false;
  byId("token").focus();
  byId("door-said").textContent = byId("token").value ? "This token is not the right one." : "";
});
byId("door").addEventListener("submit", async event => {
  event.preventDefault();
  setToken(byId("token").value.trim());
  byId("door-said").textContent = "";
  byId("house").hidden = false;
  byId("door").hidden = true;
  await show(true);
  if (byId("door").hidden) byId("token").value = "";
});
byId("skip").addEventListener("click", () => byId("main").focus());
window.addEventListener("hashchange", () => show());

startList(change, guarded);
startSlide(guarded);
show();
