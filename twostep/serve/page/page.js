// The page: what is wished, when it is drawn, and what is shown of it.

import { provenance } from "./png.js";
import { capabilities, Drawing } from "./server.js";

const LONGEST_WAIT = 250; // ms after the last key, where a drawing takes long
const INSTANT = 150; // ms within which a drawing may begin at every key
const MAX_HISTORY = 24;
const MAX_SEED = 2 ** 32 - 17;

const at = (id) => document.getElementById(id);
const [form, prompt, model, seed] = ["wish", "prompt", "model", "seed"].map(at);
const [guidance, negative, strength, picture] = ["guidance", "negative", "strength", "picture"].map(at);

const state = {
  models: [],
  drawing: null, // what is under way
  comparing: null,
  timer: 0,
  wait: 0, // ms after a key
  milliseconds: {}, // by model and steps
  source: null, // a picture to begin with, as a data: address
  last: null, // {body, answer, address} of what is shown
};

const chosenModel = () => state.models.find((each) => each.name === model.value);
const chosenSteps = () => Number(form.elements.steps?.value);
const checkpoint = () => chosenModel().checkpoints.find((each) => each.steps === chosenSteps());
const teacher = () => chosenModel().checkpoints.find((each) => each.role === "teacher");

function body() {
  const wish = { prompt: prompt.value, model: model.value, steps: chosenSteps(), seed: Number(seed.value) };
  wish.previews = true;
  if (checkpoint().role === "teacher") {
    wish.guidance = Number(guidance.value);
    wish.negative_prompt = negative.value;
  }
  const loras = [...document.querySelectorAll("#loras input")].filter((each) => Number(each.value));
  if (loras.length) wish.loras = loras.map((each) => `${each.name}:${each.value}`);
  if (state.source) Object.assign(wish, { image: state.source, strength: Number(strength.value) });
  return wish;
}

// The newest wish wins: whatever is drawn for an older one is given up at once.
function changed({ now = false } = {}) {
  clearTimeout(state.timer);
  if (!prompt.value.trim() || !seed.checkValidity()) return stop();
  state.timer = setTimeout(draw, now ? 0 : state.wait);
}

function stop() {
  clearTimeout(state.timer);
  state.drawing?.stop();
  state.comparing?.stop();
  state.drawing = state.comparing = null;
  at("progress").value = 0;
}

async function draw() {
  stop();
  at("beside").hidden = true;
  const wish = body();
  const drawing = (state.drawing = new Drawing());
  const start = performance.now();
  say("Drawing …");
  try {
    const drawn = await drawing.run(wish, showStep);
    if (!drawn) return;
    const took = performance.now() - start;
    state.wait = took < INSTANT ? 0 : Math.min(LONGEST_WAIT, took / 2);
    show(wish, drawn, took);
  } catch (error) {
    if (state.drawing === drawing) say(`Not drawn: ${error.message}`);
  }
  if (state.drawing === drawing) state.drawing = null;
}

function showStep(values) {
  at("progress").value = values.num_done / values.num_steps;
  if (!values.previews.length || values.num_done === values.num_steps) return;
  picture.src = `data:image/png;base64,${values.previews[0]}`;
  picture.classList.add("coarse");
  picture.hidden = false;
}

function show(wish, { answer, blob }, took) {
  const address = URL.createObjectURL(blob);
  picture.src = address;
  picture.classList.remove("coarse");
  picture.alt = wish.prompt;
  picture.hidden = false;
  at("progress").value = 1;
  at("caption").textContent = `${answer.checkpoint}, ${answer.width} × ${answer.height}, seed ${answer.seed}`;
  const sum = Object.values(answer.milliseconds).reduce((a, b) => a + b, 0);
  state.milliseconds[`${wish.model} ${answer.steps}`] = sum;
  const time = document.querySelector(`#steps [value="${wish.steps}"] ~ small`);
  if (time) time.textContent = ` ${sum} ms`;
  const warnings = answer.warnings.map((text) => ` ${text[0].toUpperCase()}${text.slice(1)}`);
  say(`Drawn in ${Math.round(took)} ms.${warnings.join("")}`);
  const download = at("download");
  download.href = address;
  download.download = `${answer.checkpoint}_${answer.seed}.png`;
  download.hidden = false;
  state.last = { body: wish, answer, address };
  remember(state.last);
}

function remember(entry) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  image.src = entry.address;
  image.alt = `${entry.body.prompt}, ${entry.answer.checkpoint}, seed ${entry.answer.seed}`;
  button.append(image);
  button.addEventListener("click", () => restore(entry.body));
  item.append(button);
  const list = at("history");
  list.prepend(item);
  for (const old of [...list.children].slice(MAX_HISTORY)) {
    URL.revokeObjectURL(old.querySelector("img").src);
    old.remove();
  }
}

// Sets everything as it was for a picture, and draws it again.
function restore(wish) {
  prompt.value = wish.prompt;
  if (state.models.some((each) => each.name === wish.model)) model.value = wish.model;
  listSteps(wish.steps);
  seed.value = wish.seed;
  if (wish.guidance > 1) guidance.value = wish.guidance;
  negative.value = wish.negative_prompt ?? "";
  for (const slider of document.querySelectorAll("#loras input")) {
    const found = (wish.loras ?? []).find((each) => each.replace(/:[^:]*$/, "") === slider.name);
    slider.value = found ? Number(found.split(":").pop()) || 1 : 0;
  }
  begin(wish.image?.startsWith?.("data:") ? wish.image : null);
  if (wish.strength) strength.value = wish.strength;
  outputs();
  changed({ now: true });
}

async function compare() {
  if (!state.last) return;
  state.comparing?.stop();
  const comparing = (state.comparing = new Drawing());
  const { steps, guidance: scale, name } = teacher();
  const wish = { ...state.last.body, steps, guidance: scale, previews: false };
  say(`${name} draws from the same noise …`);
  try {
    const drawn = await comparing.run(wish, (values) => (at("progress").value = values.num_done / values.num_steps));
    if (!drawn) return;
    const sum = Object.values(drawn.answer.milliseconds).reduce((a, b) => a + b, 0);
    at("reference").src = URL.createObjectURL(drawn.blob);
    at("reference").alt = `${wish.prompt}, drawn by the teacher`;
    at("reference-caption").textContent = `${name}, ${steps} steps with guidance ${scale}: ${sum} ms`;
    at("beside").hidden = false;
    say("The teacher's picture is beside.");
  } catch (error) {
    say(`The teacher drew nothing: ${error.message}`);
  }
}

function listSteps(wished) {
  const chips = at("steps");
  const before = wished ?? chosenSteps();
  const offered = chosenModel().checkpoints.map((each) => each.steps);
  const chosen = offered.includes(before) ? before : offered.includes(2) ? 2 : offered.at(-1);
  chips.replaceChildren(
    ...chosenModel().checkpoints.map((each) => {
      const label = document.createElement("label");
      const input = document.createElement("input");
      const time = document.createElement("small");
      input.type = "radio";
      input.name = "steps";
      input.value = each.steps;
      input.checked = each.steps === chosen;
      const known = state.milliseconds[`${model.value} ${each.steps}`];
      time.textContent = known ? ` ${known} ms` : "";
      label.append(input, `${each.steps}${each.role === "teacher" ? " (teacher)" : ""}`, time);
      return label;
    }),
  );
  lock();
}

// Students have no guidance, and so nothing to do with a negative prompt.
function lock() {
  const { role, name, guidance: usual } = checkpoint();
  const isTeacher = role === "teacher";
  guidance.disabled = negative.disabled = !isTeacher;
  if (isTeacher && !guidance.dataset.chosen) guidance.value = usual;
  at("why").textContent = isTeacher
    ? `${name} was made for ${usual}.`
    : `${name} is a student: guidance was distilled into it, so it takes none, and no negative prompt.`;
  at("compare").hidden = isTeacher || !teacher();
  outputs();
}

function begin(address) {
  state.source = address;
  at("begun").hidden = !address;
  if (address) at("source").src = address;
}

async function take(file) {
  if (!file) return;
  const made = await provenance(file);
  if (made && !made.image) return restore({ ...made, model: short(made.model) });
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    begin(reader.result);
    changed({ now: true });
  });
  reader.readAsDataURL(file);
}

const short = (place) => place.split("/").pop().replace(/\.safetensors$/, "");

function outputs() {
  for (const input of [guidance, strength, ...document.querySelectorAll("#loras input")]) {
    const output = input.parentElement.querySelector("output");
    output.textContent = input.disabled ? "" : input.value;
  }
}

const COPIES = {
  cli: (wish) => {
    const words = ["twostep", "generate", quoted(wish.prompt), "--model", quoted(wish.model), "--steps", wish.steps];
    words.push("--seed", wish.seed);
    if (wish.guidance) words.push("--guidance", wish.guidance);
    if (wish.negative_prompt) words.push("--negative", quoted(wish.negative_prompt));
    for (const lora of wish.loras ?? []) words.push("--lora", quoted(lora));
    return words.join(" ");
  },
  curl: (wish) =>
    `curl -s ${location.origin}/v1/images/generations -H 'Content-Type: application/json' -d ${quoted(JSON.stringify({ ...wish, previews: undefined, guidance: undefined, guidance_scale: wish.guidance }))}`,
  python: (wish) => {
    const names = ["model", "steps", "seed", "guidance", "negative_prompt", "loras"];
    const given = names.filter((name) => wish[name] !== undefined && wish[name] !== "");
    const values = given.map((name) => `, ${name}=${JSON.stringify(wish[name])}`);
    const request = `twostep.Request(${JSON.stringify(wish.prompt)}${values.join("")})`;
    return `import twostep\n\nwith twostep.Client("${location.origin}") as client:\n    client.draw(${request}).save("out")\n`;
  },
};

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

async function copy(kind) {
  if (!state.last) return say("Nothing is drawn yet.");
  const { image, ...wish } = state.last.body;
  await navigator.clipboard.writeText(COPIES[kind](wish));
  say(image ? "Copied, without the picture that was begun with." : "Copied.");
}

function say(text) {
  at("status").textContent = text;
}

function listen() {
  form.addEventListener("submit", (event) => event.preventDefault());
  prompt.addEventListener("input", () => changed());
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    changed({ now: true });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !(state.drawing || state.comparing)) return;
    stop();
    say("Stopped.");
  });
  model.addEventListener("change", () => (listSteps(), changed({ now: true })));
  at("steps").addEventListener("change", () => (lock(), changed({ now: true })));
  guidance.addEventListener("input", () => (guidance.dataset.chosen = "yes"));
  for (const input of [seed, guidance, negative, strength]) {
    input.addEventListener("input", () => (outputs(), changed()));
  }
  at("loras").addEventListener("input", () => (outputs(), changed()));
  at("other").addEventListener("click", () => {
    seed.value = Math.floor(Math.random() * MAX_SEED);
    changed({ now: true });
  });
  at("compare").addEventListener("click", compare);
  at("file").addEventListener("change", (event) => take(event.target.files[0]));
  at("leave").addEventListener("click", () => {
    begin(null);
    at("file").value = "";
    changed({ now: true });
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(button.dataset.copy));
  }
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("pagehide", stop);
}

async function open() {
  const { models, default_model: usual, loras } = await capabilities();
  state.models = models;
  model.replaceChildren(...models.map(({ name }) => new Option(name, name, false, name === usual)));
  at("models").hidden = models.length < 2;
  at("loras").hidden = !loras.length;
  for (const name of loras) {
    const row = document.createElement("p");
    const label = document.createElement("label");
    const input = document.createElement("input");
    row.className = "row";
    label.textContent = name;
    label.htmlFor = input.id = `lora-${name}`;
    Object.assign(input, { type: "range", name, min: -1, max: 2, step: 0.05, value: 0 });
    row.append(label, input, document.createElement("output"));
    at("loras").append(row);
  }
  listSteps();
  listen();
  if (prompt.value.trim()) changed({ now: true });
}

open().catch((error) => say(`The page cannot work: ${error.message}`));
