// Asks a server with OpenAI's client for JavaScript, and prints what it got as JSON.

import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [address, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const prompt = "a 3d red apple on a blue background";
const found = {};

const png = (path) => toFile(readFileSync(path), "a.png", { type: "image/png" });
const isPng = (text) => Buffer.from(text, "base64").subarray(1, 4).toString() === "PNG";

const drawn = await client.images.generate({ prompt, n: 3, size: "auto", steps: 1, seed: 7 });
found.generate = {
  seeds: drawn.data.map((item) => item.seed),
  arePngs: drawn.data.every((item) => isPng(item.b64_json)),
  first: drawn.data[0].b64_json,
  outputTokens: drawn.usage.output_tokens,
  checkpoint: drawn.twostep.checkpoint,
};

const { data, response } = await client.images
  .generate({ prompt, model: "gpt-image-2.6", quality: "xhigh", size: "1024x1024", seed: 7 })
  .withResponse();
found.aliased = { size: data.size, changes: response.headers.get("x-twostep-changes") };

found.stream = [];
const stream = await client.images.generate({
  prompt, stream: true, partial_images: 2, n: 3, steps: 4, seed: 7,
});
for await (const event of stream) {
  found.stream.push([event.type, event.partial_image_index ?? null, isPng(event.b64_json)]);
  found.usage = event.usage ?? null;
}

found.edits = [];
for (const image of [await png(picture), [await png(picture), await png(picture)]]) {
  const edited = await client.images.edit({ prompt, image, mask: await png(mask), n: 2, steps: 1 });
  found.edits.push(edited.data.map((item) => isPng(item.b64_json)));
}
found.editStream = [];
const editing = await client.images.edit({
  prompt, image: await png(picture), stream: true, partial_images: 1, steps: 4,
});
for await (const event of editing) found.editStream.push(event.type);

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

found.errors = [];
for (const wish of [{ prompt: " " }, { prompt, n: 11 }, { prompt, output_format: "svg" }]) {
  try {
    await client.images.generate(wish);
  } catch (error) {
    found.errors.push([error.constructor.name, error.status, error.type, typeof error.message]);
  }
}

console.log(JSON.stringify(found));
