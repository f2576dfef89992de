// The page of `smalti serve`: asks for images, shows them while they are generated, and changes parts of them.
"use strict";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "guidance", "top_k", "top_p", "min_p", "passes"];
let model = null; // our part of /v1/models
let running = null; // the AbortController of what is generated now
let edited = null; // the image that is being changed: { blob, codes, asked }

start();

async function start() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); generate(asked()); });
  $("cancel").addEventListener("click", () => running?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // which ends a word of an input method
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("token").addEventListener("change", () => { sessionStorage.setItem("token", $("token").value); connect(); });
  $("token").value = sessionStorage.getItem("token") || "";
  prepareMask();
  $("fill").addEventListener("click", fill);
  $("clear").addEventListener("click", clearMask);
  $("complete").addEventListener("click", () => change({ keep_rows: $("keep-rows").value }));
  $("vary").addEventListener("click", () => change({ keep_levels: $("keep-levels").value }));
  $("close").addEventListener("click", () => { $("edit").hidden = true; $("prompt").focus(); });
  await connect();
}

function headers() {
  const token = $("token").value;
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function connect() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (answer.status === 401) {
      $("token-label").hidden = false;
      $("settings").open = true;
      return say("this server wants a token: enter it below Settings", true);
    }
    const found = (await answer.json()).data[0];
    model = found.smalti;
    document.documentElement.style.setProperty("--aspect", `${sides()[1]} / ${sides()[0]}`);
    const still = model.training_step === null ? "" : `, in training: after ${model.training_step} steps`;
    $("model").textContent = `${found.id}, ${sides()[1]} × ${sides()[0]} pixels${still}`;
    for (const name of NUMBERS) $(name).value = model.sampling[name] ?? "";
    $("guidance").disabled = !model.guidance_trained;
    $("passes-label").hidden = $("passes").disabled = model.order !== "any";
    $("passes").min = model.levels.length;
    $("passes").max = model.levels.reduce((sum, level) => sum + level.width * level.height, 0);
    $("rank-label").hidden = !model.reranker;
    $("rank").checked = model.reranker;
    $("keep-rows").max = model.levels.at(-1).height - 1;
    $("levels-field").hidden = model.levels.length < 2;
    $("keep-levels").max = model.levels.length - 1;
    say("");
  } catch {
    say("the server does not answer", true);
  }
}

function asked() {
  const values = { prompt: $("prompt").value, n: Number($("n").value) };
  if ($("seed").value !== "") values.seed = Number($("seed").value);
  for (const name of NUMBERS) {
    const value = $(name).value === "" ? off(name) : Number($(name).value);
    if (value !== undefined && !$(name).disabled) values[name] = value;
  }
  if ($("rank").checked) values.rank = true;
  return values;
}

// What an empty field asks for where the model's own settings have a value, which the server takes for what is left out.
function off(name) {
  if ((model?.sampling[name] ?? null) === null) return undefined;
  const codes = Math.max(...model.levels.map((level) => level.codebook_size));
  return { top_k: codes, top_p: 1, min_p: 0, passes: Number($("passes").max) }[name];
}

// Generate `values`; with `image`, starting from it: { image, mask }, blobs.
async function generate(values, image = null) {
  if (running) return;
  const mine = (running = new AbortController());
  if (values.seed === undefined) values = { ...values, seed: Math.floor(Math.random() * 2 ** 32) };
  busy(true);
  say("waiting for a place …");
  const cards = showPlaces(values);
  const partials = model ? model.levels.reduce((sum, level) => sum + level.height, 0) : 8;
  const body = { ...values, stream: true, codes: true, partial_images: Math.min(partials, 64) };
  try {
    const answer = await fetch(image ? "v1/images/edits" : "v1/images/generations", {
      method: "POST", signal: mine.signal, ...encoded(body, image),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    let done = 0;
    for await (const event of events(answer.body)) {
      if (event.type === "error") throw new Error(event.error.message);
      const card = event.type.endsWith(".partial_image") ? cards[event.candidate] : cards[done];
      card.querySelector("img").src = `data:image/png;base64,${event.b64_json}`;
      if (event.type.endsWith(".completed")) { complete(card, values, event); done += 1; }
      else say(`generating, ${event.partial_image_index + 1} of ${body.partial_images} rows`);
    }
    if (done < cards.length) throw new Error("the server ended before the images were done");
    remember(values, image);
    say(`${done} ${done === 1 ? "image" : "images"}, seed ${values.seed}`);
  } catch (error) {
    cards.forEach((card) => { if (card.classList.contains("drawing")) card.remove(); });
    say(error.name === "AbortError" ? "cancelled" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    busy(false);
  }
}

function encoded(body, image) {
  if (!image) return { headers: { ...headers(), "content-type": "application/json" }, body: JSON.stringify(body) };
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, value);
  for (const [name, blob] of Object.entries(image)) if (blob) form.append(name, blob, `${name}.png`);
  return { headers: headers(), body: form };
}

// The events of a stream, as what their data says.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) yield JSON.parse(event.slice(event.indexOf("data: ") + 6));
  }
}

function showPlaces(values) {
  $("empty")?.remove();
  const cards = Array.from({ length: values.n }, () => {
    const card = document.createElement("figure");
    card.className = "drawing";
    const img = document.createElement("img");
    img.alt = `${values.prompt}, being generated`;
    img.src = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
    const caption = document.createElement("figcaption");
    caption.textContent = values.prompt;
    card.append(img, caption);
    return card;
  });
  $("images").prepend(...cards);
  return cards;
}

function complete(card, values, event) {
  card.classList.remove("drawing");
  const img = card.querySelector("img");
  img.alt = `${values.prompt}, seed ${event.seed}, image ${event.candidate + 1}`;
  const score = event.score === undefined ? "" : `, score ${event.score.toFixed(1)}`;
  card.querySelector("figcaption").textContent = `${values.prompt} · seed ${event.seed}, ${event.candidate + 1}${score}`;
  const blob = blobOf(event.b64_json);
  const save = document.createElement("a");
  save.href = URL.createObjectURL(blob);
  save.download = `${values.prompt.slice(0, 40).replace(/[^\p{L}\p{N}]+/gu, "-")}-${event.seed}-${event.candidate}.png`;
  save.textContent = "PNG";
  const buttons = document.createElement("div");
  buttons.className = "buttons";
  buttons.append(button("Change", () => edit({ blob, codes: event.codes, asked: values })), save);
  card.append(buttons);
  if (model?.nearest) buttons.append(button("Nearest", (press) => nearest(card, blob, press.currentTarget)));
}

// The training images most like an image, below it.
async function nearest(card, blob, pressed) {
  pressed.disabled = true;
  const form = new FormData();
  form.append("image", blob, "image.png");
  try {
    const answer = await fetch("v1/images/nearest", { method: "POST", headers: headers(), body: form });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    const list = document.createElement("ol");
    list.className = "nearest";
    list.setAttribute("aria-label", "Nearest training images, nearest first");
    list.append(...found.data.map((one) => {
      const item = document.createElement("li");
      const img = document.createElement("img");
      img.src = `data:image/png;base64,${one.b64_json}`;
      img.alt = `training image: ${one.caption}`;
      const caption = document.createElement("span");
      caption.textContent = `${one.caption}, ${one.distance.toFixed(1)}`;
      item.append(img, caption);
      return item;
    }));
    card.append(list);
    pressed.remove();
    say("nearest training images, with their distances");
  } catch (error) {
    pressed.disabled = false;
    say(error.message, true);
  }
}

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

function blobOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

function remember(values, image) {
  $("history-empty").hidden = true;
  const item = document.createElement("li");
  const text = document.createElement("span");
  const settings = NUMBERS.filter((name) => values[name] !== undefined).map((name) => `${name.replace("_", "-")} ${values[name]}`);
  const how = image ? "changed; " : "";
  text.textContent = `${values.prompt} · ${how}seed ${values.seed}, ${values.n} ${values.n === 1 ? "image" : "images"}, ${settings.join(", ")}`;
  item.append(text, button("Same", () => generate(values, image)), button("Again", () => {
    const { seed, ...others } = values;
    generate(others, image);
  }));
  $("history").prepend(item);
}

function busy(is) {
  $("generate").disabled = is;
  $("cancel").hidden = !is;
  for (const id of ["fill", "complete", "vary"]) $(id).disabled = is;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// ---- a part anew

function edit(image) {
  edited = image;
  $("edit-image").src = URL.createObjectURL(image.blob);
  clearMask();
  showCodes(image.codes);
  $("edit").hidden = false;
  $("edit-title").focus();
}

function change(rule) {
  const { seed, ...values } = { ...asked(), prompt: $("prompt").value || edited.asked.prompt };
  generate({ ...values, ...rule }, { image: edited.blob });
}

// Height and width of the model's images, in pixels.
function sides() {
  return [model.image_size, model.image_size].flat().slice(0, 2);
}

function fill() {
  const cells = $("mask").getContext("2d").getImageData(0, 0, $("mask").width, $("mask").height).data;
  if (!cells.some((value, index) => index % 4 === 3 && value)) return say("paint what is to be generated first", true);
  const [height, width] = sides();
  const whole = document.createElement("canvas");
  whole.width = width;
  whole.height = height;
  const context = whole.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out"; // transparent: generate here
  context.drawImage(opaque(), 0, 0, width, height);
  const { seed, ...values } = { ...asked(), prompt: $("prompt").value || edited.asked.prompt };
  whole.toBlob((mask) => generate(values, { image: edited.blob, mask }), "image/png");
}

// The mask without its translucency, which is there for the eye.
function opaque() {
  const copy = document.createElement("canvas");
  copy.width = $("mask").width;
  copy.height = $("mask").height;
  const context = copy.getContext("2d");
  for (let times = 0; times < 8; times += 1) context.drawImage($("mask"), 0, 0);
  return copy;
}

function prepareMask() {
  const canvas = $("mask");
  let cursor = [0, 0];
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height].map(Math.floor);
  };
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("focus", () => place(cursor));
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); paint(at(event)); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) paint(at(event)); });
  canvas.addEventListener("keydown", (event) => {
    if (moves[event.key]) {
      cursor = cursor.map((place, axis) => Math.max(0, Math.min(canvas.width - 1, place + moves[event.key][axis])));
      place(cursor);
      say(`column ${cursor[0] + 1}, row ${cursor[1] + 1}`);
    } else if (event.key === " ") paint(cursor);
    else return;
    event.preventDefault();
  });
}

// Show where the arrow keys are.
function place([column, row]) {
  const { width, height } = $("mask");
  Object.assign($("cursor").style, {
    left: `${(100 * column) / width}%`, top: `${(100 * row) / height}%`, width: `${100 / width}%`, height: `${100 / height}%`,
  });
}

// A cell of the canvas is a code of the finest level.
function paint([column, row]) {
  const context = $("mask").getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
  context.clearRect(column, row, 1, 1);
  context.fillRect(column, row, 1, 1);
}

function clearMask() {
  const { width, height } = model.levels.at(-1);
  [$("mask").width, $("mask").height] = [width, height];
}

function showCodes(levels) {
  $("codes").replaceChildren(...levels.map((codes, number) => {
    const { width, height, codebook_size } = model.levels[number];
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    codes.forEach((code, index) => {
      const hue = (code * 137.508) % 360; // the golden angle: codes beside each other look different
      context.fillStyle = `hsl(${hue} 60% ${35 + (40 * code) / codebook_size}%)`;
      context.fillRect(index % width, Math.floor(index / width), 1, 1);
    });
    const grid = document.createElement("div");
    const caption = document.createElement("div");
    caption.className = "soft";
    caption.textContent = `level ${number + 1}: ${width} × ${height} codes of ${codebook_size}`;
    grid.append(canvas, caption);
    return grid;
  }));
}
