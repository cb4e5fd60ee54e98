// Talks to the server: what it can do, and jobs that are followed and given up.

const CLIENT = crypto.getRandomValues(new Uint32Array(2)).join("-");
let key = sessionStorage.getItem("key");
let askForKey = async () => null;

// Says who asks a person for the key: a function that promises it, or null.
export function keysComeFrom(ask) {
  askForKey = ask;
}

export const hasKey = () => Boolean(key);

async function ask(path, options = {}) {
  const headers = { "X-Twostep-Client": CLIENT, ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  if (answer.status === 401) {
    key = await askForKey();
    if (!key) throw new Error("the server needs its key");
    sessionStorage.setItem("key", key);
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

export async function capabilities() {
  return (await ask("/api/v1/capabilities")).json();
}

// Returns {prompt, workflow, inputs}: how ComfyUI draws the picture at an address.
export async function workflow(picture) {
  return (await ask(`${picture}/workflow`)).json();
}

// Returns a file of the server: {blob, name}, with the name that it has there.
async function fetched(path, options) {
  const answer = await ask(path, options);
  const name = /filename="([^"]*)"/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1] ?? "file";
  return { blob: await answer.blob(), name };
}

// Returns the item at an address in some format, or in its own where that is null.
export const item = (path, format, options) => fetched(format ? `${path}?format=${format}` : path, options);

// One drawing. `stop()` gives it up wherever it is, and nothing of it is reported any more.
export class Drawing {
  #aborter = new AbortController();
  #id = null;
  stopped = false;

  // Draws, calls onStep(values) at each step, and returns {answer, blob, name, poster}, where the poster is
  // null or the picture that is shown of it; null if it was stopped. `format` is as for `item`.
  async run(body, onStep, format = null) {
    try {
      const headers = { "Content-Type": "application/json" };
      const posted = await ask("/api/v1/jobs", { method: "POST", headers, body: JSON.stringify(body) });
      const job = await posted.json();
      this.#id = job.id;
      if (this.stopped) {
        this.#giveUp();
        return null;
      }
      const stream = await ask(job.events, { signal: this.#aborter.signal });
      for await (const [kind, values] of events(stream)) {
        if (this.stopped) return null;
        if (kind === "step") onStep(values);
        if (kind === "failed" || kind === "cancelled") throw new Error(values.error);
        if (kind === "done") {
          const options = { signal: this.#aborter.signal };
          const made = await item(values.images[0], format, options);
          const shown = values.posters ? await fetched(values.posters[0], options) : null;
          return this.stopped ? null : { answer: values, ...made, poster: shown?.blob ?? null };
        }
      }
      throw new Error("the server ended the connection");
    } catch (error) {
      if (this.stopped) return null;
      throw error;
    }
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    this.#aborter.abort();
    if (this.#id) this.#giveUp();
  }

  #giveUp() {
    ask(`/api/v1/jobs/${this.#id}`, { method: "DELETE", keepalive: true }).catch(() => {});
  }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const lines = text.slice(0, end).split("\n");
      const kind = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (kind && data) yield [kind, JSON.parse(data)];
    }
  }
}
