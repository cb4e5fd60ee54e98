// A canvas to paint on: layers of strokes, and the editor that shows one of them.

const LONGEST_SIDE = 2048; // pixels of a picture that is painted on
const SHORT_ENOUGH = 512; // the least pixels along the longer side of an empty layer
const STEP = 0.02; // how far an arrow key moves the brush, as a share of the longer side
const UNDONE = "#ff3ea5"; // what is to be drawn anew is shown in this

const PAPER = { picture: "#ffffff", control: "#000000", mask: null };

function sheet(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

// Opens a picture at an address of its own data; none that is too large to paint on stays so large.
export async function opened(address) {
  const image = new Image();
  image.src = address;
  try {
    await image.decode();
  } catch {
    throw new Error("that file cannot be read as a picture");
  }
  const scale = LONGEST_SIDE / Math.max(image.naturalWidth, image.naturalHeight);
  if (scale >= 1) return { image, address };
  const canvas = sheet(Math.round(image.naturalWidth * scale), Math.round(image.naturalHeight * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return { image: canvas, address: canvas.toDataURL() };
}

// Strokes of one kind over paper: a "picture", a "mask" (white where something is drawn anew) or
// what a "control" looks at.
export class Layer {
  #ink;
  #base = null; // a picture under the strokes
  #address = null; // that picture as it came
  #strokes = [];
  #undone = [];

  constructor(kind, width, height) {
    Object.assign(this, { kind, width, height });
    this.#ink = sheet(width, height);
  }

  static blank(kind, width, height) {
    const scale = Math.max(1, Math.ceil(SHORT_ENOUGH / Math.max(width, height)));
    return new Layer(kind, width * scale, height * scale);
  }

  static async from(kind, address) {
    const { image, address: kept } = await opened(address);
    const layer = new Layer(kind, image.naturalWidth ?? image.width, image.naturalHeight ?? image.height);
    layer.#base = kind === "mask" ? inkOf(image, layer.width, layer.height) : image;
    layer.#address = kept;
    layer.#redraw();
    return layer;
  }

  get isEmpty() {
    return !this.#base && !this.#strokes.length;
  }

  get canUndo() {
    return this.#strokes.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  begin(stroke) {
    this.#strokes.push(stroke);
    this.#undone = [];
    this.#trace(stroke, 0);
  }

  extend(points) {
    const stroke = this.#strokes.at(-1);
    const from = stroke.points.length - 1;
    stroke.points.push(...points);
    this.#trace(stroke, from);
  }

  // Ends a stroke: all is drawn anew, for pieces put together have other edges than a whole.
  end() {
    this.#redraw();
  }

  undo() {
    if (this.canUndo) this.#undone.push(this.#strokes.pop());
    this.#redraw();
  }

  redo() {
    if (this.canRedo) this.#strokes.push(this.#undone.pop());
    this.#redraw();
  }

  // Takes all strokes away; the picture under them stays.
  clear() {
    this.#strokes = [];
    this.#undone = [];
    this.#redraw();
  }

  // Paints what the layer shows.
  paint(context) {
    if (PAPER[this.kind]) {
      context.fillStyle = PAPER[this.kind];
      context.fillRect(0, 0, this.width, this.height);
      if (this.#base) context.drawImage(this.#base, 0, 0, this.width, this.height);
    }
    context.drawImage(this.#ink, 0, 0);
  }

  // Returns what it shows as the address of a file; null where there is nothing.
  address() {
    if (this.isEmpty) return null;
    if (this.#address && !this.#strokes.length) return this.#address;
    const canvas = sheet(this.width, this.height);
    const context = canvas.getContext("2d");
    if (this.kind === "mask") {
      context.drawImage(this.#ink, 0, 0);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = "#ffffff";
      context.fillRect(0, 0, this.width, this.height);
      context.globalCompositeOperation = "destination-over";
      context.fillStyle = "#000000";
      context.fillRect(0, 0, this.width, this.height);
    } else {
      this.paint(context);
    }
    return canvas.toDataURL();
  }

  #redraw() {
    this.#ink.getContext("2d").clearRect(0, 0, this.width, this.height);
    // A mask's picture is ink too, which the eraser takes away.
    if (this.kind === "mask" && this.#base) this.#ink.getContext("2d").drawImage(this.#base, 0, 0);
    for (const stroke of this.#strokes) this.#trace(stroke, 0);
  }

  #trace({ tool, colour, width, points }, from) {
    const context = this.#ink.getContext("2d");
    context.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
    Object.assign(context, { strokeStyle: colour, lineWidth: width, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...points[Math.max(0, from)]);
    const rest = points.slice(Math.max(0, from) + 1);
    for (const point of rest.length ? rest : [points[0]]) context.lineTo(...point);
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }
}

// Returns a mask's picture as ink: opaque where it is white.
function inkOf(image, width, height) {
  const canvas = sheet(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(UNDONE.slice(at, at + 2), 16));
  for (let i = 0; i < pixels.data.length; i += 4) {
    const isWhite = pixels.data[i] >= 128;
    pixels.data.set([red, green, blue, isWhite ? 255 : 0], i);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// Shows a layer and paints on it. `onPaint(isDone)` is called while a stroke grows and when it ends.
export class Easel {
  layer = null;
  under = null; // the picture that a mask lies over
  tool = "brush";
  colour = "#ffffff";
  share = 0.08; // the brush's width, as a share of the longer side
  #canvas;
  #onPaint;
  #place = null; // where the brush is
  #pen = null; // "pointer" or "keys" while it is down
  #frame = 0;

  constructor(canvas, onPaint) {
    this.#canvas = canvas;
    this.#onPaint = onPaint;
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => this.#lift("pointer"));
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("blur", () => this.#lift("keys"));
  }

  show(layer, under = null) {
    this.#lift();
    Object.assign(this, { layer, under });
    Object.assign(this.#canvas, { width: layer.width, height: layer.height });
    this.#place = null;
    this.refresh();
  }

  // Shows nothing any more.
  close() {
    this.#lift();
    this.layer = null;
  }

  // Draws all anew before the next frame.
  refresh() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#draw());
  }

  // Moves the brush by arrow keys, in steps; paints if it is down.
  step(x, y, count) {
    const { width, height } = this.layer;
    const far = STEP * count * Math.max(width, height);
    const [before, above] = this.#place ?? [width / 2, height / 2];
    this.#place = [Math.min(width, Math.max(0, before + x * far)), Math.min(height, Math.max(0, above + y * far))];
    if (this.#pen === "keys") this.layer.extend([this.#place]);
    if (this.#pen === "keys") this.#onPaint(false);
    this.refresh();
  }

  // Sets the brush down where it is, or lifts it; says whether it is down.
  toggle() {
    if (this.#pen === "keys") {
      this.#lift("keys");
      return false;
    }
    const { width, height } = this.layer;
    this.#place ??= [width / 2, height / 2];
    this.#set("keys");
    return true;
  }

  #draw() {
    if (!this.layer) return;
    const context = this.#canvas.getContext("2d");
    context.clearRect(0, 0, this.layer.width, this.layer.height);
    this.under?.paint(context);
    context.globalAlpha = this.layer.kind === "mask" ? 0.6 : 1;
    this.layer.paint(context);
    context.globalAlpha = 1;
    if (this.#place) this.#ring(context);
  }

  #ring(context) {
    const line = this.layer.width / Math.max(1, this.#canvas.clientWidth);
    const radius = Math.max(line, this.#width / 2);
    for (const [colour, wide] of [["#000000", 3], ["#ffffff", 1.5]]) {
      context.beginPath();
      context.arc(...this.#place, radius, 0, 2 * Math.PI);
      Object.assign(context, { strokeStyle: colour, lineWidth: wide * line });
      context.stroke();
    }
  }

  get #width() {
    return Math.max(1, this.share * Math.max(this.layer.width, this.layer.height));
  }

  #set(pen) {
    this.#pen = pen;
    const colour = this.layer.kind === "mask" ? UNDONE : this.colour;
    this.layer.begin({ tool: this.tool, colour, width: this.#width, points: [this.#place] });
    this.refresh();
    this.#onPaint(false);
  }

  #lift(pen = this.#pen) {
    if (!this.#pen || this.#pen !== pen) return;
    this.#pen = null;
    this.layer.end();
    this.refresh();
    this.#onPaint(true);
  }

  #at({ clientX, clientY }) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return [((clientX - left) / width) * this.layer.width, ((clientY - top) / height) * this.layer.height];
  }

  #press(event) {
    if (!this.layer || event.button !== 0 || this.#pen) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#place = this.#at(event);
    this.#set("pointer");
  }

  #move(event) {
    if (!this.layer) return;
    if (this.#pen === "pointer") {
      const events = event.getCoalescedEvents?.() ?? [];
      this.layer.extend((events.length ? events : [event]).map((each) => this.#at(each)));
      this.#onPaint(false);
    }
    if (this.#pen !== "keys") this.#place = this.#at(event);
    this.refresh();
  }

  #leave() {
    if (this.#pen) return;
    this.#place = null;
    this.refresh();
  }
}
