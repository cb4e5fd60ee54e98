// What files say of how they were made: read as twostep wrote it, in PNGs with the pictures that went in
// added.

import { textsInRiff } from "./riff.js";

const TWOSTEP = "twostep";
const INPUTS = "twostep-inputs";
const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];

// Returns the request that draws a picture again, with the name of its checkpoint, and `inputs`, the
// pictures that went in where the file has them; null for files that do not say.
export async function provenance(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const texts = textsInRiff(bytes);
  for (const { kind, data } of chunks(bytes)) {
    const text = kind === "tEXt" ? plain(data) : kind === "iTXt" ? international(data) : null;
    if (text) texts[text.name] = text.value;
  }
  try {
    const { request, contract } = JSON.parse(texts[TWOSTEP]);
    return { ...request, checkpoint: contract.name, inputs: JSON.parse(texts[INPUTS] ?? "{}") };
  } catch {
    return null;
  }
}

// Returns a PNG with pictures in it that went in: {image, mask, controls}, addresses of data.
export async function withInputs(blob, inputs) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const end = bytes.length - 12; // where IEND begins
  const text = new TextEncoder().encode(`${INPUTS}\0\0\0\0\0${JSON.stringify(inputs)}`);
  return new Blob([bytes.subarray(0, end), chunk("iTXt", text), bytes.subarray(end)], { type: "image/png" });
}

function* chunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  if (SIGNATURE.some((value, i) => bytes[i] !== value)) return;
  for (let at = SIGNATURE.length; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    yield { kind, data: bytes.subarray(at + 8, at + 8 + length) };
    at += 12 + length;
  }
}

function chunk(kind, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, checksum(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

// CRC-32, as PNG has it.
function checksum(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let i = 0; i < 8; i++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}

function plain(data) {
  const end = data.indexOf(0);
  const read = (bytes) => new TextDecoder("latin1").decode(bytes);
  return { name: read(data.subarray(0, end)), value: read(data.subarray(end + 1)) };
}

function international(data) {
  const end = data.indexOf(0);
  if (data[end + 1] !== 0) return null; // compressed, which twostep does not do
  const language = data.indexOf(0, end + 3);
  const translated = data.indexOf(0, language + 1);
  const read = (bytes) => new TextDecoder().decode(bytes);
  return { name: read(data.subarray(0, end)), value: read(data.subarray(translated + 1)) };
}
