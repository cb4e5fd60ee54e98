// What WAVs and WebPs say of how they were made, as twostep wrote it. Both are RIFF files: a row of chunks,
// each with a name and a size, filled up to an even one.

const DESCRIPTION = 0x010e;
const ASCII = 2;

// Returns the texts of a file by their names; none of files that are no such ones, or have none.
export function textsInRiff(bytes) {
  try {
    for (const { kind, data } of chunks(bytes, 12)) {
      if (kind === "LIST" && word(data, 0) === "INFO") return commentOf(data);
      if (kind === "EXIF") return JSON.parse(description(data));
    }
  } catch {
    // Somebody else's comment, or a damaged one.
  }
  return {};
}

const word = (bytes, at) => String.fromCharCode(...bytes.subarray(at, at + 4));
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function* chunks(bytes, start) {
  if (start === 12 && word(bytes, 0) !== "RIFF") return;
  const view = viewOf(bytes);
  for (let at = start; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    yield { kind: word(bytes, at), data: bytes.subarray(at + 8, at + 8 + size) };
    at += 8 + size + (size % 2);
  }
}

function commentOf(info) {
  for (const { kind, data } of chunks(info, 4)) {
    if (kind === "ICMT") return JSON.parse(new TextDecoder().decode(data).replace(/\0+$/, ""));
  }
  return {};
}

// Returns the image description of EXIF data, which are a TIFF with its directory first.
function description(exif) {
  const start = word(exif, 0) === "Exif" ? 6 : 0;
  const tiff = exif.subarray(start);
  const view = viewOf(tiff);
  const isLittle = word(tiff, 0).startsWith("II");
  const first = view.getUint32(4, isLittle);
  const count = view.getUint16(first, isLittle);
  for (let i = 0; i < count; i++) {
    const entry = first + 2 + 12 * i;
    if (view.getUint16(entry, isLittle) !== DESCRIPTION || view.getUint16(entry + 2, isLittle) !== ASCII) continue;
    const length = view.getUint32(entry + 4, isLittle);
    const at = length > 4 ? view.getUint32(entry + 8, isLittle) : entry + 8;
    return new TextDecoder().decode(tiff.subarray(at, at + length)).replace(/\0+$/, "");
  }
  return "{}";
}
