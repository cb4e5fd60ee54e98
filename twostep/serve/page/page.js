// The page: what is wished, when it is drawn, and what is shown of it.

import { Easel, Layer } from "./canvas.js";
import { Controls } from "./controls.js";
import { command, curl, inputsOf, python } from "./copies.js";
import { Player } from "./player.js";
import { provenance, withInputs } from "./png.js";
import { capabilities, Drawing, hasKey, item as itemAt, keysComeFrom, workflow } from "./server.js";
import { Turns } from "./turns.js";

const MAX_HISTORY = 24;
const MAX_SEED = 2 ** 32 - 17;
const SETTLED = 700; // ms after which a picture that nothing replaced is remembered
const USUAL_STRENGTH = 0.75;
const SPECTROGRAM = "2 / 1"; // the shape in which sounds are shown

const FILES = { image: "picture", video: "clip", audio: "sound" };

// What may be wished of each medium, and what comes of it.
const WORDS = {
  image: { such: "a 3d red apple on a blue background", empty: "Say what to draw: the picture comes here." },
  video: { such: "a 3d fox on a blue background, spinning", empty: "Say what to draw: the clip comes here." },
  audio: { such: "a low piano note, soft", empty: "Say what to play: the sound comes here." },
};

const at = (id) => document.getElementById(id);
const [form, prompt, model, seed, size] = ["wish", "prompt", "model", "seed", "size"].map(at);
const [guidance, negative, strength, frames] = ["guidance", "negative", "strength", "frames"].map(at);
const format = at("format");
const player = new Player(at("main"));
const reference = new Player(at("beside"));

const state = {
  models: [],
  drawing: null, // what is under way
  comparing: null,
  milliseconds: {}, // by model and steps
  reference: null, // {address, poster} of what is beside
  hasControls: false,
  hasLoras: false,
  image: null, // the layer that is begun with
  mask: null, // the layer that says where it changes
  missing: [], // pictures that a restored wish had and the page has not: {sha256, name, put}
  last: null, // {body, answer, blob, name, format, address, poster} of what is shown
  formats: {}, // that were chosen, by medium
  settling: 0,
  key: "", // model and steps of the last wish
};

const turns = new Turns(draw, () => state.drawing?.stop(), () => busy(false));
const easel = new Easel(at("canvas"), painted);
let controls = null;

const chosenModel = () => state.models.find((each) => each.name === model.value);
const chosenSteps = () => Number(form.elements.steps?.value);
const checkpoint = () => chosenModel().checkpoints.find((each) => each.steps === chosenSteps());
const teacher = () => chosenModel().checkpoints.find((each) => each.role === "teacher");
const medium = () => checkpoint().media;
// The format that was chosen, null for the model's own.
const chosenFormat = () => state.formats[medium()] ?? null;
const chosenStrength = () => checkpoint().strengths[strength.value];

function body() {
  const wish = { prompt: prompt.value, model: model.value, steps: chosenSteps(), seed: Number(seed.value) };
  wish.previews = true;
  if (size.value) [wish.width, wish.height] = size.value.split("x").map(Number);
  if (checkpoint().role === "teacher") {
    wish.guidance = Number(guidance.value);
    wish.negative_prompt = negative.value;
  }
  if (medium() === "video" && frames.value) wish.frames = Number(frames.value);
  if (medium() !== "image") return wish;
  const loras = [...document.querySelectorAll("#loras input")].filter((each) => Number(each.value));
  if (loras.length) wish.loras = loras.map((each) => `${each.name}:${each.value}`);
  const image = checkpoint().strengths.length ? state.image?.address() : null;
  if (image) Object.assign(wish, { image, strength: chosenStrength() });
  const mask = image && state.mask?.address();
  if (mask) wish.mask = mask;
  const wished = controls.wishes();
  if (wished.length) wish.controls = wished;
  return wish;
}

function changed(how) {
  if (!prompt.value.trim() || !seed.checkValidity() || !frames.checkValidity()) return stop();
  const key = `${model.value} ${chosenSteps()}`;
  const felt = state.milliseconds[key]?.felt;
  if (felt || key !== state.key) turns.milliseconds = felt ?? null;
  state.key = key;
  busy(true);
  turns.change(how);
}

// Whether a picture of what is wished is still to come.
function busy(isBusy) {
  at("main").setAttribute("aria-busy", isBusy);
}

function stop() {
  turns.halt();
  state.comparing?.stop();
  state.comparing = null;
  at("progress").value = 0;
}

async function draw() {
  state.comparing?.stop();
  hideReference();
  const drawing = (state.drawing = new Drawing());
  const start = performance.now();
  const kind = chosenFormat();
  try {
    const wish = body();
    say("Drawing …");
    const drawn = await drawing.run(wish, showStep, kind);
    if (drawn) await show(wish, { ...drawn, format: kind }, performance.now() - start);
  } catch (error) {
    if (!drawing.stopped) say(`Not drawn: ${error.message}`, { isFault: true });
  }
  if (state.drawing === drawing) state.drawing = null;
}

function showStep(values) {
  at("progress").value = values.num_done / values.num_steps;
  if (!values.previews.length || values.num_done === values.num_steps) return;
  player.foresee(`data:image/png;base64,${values.previews[0]}`, medium());
  if (medium() === "audio") at("picture").parentElement.style.aspectRatio = SPECTROGRAM;
  at("empty").hidden = true;
}

async function show(wish, drawn, took) {
  const { answer, blob, poster } = drawn;
  const { image, mask, controls: acting } = wish;
  const whole = image || acting ? await withInputs(blob, { image, mask, controls: acting }) : blob;
  const sum = total(answer.milliseconds);
  const key = `${wish.model} ${answer.steps}`;
  const felt = state.milliseconds[key]?.felt ?? took;
  state.milliseconds[key] = { sum, felt: (felt + took) / 2 };
  const time = document.querySelector(`#steps [value="${wish.steps}"] ~ small`);
  if (time) time.textContent = ` ${sum} ms`;
  letGo();
  const shown = poster && URL.createObjectURL(poster);
  display({ ...drawn, body: wish, address: URL.createObjectURL(whole), poster: shown });
  const warnings = answer.warnings.map((text) => ` ${text[0].toUpperCase()}${text.slice(1)}`);
  const verb = answer.media === "audio" ? "Made" : "Drawn";
  say(`${verb} in ${Math.round(took)} ms.${warnings.join("")}`);
  const entry = state.last;
  state.settling = setTimeout(() => remember(entry), SETTLED);
}

const total = (milliseconds) => Object.values(milliseconds).reduce((a, b) => a + b, 0);

// Forgets the picture that is shown, if it was not there long enough to be remembered.
function letGo() {
  clearTimeout(state.settling);
  if (state.last && !state.last.item) revoke(state.last);
}

function revoke(entry) {
  URL.revokeObjectURL(entry.address);
  if (entry.poster) URL.revokeObjectURL(entry.poster);
}

function display(entry) {
  const { answer, address } = entry;
  state.last = entry;
  player.show(playable(entry));
  at("empty").hidden = true;
  at("progress").value = 1;
  at("caption").textContent = `${answer.checkpoint}, ${measure(answer)}, seed ${answer.seed}`;
  at("download").href = address;
  at("download").download = entry.name;
  at("actions").hidden = false;
  listFormats(entry);
  at("go-on").hidden = answer.media !== "image";
  document.querySelector("[data-copy=workflow]").hidden = answer.media !== "image";
  at("inputs").hidden = true;
  markCurrent();
}

// Returns what a player needs of an entry.
function playable({ body: wish, answer, blob, address, poster }) {
  const { media, width, height } = answer;
  const ratio = media === "audio" ? SPECTROGRAM : `${width} / ${height}`;
  return { media, type: blob.type, address, poster, alt: wish.prompt, ratio };
}

// Says how large an item is, or how long.
function measure({ media, width, height, frames: count, duration_seconds: seconds }) {
  const size = `${width} × ${height}`;
  if (media === "audio") return `${seconds.toFixed(2)} s`;
  return media === "video" ? `${size}, ${count} frames, ${seconds.toFixed(2)} s` : size;
}

function listFormats({ answer, format: chosen }) {
  const checkpoints = state.models.flatMap((each) => each.checkpoints);
  const formats = checkpoints.find((each) => each.name === answer.checkpoint)?.formats ?? [];
  const isPicture = answer.media === "image"; // of which only PNGs say how they were made
  format.replaceChildren(...formats.map((each) => new Option(each.toUpperCase(), each)));
  format.value = chosen ?? formats[0];
  format.parentElement.hidden = isPicture || formats.length < 2;
}

// Shows what is shown in another format.
async function exchange() {
  const entry = state.last;
  state.formats[entry.answer.media] = format.value;
  try {
    const { blob, name } = await itemAt(entry.answer.images[0], format.value);
    URL.revokeObjectURL(entry.address);
    Object.assign(entry, { blob, name, format: format.value, address: URL.createObjectURL(blob) });
    if (state.last === entry) display(entry);
  } catch (error) {
    say(`Not to be had so: ${error.message}`, { isFault: true });
  }
}

function markCurrent() {
  for (const button of document.querySelectorAll("#history button")) button.removeAttribute("aria-current");
  state.last.item?.firstElementChild.setAttribute("aria-current", "true");
}

const entries = new WeakMap(); // of the items in the history

function remember(entry) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  image.src = entry.poster ?? entry.address;
  image.alt = `${entry.body.prompt}, ${entry.answer.checkpoint}, seed ${entry.answer.seed}`;
  button.append(image);
  button.addEventListener("click", () => goBack(entry));
  item.append(button);
  entry.item = item;
  entries.set(item, entry);
  const list = at("history");
  list.prepend(item);
  at("past").hidden = false;
  for (const old of [...list.children].slice(MAX_HISTORY)) {
    revoke(entries.get(old));
    old.remove();
  }
  markCurrent();
}

async function goBack(entry) {
  stop();
  letGo();
  hideReference();
  await restore(entry.body);
  display(entry);
  say("As it was for this one.");
}

// Sets everything as it was for a picture. `wish` is as it was sent, with pictures as addresses.
async function restore(wish) {
  state.missing = [];
  prompt.value = wish.prompt;
  if (state.models.some((each) => each.name === wish.model)) model.value = wish.model;
  listSteps(wish.steps);
  listSizes(wish.width ? `${wish.width}x${wish.height}` : "");
  seed.value = wish.seed;
  if (wish.guidance > 1) guidance.value = wish.guidance;
  negative.value = wish.negative_prompt ?? "";
  frames.value = wish.frames ?? "";
  for (const slider of document.querySelectorAll("#loras input")) {
    const found = (wish.loras ?? []).find((each) => each.replace(/:[^:]*$/, "") === slider.name);
    slider.value = found ? Number(found.split(":").pop()) || 1 : 0;
  }
  await begin(wish.image ?? null);
  if (wish.mask) state.mask = await Layer.from("mask", wish.mask);
  if (wish.strength) setStrength(wish.strength);
  controls.clear();
  for (const each of wish.controls ?? []) controls.add(await Layer.from("control", each.picture), each);
  refresh();
}

// Restores what a PNG of twostep's says. Pictures that went in are in those that this page saved; of
// others it has the hashes alone, by which they are known when they are dropped too.
async function restoreFrom(made) {
  const { inputs } = made;
  const wish = { ...made, model: short(made.model), loras: made.loras.map(short) };
  const size = `${made.width}x${made.height}`;
  if (![...at("size").options].some((each) => each.value === size)) wish.width = wish.height = null;
  Object.assign(wish, { image: inputs.image ?? null, mask: inputs.mask ?? null, controls: inputs.controls ?? [] });
  await restore(wish);
  const missing = [];
  const beginAnew = async (address) => {
    const mask = state.mask;
    await begin(address);
    state.mask = mask;
  };
  if (made.image && !inputs.image) missing.push({ ...made.image, put: beginAnew });
  if (made.mask && !inputs.mask) {
    missing.push({ ...made.mask, put: async (address) => (state.mask = await Layer.from("mask", address)) });
  }
  if (!inputs.controls) {
    for (const { picture: file, model: place, ...rest } of made.controls) {
      const row = controls.add(blank("control"), { ...rest, name: short(place) });
      missing.push({ ...file, put: (address) => controls.open(row, address) });
    }
  }
  if (made.strength) setStrength(made.strength);
  state.missing = missing;
}

// The last part of a path without its ending; a weight behind it stays.
const short = (place) => place.split("/").pop().replace(/\.safetensors(?=$|:)/, "");

async function compare() {
  if (!state.last) return;
  state.comparing?.stop();
  const comparing = (state.comparing = new Drawing());
  const { steps, guidance: scale, name } = teacher();
  const wish = { ...state.last.body, steps, guidance: scale, previews: false };
  say(`${name} draws from the same noise …`);
  try {
    const drawn = await comparing.run(
      wish,
      (values) => (at("progress").value = values.num_done / values.num_steps),
      state.last.format,
    );
    if (!drawn) return;
    hideReference();
    const address = URL.createObjectURL(drawn.blob);
    state.reference = { address, poster: drawn.poster && URL.createObjectURL(drawn.poster) };
    const entry = { body: wish, answer: drawn.answer, blob: drawn.blob, ...state.reference };
    reference.show({ ...playable(entry), alt: `${wish.prompt}, by the teacher` });
    at("reference-caption").textContent = `${name}, ${steps} steps with guidance ${scale}: ${total(drawn.answer.milliseconds)} ms`;
    at("beside").hidden = false;
    at("progress").value = 1;
    say("The teacher's is beside.");
  } catch (error) {
    if (!comparing.stopped) say(`The teacher drew nothing: ${error.message}`, { isFault: true });
  }
}

function hideReference() {
  at("beside").hidden = true;
  reference.clear();
  if (state.reference) revoke(state.reference);
  state.reference = null;
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
      time.textContent = known ? ` ${known.sum} ms` : "";
      label.append(input, `${each.steps}${each.role === "teacher" ? " (teacher)" : ""}`, time);
      return label;
    }),
  );
  lock();
}

function listSizes(wished = size.value) {
  const { sizes } = checkpoint();
  const options = sizes.map(([width, height]) => new Option(`${width} × ${height}`, `${width}x${height}`));
  size.replaceChildren(new Option("automatic", ""), ...options);
  size.value = options.length > 1 && options.some((each) => each.value === wished) ? wished : "";
  at("sizes").hidden = sizes.length < 2;
}

// What a student cannot do is locked, with the reason.
function lock() {
  const { role, name, guidance: usual, strengths } = checkpoint();
  const isTeacher = role === "teacher";
  guidance.disabled = negative.disabled = !isTeacher;
  if (isTeacher && !guidance.dataset.chosen) guidance.value = usual;
  at("why").textContent = isTeacher
    ? `${name} was made for ${usual}.`
    : `${name} is a student: guidance was distilled into it, so it takes none, and no negative prompt.`;
  const isPicture = medium() === "image";
  at("compare").hidden = isTeacher || !teacher();
  at("beginning").hidden = !isPicture;
  at("control").hidden = !isPicture || !state.hasControls;
  at("loras").hidden = !isPicture || !state.hasLoras;
  at("lengths").hidden = medium() !== "video";
  prompt.placeholder = WORDS[medium()]?.such ?? "";
  if (!state.last) at("empty").textContent = (WORDS[medium()] ?? WORDS.image).empty;
  at("with-picture").hidden = !strengths.length;
  at("no-picture").hidden = strengths.length > 0;
  at("no-picture").textContent = `${name} draws from pure noise alone; it cannot begin with a picture.`;
  setStrength(Number(strength.dataset.wished ?? USUAL_STRENGTH));
  listSizes();
  outputs();
}

// Puts the slider on the stop that is nearest to a strength: a student begins nowhere between.
function setStrength(wished) {
  const { strengths } = checkpoint();
  if (!strengths.length) return;
  const far = (each) => Math.abs(each - wished);
  const nearest = strengths.reduce((a, b) => (far(b) <= far(a) ? b : a));
  strength.max = strengths.length - 1;
  strength.value = strengths.indexOf(nearest);
  strength.dataset.wished = wished;
  const stops = strengths.length <= 16 ? strengths : [];
  at("stops").replaceChildren(...stops.map((each, i) => new Option(each, i)));
}

function outputs() {
  for (const input of [guidance, ...document.querySelectorAll("#loras input")]) {
    const output = input.closest("p").querySelector("output");
    output.textContent = input.disabled ? "" : input.value;
  }
  at("width").nextElementSibling.textContent = `${at("width").value} %`;
  if (!checkpoint().strengths.length) return;
  const share = chosenStrength();
  const count = Math.ceil(share * chosenSteps() - 1e-6);
  const text = `${Math.round(100 * share)} %, ${count} ${count === 1 ? "step" : "steps"}`;
  strength.nextElementSibling.textContent = text;
  strength.setAttribute("aria-valuetext", text);
}

// Returns an empty layer in the shape that is drawn.
function blank(kind) {
  const [width, height] = size.value ? size.value.split("x").map(Number) : checkpoint().sizes[0];
  return Layer.blank(kind, width, height);
}

// Begins with the picture at an address; with none where that is null.
async function begin(address) {
  state.image = address ? await Layer.from("picture", address) : null;
  state.mask = null;
  if (!state.image && ["picture", "mask"].includes(easel.layer?.kind)) closeCanvas();
  refresh();
}

// Shows what is begun with, and the canvas as it stands.
function refresh() {
  const address = state.image?.address();
  at("begun").hidden = !state.image;
  at("source").hidden = !address;
  if (address) at("source").src = address;
  controls.refresh();
  at("add").disabled = controls.isFull;
  if (!at("easel").hidden) listLayers();
  outputs();
}

function openCanvas(layer) {
  at("easel").hidden = false;
  edit(layer);
  at("canvas").focus({ preventScroll: true });
  at("easel").scrollIntoView({ block: "nearest", behavior: "auto" });
}

function closeCanvas() {
  easel.close();
  at("easel").hidden = true;
}

// What may be painted on: its name and its layer.
function layers() {
  const found = [];
  if (state.image) found.push(["Picture", state.image]);
  if (state.image) found.push(["Where it changes", (state.mask ??= maskOf(state.image))]);
  for (const row of controls.rows) found.push([controls.titleOf(row), row.layer]);
  return found;
}

const maskOf = ({ width, height }) => new Layer("mask", width, height);

function listLayers() {
  const found = layers();
  if (!found.some(([, layer]) => layer === easel.layer)) {
    if (!found.length) return closeCanvas();
    return edit(found[0][1]);
  }
  // Chips that stay are kept, for one of them may have the focus.
  const names = found.map(([name]) => name);
  const chips = [...at("layers").children];
  if (names.join() !== chips.map((each) => each.textContent).join()) {
    at("layers").replaceChildren(...names.map(chipOf));
  }
  const chosen = found.findIndex(([, layer]) => layer === easel.layer);
  at("layers").children[chosen].firstElementChild.checked = true;
  at("canvas").setAttribute("aria-label", `Canvas: ${names[chosen]}`);
  at("undo").disabled = !easel.layer.canUndo;
  at("redo").disabled = !easel.layer.canRedo;
  at("clear").disabled = !easel.layer.canUndo;
  at("colours").hidden = easel.layer.kind === "mask";
}

function chipOf(name, place) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "layer" });
  input.addEventListener("change", () => edit(layers()[place][1]));
  label.append(input, name);
  return label;
}

function edit(layer) {
  if (layer.kind !== easel.layer?.kind) at("colour").value = layer.kind === "control" ? "#ffffff" : "#d03a2b";
  easel.colour = at("colour").value;
  easel.show(layer, layer.kind === "mask" ? state.image : null);
  listLayers();
}

// Called by the easel while a stroke grows and when it ends.
function painted(isDone) {
  if (isDone) refresh();
  changed({ now: isDone, patient: !isDone });
}

function rework(how) {
  easel.layer[how]();
  easel.refresh();
  refresh();
  changed({ now: true });
}

function brush(share) {
  at("width").value = share;
  easel.share = at("width").value / 100;
  easel.refresh();
  outputs();
}

const KEYS = {
  ArrowLeft: (far) => easel.step(-1, 0, far),
  ArrowRight: (far) => easel.step(1, 0, far),
  ArrowUp: (far) => easel.step(0, -1, far),
  ArrowDown: (far) => easel.step(0, 1, far),
  " ": () => say(easel.toggle() ? "The brush is down." : "The brush is lifted."),
  "[": () => brush(Number(at("width").value) - 1),
  "]": () => brush(Number(at("width").value) + 1),
};

function pressed(event) {
  const isCommand = event.ctrlKey || event.metaKey;
  if (isCommand && event.key.toLowerCase() === "z") {
    event.preventDefault();
    rework(event.shiftKey ? "redo" : "undo");
  } else if (!isCommand && KEYS[event.key]) {
    event.preventDefault();
    if (event.repeat && event.key === " ") return;
    KEYS[event.key](event.shiftKey ? 5 : 1);
  }
}

// Takes a file: one that a restored wish lacks, one of twostep's to restore, or one to begin with.
async function take(file) {
  if (!file) return;
  try {
    const digest = state.missing.length ? await sha256(file) : null;
    const wanted = state.missing.filter((each) => each.sha256 === digest);
    if (wanted.length) {
      for (const each of wanted) await each.put(await addressOf(file));
      state.missing = state.missing.filter((each) => !wanted.includes(each));
    } else {
      const made = await provenance(file);
      if (made) await restoreFrom(made);
      else if (medium() !== "image") throw new Error(`${model.value} begins with no picture`);
      else await begin(await addressOf(file));
    }
    refresh();
    if (state.missing.length) {
      const names = state.missing.map((each) => each.name || "a picture without a name").join(", ");
      return say(`It was made of ${names}, which it does not hold: drop that on the page too.`);
    }
    changed({ now: true });
  } catch (error) {
    say(`Not taken: ${error.message}`, { isFault: true });
  }
}

async function sha256(file) {
  // Without TLS browsers give it on the machine itself alone.
  if (!crypto.subtle) return null;
  const digest = await crypto.subtle.digest("SHA-256", await file.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function addressOf(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error("that file cannot be read")));
    reader.readAsDataURL(file);
  });
}

// Begins with the picture that is shown.
async function goOn() {
  await begin(await addressOf(state.last.blob));
  openCanvas(state.image);
  changed({ now: true });
}

async function copy(kind) {
  if (!state.last) return;
  const { body: wish, answer, name, format: chosen } = state.last;
  let inputs = inputsOf(wish);
  let text = "";
  try {
    if (kind === "cli") text = command(wish);
    if (kind === "curl") {
      const ending = name.slice(name.lastIndexOf("."));
      const file = (FILES[answer.media] ?? "item") + ending;
      text = curl(wish, location.origin, hasKey(), { file, format: chosen });
    }
    if (kind === "python") text = python(wish, location.origin, hasKey());
    if (kind === "workflow") {
      const found = await workflow(answer.images[0]);
      text = JSON.stringify(found.workflow);
      inputs = inputs.map((each) => ({ ...each, name: found.inputs[each.what] }));
    }
    await navigator.clipboard.writeText(text);
  } catch (error) {
    return say(`Not copied: ${error.message}`, { isFault: true });
  }
  const links = inputs.map(({ name, address }) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    Object.assign(link, { href: address, download: name, textContent: name });
    item.append(link);
    return item;
  });
  at("inputs").replaceChildren(...links);
  at("inputs").hidden = !links.length;
  const paste = kind === "workflow" ? " Paste it on ComfyUI's page." : "";
  say(links.length ? `Copied.${paste} It reads the files below.` : `Copied.${paste}`);
}

function say(text, { isFault = false } = {}) {
  at("status").textContent = text;
  at("status").classList.toggle("fault", isFault);
}

function askForKey() {
  const dialog = at("lock");
  at("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? at("key").value : null), { once: true });
  });
}

function listenToWishes() {
  form.addEventListener("submit", (event) => event.preventDefault());
  prompt.addEventListener("input", () => changed());
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    changed({ now: true });
  });
  model.addEventListener("change", () => (listSteps(), changed({ now: true })));
  size.addEventListener("change", () => changed({ now: true }));
  at("steps").addEventListener("change", () => (lock(), changed({ now: true })));
  guidance.addEventListener("input", () => (guidance.dataset.chosen = "yes"));
  strength.addEventListener("input", () => (strength.dataset.wished = chosenStrength()));
  for (const input of [seed, guidance, negative, strength, frames]) {
    input.addEventListener("input", () => (outputs(), changed()));
  }
  at("loras").addEventListener("input", () => (outputs(), changed()));
  at("other").addEventListener("click", () => {
    seed.value = Math.floor(Math.random() * MAX_SEED);
    changed({ now: true });
  });
}

function listenToPictures() {
  at("file").addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // so that the same file may be opened again
  });
  at("sketch").addEventListener("click", () => {
    state.image = blank("picture");
    state.mask = null;
    refresh();
    openCanvas(state.image);
  });
  at("paint").addEventListener("click", () => openCanvas(state.image));
  at("mask").addEventListener("click", () => openCanvas((state.mask ??= maskOf(state.image))));
  at("leave").addEventListener("click", async () => {
    await begin(null);
    changed({ now: true });
  });
  at("add").addEventListener("click", () => {
    const row = controls.add(blank("control"));
    refresh();
    openCanvas(row.layer);
  });
  at("canvas").addEventListener("keydown", pressed);
  for (const how of ["undo", "redo", "clear"]) at(how).addEventListener("click", () => rework(how));
  at("close").addEventListener("click", closeCanvas);
  at("colour").addEventListener("input", (event) => (easel.colour = event.target.value));
  at("width").addEventListener("input", (event) => brush(event.target.value));
  for (const input of document.querySelectorAll("[name=tool]")) {
    input.addEventListener("change", () => (easel.tool = input.value));
  }
  at("compare").addEventListener("click", compare);
  format.addEventListener("change", exchange);
  at("go-on").addEventListener("click", goOn);
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(button.dataset.copy));
  }
}

function listenToThePage() {
  document.addEventListener("keydown", (event) => {
    const isBusy = at("main").getAttribute("aria-busy") === "true";
    if (event.key !== "Escape" || !(isBusy || state.comparing)) return;
    stop();
    say("Stopped.");
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("pagehide", stop);
}

function listLoras(names) {
  for (const name of names) {
    const row = document.createElement("p");
    const label = document.createElement("label");
    const input = document.createElement("input");
    row.className = "slider";
    label.textContent = name;
    label.htmlFor = input.id = `lora-${name}`;
    Object.assign(input, { type: "range", name, min: -1, max: 2, step: 0.05, value: 0 });
    row.append(label, input, document.createElement("output"));
    at("loras").append(row);
  }
}

async function open() {
  keysComeFrom(askForKey);
  const { models, default_model: usual, loras, controlnets, limits } = await capabilities();
  state.models = models;
  model.replaceChildren(...models.map(({ name }) => new Option(name, name, false, name === usual)));
  at("models").hidden = models.length < 2;
  state.hasControls = controlnets.length > 0;
  state.hasLoras = loras.length > 0;
  controls = new Controls(at("controls"), at("control-row"), {
    names: controlnets,
    most: limits.controls,
    on: {
      change: () => changed(),
      edit: (row) => openCanvas(row.layer),
      open: async (row, file) => {
        try {
          if (file) await controls.open(row, await addressOf(file));
          refresh();
          changed({ now: true });
        } catch (error) {
          say(`Not taken: ${error.message}`, { isFault: true });
        }
      },
      remove: () => {
        refresh();
        changed({ now: true });
      },
    },
  });
  listLoras(loras);
  listSteps();
  brush(at("width").value);
  listenToWishes();
  listenToPictures();
  listenToThePage();
  if (prompt.value.trim()) changed({ now: true });
}

open().catch((error) => say(`The page cannot work: ${error.message}`, { isFault: true }));
