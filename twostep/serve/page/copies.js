// What was drawn, as others ask for it: a command, curl, Python.

// Returns the pictures that go into a wish: what each is, the name that copies give it, its address.
export function inputsOf(wish) {
  const inputs = [
    { what: "image", name: "image.png", address: wish.image },
    { what: "mask", name: "mask.png", address: wish.mask },
    ...(wish.controls ?? []).map(({ picture }, i) => {
      return { what: `control ${i + 1}`, name: `control-${i + 1}.png`, address: picture };
    }),
  ];
  return inputs.filter((each) => each.address).map((each) => ({ ...each, name: withEnding(each) }));
}

function withEnding({ name, address }) {
  const kind = /^data:image\/(\w+)/.exec(address)?.[1] ?? "png";
  return name.replace(/png$/, kind === "jpeg" ? "jpg" : kind);
}

const nameOf = (wish, what) => inputsOf(wish).find((each) => each.what === what).name;

// For a shell: in single quotes, which nothing inside ends.
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

export function command(wish) {
  const words = ["twostep", wish.image ? "edit" : "generate", quoted(wish.prompt)];
  if (wish.image) words.push(nameOf(wish, "image"));
  words.push("--model", quoted(wish.model), "--steps", wish.steps, "--seed", wish.seed);
  if (wish.guidance) words.push("--guidance", wish.guidance);
  if (wish.negative_prompt && !wish.image) words.push("--negative", quoted(wish.negative_prompt));
  if (wish.width && !wish.image) words.push("--size", `${wish.width}x${wish.height}`);
  if (wish.frames) words.push("--frames", wish.frames);
  if (wish.image) words.push("--strength", wish.strength);
  if (wish.mask) words.push("--mask", nameOf(wish, "mask"));
  (wish.controls ?? []).forEach(({ name, scale, start, end }, i) => {
    const text = `${nameOf(wish, `control ${i + 1}`)}@${name}:${scale}:${start}-${end}`;
    words.push("--control", quoted(text));
  });
  for (const lora of wish.loras ?? []) words.push("--lora", quoted(lora));
  return words.join(" ");
}

// Queues a job, waits for its end, and fetches what was made into a file. Files are put in by the shell;
// `format` is null where the model's own will do.
export function curl(wish, origin, needsKey, { file, format }) {
  const key = needsKey ? ' -H "Authorization: Bearer $TWOSTEP_KEY"' : "";
  const files = inputsOf(wish);
  const put = (what) => `@${files.find((each) => each.what === what).name}@`;
  const body = { ...wish, previews: undefined };
  if (wish.image) body.image = put("image");
  if (wish.mask) body.mask = put("mask");
  if (wish.controls) {
    body.controls = wish.controls.map((each, i) => ({ ...each, picture: put(`control ${i + 1}`) }));
  }
  let text = JSON.stringify(body).replace(/[\\$`]/g, "\\$&");
  for (const { name } of files) text = text.replaceAll(`@${name}@`, `$(base64 < ${name} | tr -d '\\n')`);
  const jobs = `${origin}/api/v1/jobs`;
  return `job=$(curl -s ${jobs}${key} -H 'Content-Type: application/json' -d @- <<END | sed 's/.*"id":"\\([^"]*\\)".*/\\1/'
${text}
END
)
curl -s ${jobs}/$job/events${key} > /dev/null
curl -s ${quotedIf(`${jobs}/$job/images/0`, format)}${key} -o ${file}
`;
}

const quotedIf = (address, format) => (format ? `"${address}?format=${format}"` : address);

const literal = (value) => JSON.stringify(value);
// Python tells 1 from 1.0.
const real = (value) => (Number.isInteger(value) ? value.toFixed(1) : String(value));

export function python(wish, origin, needsKey) {
  const usesPictures = inputsOf(wish).length > 0;
  const open = (what) => `Picture.of(${literal(nameOf(wish, what))})`;
  const given = ["model", "steps", "seed", "guidance", "negative_prompt", "width", "height", "frames"]
    .filter((name) => wish[name] !== undefined && wish[name] !== "")
    .map((name) => `${name}=${name === "guidance" ? real(wish[name]) : literal(wish[name])}`);
  if (wish.image) given.push(`image=${open("image")}`, `strength=${real(wish.strength)}`);
  if (wish.mask) given.push(`mask=${open("mask")}`);
  if (wish.controls) {
    const controls = wish.controls.map(({ name, scale, start, end }, i) => {
      const picture = open(`control ${i + 1}`);
      const share = `start=${real(start)}, end=${real(end)}`;
      return `Control(${picture}, ${literal(name)}, scale=${real(scale)}, ${share})`;
    });
    given.push(`controls=(${controls.join(", ")},)`);
  }
  if (wish.loras) given.push(`loras=(${wish.loras.map(literal).join(", ")},)`);
  const names = [wish.controls && "Control", usesPictures && "Picture"].filter(Boolean);
  const lines = ["import twostep"];
  if (needsKey) lines.unshift("import os", "");
  if (names.length) lines.push(`from twostep.pipeline.request import ${names.join(", ")}`);
  const key = needsKey ? ', key=os.environ["TWOSTEP_KEY"]' : "";
  lines.push("", "request = twostep.Request(", `    ${literal(wish.prompt)},`);
  lines.push(...given.map((each) => `    ${each},`), ")");
  lines.push(`with twostep.Client(${literal(origin)}${key}) as client:`, '    client.draw(request).save("out")', "");
  return lines.join("\n");
}
