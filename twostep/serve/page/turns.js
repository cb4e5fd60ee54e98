// When to draw: a picture follows the last change at once, and little is drawn for nothing.

const QUICK = 150; // ms within which a run may end before the next begins
const SLOW = 500; // ms above which nobody waits for an older picture first
const PAUSE = 135; // ms without a change after which a run begins that takes longer
const LONGEST_PAUSE = 600;
const PATIENCE = 2; // runs that may be given up in a row
const FORGOTTEN = 1000; // ms between two changes that do not belong together

// Runs `draw()` for what is wished last. A quick run is let end, and shown, before the next begins. A
// slower one is given up at the next change, and the next begins after a pause. Where that was guessed
// wrong twice, changes come more slowly than pauses are long: then it lets runs end too, or, where they
// take too long for that, waits longer.
export class Turns {
  #draw;
  #stop;
  #onRest;
  #timer = null; // of a run that waits
  #isRunning = false;
  #isStale = false;
  #isGivenUp = false;
  #numGivenUp = 0;
  #changedAt = -Infinity;
  #gap = 0; // ms between two changes, lately
  #startedAt = 0;
  milliseconds = null; // what a run takes; null while that is not known

  // `draw` promises to end when it is drawn or given up; `stop` gives it up. `onRest` is called when
  // nothing is left to draw.
  constructor(draw, stop, onRest = () => {}) {
    this.#draw = draw;
    this.#stop = stop;
    this.#onRest = onRest;
  }

  // Something is wished otherwise. `now`: it is not one of many changes in a row. `patient`: more is to
  // come, and what is under way may end.
  change({ now = false, patient = false } = {}) {
    clearTimeout(this.#timer);
    this.#noteGap();
    const isQuick = this.milliseconds !== null && this.milliseconds <= (this.#isWrong && !now ? SLOW : QUICK);
    // Of a first run it is not known: it gets the time that a quick one has.
    const left = this.#startedAt + QUICK - performance.now();
    const mayBeQuick = this.milliseconds === null && left > 0;
    if (this.#isRunning && !this.#isGivenUp && (patient || isQuick || mayBeQuick)) {
      this.#isStale = true;
      if (!patient && !isQuick) this.#timer = setTimeout(() => this.change({ now: true }), left);
      return;
    }
    this.#giveUp();
    const pause = this.#isWrong ? Math.min(LONGEST_PAUSE, Math.max(PAUSE, 2 * this.#gap)) : PAUSE;
    this.#timer = setTimeout(() => this.#begin(), now || patient || isQuick ? 0 : pause);
  }

  // Gives up what is under way and what waits.
  halt() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#isStale = false;
    this.#stop();
    if (!this.#isRunning) this.#onRest();
  }

  // Whether pauses were taken for the end that were none.
  get #isWrong() {
    return this.#numGivenUp >= PATIENCE;
  }

  #giveUp() {
    this.#isStale = false;
    if (!this.#isRunning || this.#isGivenUp) return;
    this.#isGivenUp = true;
    this.#numGivenUp += 1;
    this.milliseconds ??= Infinity; // slow, however much
    this.#stop();
  }

  #noteGap() {
    const time = performance.now();
    const gap = time - this.#changedAt;
    this.#changedAt = time;
    if (gap < FORGOTTEN) this.#gap = this.#gap ? (this.#gap + gap) / 2 : gap;
    else this.#numGivenUp = 0;
  }

  async #begin() {
    this.#timer = null;
    if (this.#isRunning) {
      this.#isStale = true; // it was given up, and ends in a moment
      return;
    }
    this.#isRunning = true;
    this.#isStale = this.#isGivenUp = false;
    this.#startedAt = performance.now();
    try {
      await this.#draw();
    } finally {
      this.#isRunning = false;
    }
    if (this.#isStale) this.#begin();
    else if (this.#timer === null) this.#onRest();
  }
}
