// Shows what was made in a figure: a picture, a clip that loops and can be halted, or a sound to play.

const STILL = matchMedia("(prefers-reduced-motion: reduce)");

// Whether the frames of a file move, by what was asked for and the type of the file.
const isFilm = (entry) => entry.type.startsWith("video/");
const isMoving = (entry) => entry.media === "video" && !isFilm(entry);

// A figure with an img, a video, an audio and a button that halts what moves.
export class Player {
  #image;
  #video;
  #audio;
  #button;
  #entry = null;
  #isHalted = false;

  constructor(figure) {
    this.#image = figure.querySelector("img");
    this.#video = figure.querySelector("video");
    this.#audio = figure.querySelector("audio");
    this.#button = figure.querySelector("[data-do=halt]");
    this.#button.addEventListener("click", () => this.#halt(!this.#isHalted));
  }

  // Shows a preview of something that is still made: of a clip frames beside each other, of a sound its
  // spectrogram.
  foresee(address, media) {
    this.clear();
    this.#image.src = address;
    this.#image.classList.add("coarse", media);
    this.#image.hidden = false;
    // What it will be played with keeps its place.
    this.#audio.hidden = media !== "audio";
    this.#button.hidden = media !== "video";
    this.#button.disabled = true;
  }

  // Shows {media, type, address, poster, alt, ratio}; `poster` is the address of a picture, or null.
  show(entry) {
    this.clear();
    this.#entry = entry;
    this.#image.alt = entry.alt;
    this.#image.parentElement.style.aspectRatio = entry.ratio;
    if (isFilm(entry)) {
      this.#video.poster = entry.poster ?? "";
      this.#video.src = entry.address;
      this.#video.setAttribute("aria-label", entry.alt);
      this.#video.hidden = false;
    } else {
      this.#image.src = entry.poster ?? entry.address;
      this.#image.classList.toggle("audio", entry.media === "audio");
      this.#image.hidden = false;
    }
    if (entry.media === "audio") {
      this.#audio.src = entry.address;
      this.#audio.setAttribute("aria-label", entry.alt);
      this.#audio.hidden = false;
    }
    this.#button.hidden = entry.media !== "video";
    this.#button.disabled = false;
    if (entry.media === "video") this.#halt(STILL.matches);
  }

  // Shows nothing, and is silent.
  clear() {
    this.#image.removeAttribute("class");
    this.#image.hidden = true;
    this.#button.hidden = true;
    this.#entry = null;
    for (const each of [this.#video, this.#audio]) {
      each.hidden = true;
      if (!each.hasAttribute("src")) continue;
      each.pause();
      each.removeAttribute("src");
      each.load();
    }
  }

  // Halts a clip, or lets it go on. A picture that moves begins anew.
  #halt(isHalted) {
    this.#isHalted = isHalted;
    this.#button.textContent = isHalted ? "Play" : "Pause";
    if (isMoving(this.#entry)) this.#image.src = isHalted ? this.#entry.poster : this.#entry.address;
    else if (isHalted) this.#video.pause();
    else this.#video.play().catch(() => {}); // it was exchanged meanwhile
  }
}
