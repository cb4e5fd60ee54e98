// Reads what twostep wrote into a PNG of how it was made.

// Returns the request that draws the picture again, with the name of its checkpoint; null for others.
export async function provenance(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 8 || view.getUint32(0) !== 0x89504e47) return null;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    const text = kind === "tEXt" ? plain(data) : kind === "iTXt" ? international(data) : null;
    if (text?.name === "twostep") {
      try {
        const { request, contract } = JSON.parse(text.value);
        return { ...request, checkpoint: contract.name };
      } catch {
        return null;
      }
    }
    at += 12 + length;
  }
  return null;
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
