"use strict";

const element = (id) => document.getElementById(id);
const data = JSON.parse(element("data").textContent);
const stage = element("stage");
const slider = element("slider");
const codecs = [
  ...new Set(data.pictures.flatMap((p) => p.entries.bytes.map((entry) => entry.codec))),
];

// zoom: screen pixels a sample, or null to fit; x, y: what is at the stage's centre, as a fraction
// of the picture; split: where the slider is, as a fraction of the stage.
const state = {
  picture: 0, codec: codecs[0], mode: "bytes", left: "Original", errors: false,
  zoom: null, x: 0.5, y: 0.5, split: 0.5,
};
let preloaded = []; // a reference keeps them from being dropped

const picture = () => data.pictures[state.picture];

function entryOf(codec) {
  const entries = picture().entries[state.mode];
  return entries.find((entry) => entry.codec === codec) ?? entries[0];
}

// What is chosen: texts, numbers and pictures.

function change(values) {
  Object.assign(state, values);
  show();
}

function turn(step) {
  const count = data.pictures.length;
  change({ picture: (state.picture + step + count) % count });
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

function show() {
  const entry = entryOf(state.codec);
  const left = state.left === "Original" ? null : entryOf(state.left);
  const file = (of) => (of === null ? picture().original : state.errors ? of.error : of.picture);
  const label = (of) => {
    if (of === null) return "Original";
    return state.errors ? `${of.codec}: errors × ${data.gain}` : `${of.codec} ${of.bpp} bpp`;
  };
  element("left").src = file(left);
  element("right").src = file(entry);
  element("left").alt = element("left-label").textContent = label(left);
  element("right").alt = element("right-label").textContent = label(entry);

  element("picture").selectedIndex = state.picture;
  for (const button of document.querySelectorAll("[data-mode]")) {
    press(button, button.dataset.mode === state.mode);
  }
  for (const button of document.querySelectorAll("[data-left]")) {
    press(button, button.dataset.left === state.left);
  }
  press(element("errors"), state.errors);
  for (const row of element("codecs").rows) fill(row, entry.codec);
  element("note").textContent = `${entry.codec}: ${entry.note}.`;
  element("file").href = entry.file;
  element("mode-note").textContent = data.notes[state.mode];

  const next = data.pictures[(state.picture + 1) % data.pictures.length];
  const files = picture().entries[state.mode].map((other) => other.picture);
  preloaded = [...files, next.original].map((path) => Object.assign(new Image(), { src: path }));
  place();
}

function fill(row, chosen) {
  const { codec } = row.dataset;
  const [first, ...cells] = row.cells;
  const entry = entryOf(codec);
  const values = entry.codec === codec ? [entry.bytes, entry.bpp, entry.psnr, entry.ms_ssim] : [];
  first.firstChild.disabled = values.length === 0;
  press(first.firstChild, codec === chosen);
  row.classList.toggle("chosen", codec === chosen);
  cells.forEach((cell, i) => (cell.textContent = values[i] ?? "–"));
}

function build() {
  document.title = `${data.title}: pictures compared`;
  element("about").textContent = `Ours: ${data.title}. ${data.about}`;
  element("picture").append(
    ...data.pictures.map((p, i) => new Option(`${i + 1}/${data.pictures.length} ${p.name}`)),
  );
  codecs.forEach((codec, i) => {
    const row = element("codecs").insertRow();
    row.dataset.codec = codec;
    const button = document.createElement("button");
    button.textContent = codec;
    button.title = `key ${i + 1}`;
    button.onclick = () => change({ codec });
    row.insertCell().append(button);
    for (let cell = 0; cell < 4; cell++) row.insertCell();
  });
}

// Where the pictures lie. Both are laid out by the same numbers, so that they move together.

function fitZoom(box) {
  const fit = devicePixelRatio * Math.min(box.width / picture().width, box.height / picture().height);
  // Coarse screens enlarge by whole factors only; on fine ones a smooth enlargement is not seen.
  return fit > 1 && devicePixelRatio < 2 ? Math.floor(fit) : fit;
}

function levels(fit) {
  return [fit, ...[0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32].filter((z) => z > 1.01 * fit)];
}

function layout() {
  const box = stage.getBoundingClientRect();
  const fit = fitZoom(box);
  const zoom = state.zoom === null ? fit : Math.max(state.zoom, fit);
  const scale = zoom / devicePixelRatio;
  const [width, height] = [scale * picture().width, scale * picture().height];
  return { box, fit, zoom, scale, width, height };
}

// The offset of a picture in the stage: it is centred where it fits and covers the stage elsewhere.
function offset(stageSize, size, centre) {
  if (size <= stageSize) return (stageSize - size) / 2;
  return Math.min(0, Math.max(stageSize - size, stageSize / 2 - centre * size));
}

function place() {
  const { box, fit, zoom, scale, width, height } = layout();
  const x = offset(box.width, width, state.x);
  const y = offset(box.height, height, state.y);
  state.x = (box.width / 2 - x) / width;
  state.y = (box.height / 2 - y) / height;
  const whole = (start, distance) =>
    Math.round((start + distance) * devicePixelRatio) / devicePixelRatio - start;
  for (const image of [element("left"), element("right")]) {
    // Not by its size in the layout, which browsers round to fractions of a pixel.
    image.style.transform =
      `translate(${whole(box.left, x)}px, ${whole(box.top, y)}px) scale(${scale})`;
    image.style.imageRendering = Number.isInteger(zoom) ? "pixelated" : "auto";
  }
  const percent = 100 * state.split;
  element("over").style.clipPath = `inset(0 0 0 ${percent}%)`;
  slider.style.left = `${percent}%`;
  slider.setAttribute("aria-valuenow", Math.round(percent));
  element("zoom").textContent =
    `${Math.round(100 * zoom)} %${Number.isInteger(zoom) ? "" : ", smoothed"}`;
  element("out").disabled = zoom <= fit;
}

// Zooms so that the point of the picture at (x, y) of the stage stays there.
function zoomTo(zoom, x, y) {
  const before = layout();
  const [u, v] = [
    (x - before.box.width / 2) / before.width + state.x,
    (y - before.box.height / 2) / before.height + state.y,
  ];
  state.zoom = zoom <= before.fit ? null : zoom;
  const after = layout();
  state.x = u - (x - after.box.width / 2) / after.width;
  state.y = v - (y - after.box.height / 2) / after.height;
  place();
}

function zoomBy(step, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const { zoom, fit } = layout();
  const all = levels(fit);
  const level =
    step > 0 ? all.find((z) => z > 1.01 * zoom) : all.findLast((z) => z < 0.99 * zoom);
  if (level !== undefined) zoomTo(level, x, y);
}

function pan(dx, dy) {
  const { width, height } = layout();
  state.x -= dx / width;
  state.y -= dy / height;
  place();
}

function split(value) {
  state.split = Math.min(1, Math.max(0, value));
  place();
}

// Mouse, fingers and keys.

const inStage = (event) => {
  const box = stage.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
};

slider.onpointerdown = (event) => {
  event.stopPropagation();
  slider.setPointerCapture(event.pointerId);
};
slider.onpointermove = (event) => {
  if (slider.hasPointerCapture(event.pointerId)) split(inStage(event).x / stage.clientWidth);
};
slider.onkeydown = (event) => {
  const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
  if (step === undefined) return;
  event.stopPropagation();
  event.preventDefault();
  split(state.split + step);
};

const pointers = new Map(); // those that are down on the picture, where they were last
let pinch = null; // distance of two fingers and zoom when the second came

const distance = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y);
const middle = (points) => ({
  x: points.reduce((sum, point) => sum + point.x, 0) / points.length,
  y: points.reduce((sum, point) => sum + point.y, 0) / points.length,
});

stage.onpointerdown = (event) => {
  if (event.button !== 0 || pointers.size === 2) return;
  stage.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, inStage(event));
  if (pointers.size === 2) {
    pinch = { distance: distance([...pointers.values()]), zoom: layout().zoom };
  }
};
stage.onpointermove = (event) => {
  if (!pointers.has(event.pointerId)) return;
  const before = middle([...pointers.values()]);
  pointers.set(event.pointerId, inStage(event));
  const points = [...pointers.values()];
  const now = middle(points);
  pan(now.x - before.x, now.y - before.y);
  if (points.length === 2) {
    const zoom = (pinch.zoom * distance(points)) / pinch.distance;
    zoomTo(zoom < 1 ? zoom : Math.min(32, Math.round(zoom)), now.x, now.y);
  }
};
stage.onpointerup = stage.onpointercancel = (event) => pointers.delete(event.pointerId);

stage.ondblclick = (event) => {
  const { x, y } = inStage(event);
  if (state.zoom === null) zoomBy(1, x, y);
  else zoomTo(0, x, y);
};

let turned = 0; // of the wheel, since the last step: a touchpad sends many small turns
stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    turned += event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 40);
    if (Math.abs(turned) < 40) return;
    const { x, y } = inStage(event);
    zoomBy(-Math.sign(turned), x, y);
    turned = 0;
  },
  { passive: false },
);

const keys = {
  ArrowLeft: () => turn(-1),
  ArrowRight: () => turn(1),
  m: () => change({ mode: state.mode === "bytes" ? "psnr" : "bytes" }),
  o: () => change({ left: state.left === "Original" ? codecs[0] : "Original" }),
  e: () => change({ errors: !state.errors }),
  f: () => split(state.split < 0.5 ? 1 : 0),
  "+": () => zoomBy(1),
  "=": () => zoomBy(1),
  "-": () => zoomBy(-1),
  0: () => zoomTo(0, 0, 0),
  "?": () => (element("help").open = !element("help").open),
};

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
  const codec = codecs[Number(event.key) - 1];
  const action = codec ? () => change({ codec }) : keys[event.key];
  if (action === undefined) return;
  event.preventDefault();
  action();
};

element("previous").onclick = () => turn(-1);
element("next").onclick = () => turn(1);
element("picture").onchange = (event) => change({ picture: event.target.selectedIndex });
element("errors").onclick = keys.e;
element("in").onclick = keys["+"];
element("out").onclick = keys["-"];
element("fit").onclick = keys[0];
for (const button of document.querySelectorAll("[data-mode], [data-left]")) {
  button.onclick = () => change({ ...button.dataset });
}

build();
show();
new ResizeObserver(place).observe(stage);
window.onresize = place; // the ratio of pixels changes without the stage's size
