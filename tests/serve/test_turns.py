"""When the page draws, with time as a number: at all speeds of typing, however long runs take."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from twostep.serve import page_routes

PAGE = Path(page_routes.__file__).parent / "page"

_TYPED = """
let time = 0;
let waiting = [];
globalThis.setTimeout = (act, after) => {
  const timer = { at: time + Math.max(0, after), act };
  waiting.push(timer);
  return timer;
};
globalThis.clearTimeout = (timer) => (waiting = waiting.filter((each) => each !== timer));
Object.defineProperty(globalThis, "performance", { value: { now: () => time } });

async function pass(until) {
  for (;;) {
    // What was promised is kept before time goes on.
    for (let i = 0; i < 20; i++) await null;
    const next = waiting.filter((each) => each.at <= until).sort((a, b) => a.at - b.at)[0];
    if (!next) break;
    clearTimeout(next);
    time = next.at;
    next.act();
  }
  time = until;
}

// Types 40 keys; `takes` is what a run takes, `gap` the time between keys, all in milliseconds.
async function type({ takes, gap, isKnown }) {
  const said = { begun: 0, shown: 0, latency: null };
  let text = 0;
  let stop = null;
  const draw = async () => {
    const mine = text;
    said.begun += 1;
    const isDone = await new Promise((resolve) => {
      setTimeout(() => resolve(true), takes);
      stop = () => resolve(false);
    });
    if (!isDone) return;
    said.shown += 1;
    turns.milliseconds = takes;
    if (mine === 39) said.latency = time - last;
  };
  const turns = new Turns(draw, () => stop?.());
  if (isKnown) turns.milliseconds = takes;
  let last = 0;
  for (text = 0; text < 40; text++) {
    last = time;
    turns.change();
    if (text < 39) await pass(time + gap);
  }
  text = 39;
  await pass(time + 10000);
  return said;
}
const answers = [];
for (const each of cases) answers.push(await type(each));
console.log(JSON.stringify(answers));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here")
def test_little_is_drawn_for_nothing_and_the_last_key_is_drawn_soon() -> None:
    cases = [
        {"takes": takes, "gap": gap, "isKnown": is_known}
        for takes in (20, 60, 140, 160, 300, 480, 900, 5000)
        for gap in (20, 60, 100, 130, 140, 200, 350)
        for is_known in (False, True)
    ]
    source = (PAGE / "turns.js").read_text().replace("export class", "class")
    script = f"const cases = {json.dumps(cases)};\n{source}\n{_TYPED}"
    done = subprocess.run(
        ["node", "--input-type=module"], input=script, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    for case, said in zip(cases, json.loads(done.stdout), strict=True):
        wasted = said["begun"] - said["shown"]
        assert wasted <= 2, (case, said)
        # Where runs are quick, or keys follow so quickly that a pause is an end, as soon as may be.
        allowed = 150 + case["takes"]
        if case["takes"] > 150 and case["gap"] > 130:
            # An older picture may be let end first; or, where that takes long, it waits longer.
            allowed = 2 * case["takes"] if case["takes"] <= 500 else 600 + case["takes"]
            allowed = max(allowed, 600 + case["takes"]) if not case["isKnown"] else allowed
        assert said["latency"] is not None, (case, said)
        assert said["latency"] <= allowed, (case, said, allowed)
