// ControlNets: a row for each, with the layer that it looks at.

import { Layer } from "./canvas.js";

// The rows of a list. `names` are the ControlNets that there are, `most` how many may be at once.
// `on.change()` is called when one acts otherwise, `on.edit(row)` when its picture is to be painted,
// `on.open(row, file)` when it is to be another, `on.remove()` when a row is gone.
export class Controls {
  rows = []; // {item, layer}
  #list;
  #template;
  #names;
  #most;
  #on;

  constructor(list, template, { names, most, on }) {
    this.#list = list;
    this.#template = template;
    this.#names = names;
    this.#most = most;
    this.#on = on;
  }

  get isFull() {
    return this.rows.length >= this.#most;
  }

  // Adds a row that looks at a layer.
  add(layer, { name, scale = 1, start = 0, end = 1 } = {}) {
    const item = this.#template.content.firstElementChild.cloneNode(true);
    const row = { item, layer };
    const select = item.querySelector("select");
    select.replaceChildren(...this.#names.map((each) => new Option(each, each, false, each === name)));
    for (const [key, value] of Object.entries({ scale, start, end })) this.#slider(row, key).value = value;
    for (const input of item.querySelectorAll("input[type=range]")) {
      input.id = `${input.name}-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
      input.parentElement.querySelector("label").htmlFor = input.id;
      input.addEventListener("input", () => (this.#bound(row, input), this.#on.change()));
    }
    select.addEventListener("change", () => this.#on.change());
    item.querySelector("[data-do=draw]").addEventListener("click", () => this.#on.edit(row));
    item.querySelector("[data-do=remove]").addEventListener("click", () => this.remove(row));
    item.querySelector("input[type=file]").addEventListener("change", (event) => this.#on.open(row, event.target.files[0]));
    this.rows.push(row);
    this.#list.append(item);
    this.#bound(row);
    this.refresh();
    return row;
  }

  remove(row) {
    this.rows = this.rows.filter((each) => each !== row);
    row.item.remove();
    this.refresh();
    this.#on.remove();
  }

  clear() {
    for (const { item } of this.rows) item.remove();
    this.rows = [];
  }

  // Puts another picture into a row.
  async open(row, address) {
    row.layer = await Layer.from("control", address);
    this.refresh();
  }

  titleOf(row) {
    return `ControlNet ${this.rows.indexOf(row) + 1}`;
  }

  // Shows what the rows look at now.
  refresh() {
    for (const row of this.rows) {
      const title = this.titleOf(row);
      const image = row.item.querySelector("img");
      const address = row.layer.address();
      image.hidden = !address;
      if (address) image.src = address;
      image.alt = `What ${title} looks at`;
      row.item.querySelector("select").setAttribute("aria-label", title);
      for (const button of row.item.querySelectorAll("[data-do]")) {
        button.setAttribute("aria-label", `${button.textContent}: ${title}`);
      }
      row.item.querySelector("input[type=file]").setAttribute("aria-label", `Open a picture: ${title}`);
    }
  }

  // Returns what the server is asked for; rows without a picture ask for nothing.
  wishes() {
    return this.rows
      .map((row) => ({
        name: row.item.querySelector("select").value,
        picture: row.layer.address(),
        scale: Number(this.#slider(row, "scale").value),
        start: Number(this.#slider(row, "start").value),
        end: Number(this.#slider(row, "end").value),
      }))
      .filter((each) => each.picture);
  }

  #slider(row, name) {
    return row.item.querySelector(`[name=${name}]`);
  }

  // Keeps the share of the steps that it acts in from being empty, and says the numbers.
  #bound(row, moved = null) {
    const start = this.#slider(row, "start");
    const end = this.#slider(row, "end");
    if (Number(start.value) >= Number(end.value)) {
      if (moved === start) start.value = Number(end.value) - 0.05;
      else end.value = Number(start.value) + 0.05;
    }
    for (const input of row.item.querySelectorAll("input[type=range]")) {
      const text = input.name === "scale" ? input.value : `${Math.round(100 * input.value)} %`;
      input.parentElement.querySelector("output").textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
  }
}
