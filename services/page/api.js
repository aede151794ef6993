// Asking the service: the token, problems as errors, pictures, and answers that come in pages.

const TOKEN = "slidegrad-token";

/** What the service answered instead: `status`, and its sentence as the message. */
export class Problem extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** Addresses are relative to the page, so that it works behind a proxy's prefix too. */
const absolute = path => new URL(path, document.baseURI);

async function ask(path, signal) {
  const token = sessionStorage.getItem(TOKEN);
  let answer;
  try {
    answer = await fetch(absolute(path), {signal, headers: token ? {Authorization: `Bearer ${token}`} : {}});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The service does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) window.dispatchEvent(new Event("needs-token"));
  const body = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, body.detail ?? `The service answered ${answer.status}.`);
}

export async function askJson(path, signal) {
  const body = await (await ask(path, signal)).json();
  signal?.throwIfAborted();
  return body;
}

/** A picture and the headers it came with. */
export async function askPicture(path, signal) {
  const answer = await ask(path, signal);
  const bitmap = await createImageBitmap(await answer.blob());
  signal?.throwIfAborted();
  return {bitmap, headers: answer.headers};
}

/** How many things match, and the path of the next page of them (null at the end). */
export function pageOf(body, path) {
  const [route] = path.split("?");
  const next = body.links.find(link => link.rel === "next");
  return {total: body.numberMatched, next: next ? route + new URL(next.href, absolute(path)).search : null};
}

export const slidePath = (id, what = "") => `v1/slides/${encodeURIComponent(id)}${what}`;

/** Runs the latest call alone: an earlier one that still waits is given up, and its result dropped; so by `stop`. */
export function latest(task) {
  let control = null;
  const run = async (...given) => {
    run.stop();
    control = new AbortController();
    const {signal} = control;
    try {
      await task(signal, ...given);
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  };
  run.stop = () => control?.abort();
  return run;
}
