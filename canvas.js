// The viewer of canvas.py: volumes in, pictures out. Drawn here and not in Python, so that a tick of the wheel
// costs milliseconds and never reruns the script. Layout of the data: see canvas.pack.

const AXES = ["axial", "coronal", "sagittal"];
const HU_VALUES = 65536; // every int16 has an entry in the tables of grey and colour
const WHEEL_STEP = 50; // a notch of a mouse is 100 or 120; a touchpad sends many small ones
const SCALE_BAR_MM = 50;
const DIFFERENCE_RANGES_HU = [5, 10, 20, 50, 100];
const DIFFERENCE_STOPS = [[110, 180, 255], [32, 96, 178], [12, 12, 14], [176, 54, 44], [255, 128, 104]];
const TRUE_COLOUR = "#3ddc84", FOUND_COLOUR = "#ff5c5c", FOUND_RGB = 0x5c5cff; // the last as ABGR
const KEYS = [
  ["wheel, Up / Down", "slice by slice"], ["PgUp / PgDn", "5 slices"], ["Home / End", "first, last slice"],
  ["1 to 6", "window presets"], ["0", "window of this slice"], ["right drag", "window: width across, level along"],
  ["Ctrl + wheel, + / -", "zoom"], ["Shift + drag", "move"], ["drag", "region: mean and SD in HU; Esc clears"],
  ["space", "reset zoom, place and window"], ["i", "invert"], ["c", "play"], ["t", "blink: next layer"],
  ["l", "profile of the row under the pointer"], ["g", "lesions on / off"], ["h", "heat on / off"], ["[ / ]", "opacity"], ["v", "axial, coronal, sagittal"],
  ["f", "full screen"], ["p", "save as PNG"], ["?", "these keys"],
];
const ICONS = {
  invert: "M8 1.5a6.5 6.5 0 1 0 0 13zM8 1.5a6.5 6.5 0 0 1 0 13",
  play: "M4.5 2.5v11l9-5.5z",
  profile: "M1.5 11.5 4 7l2.5 3L9.5 3l2.5 7 2.5-4",
  blink: "M2 5h9M8.5 2 11.5 5 8.5 8M14 11H5M7.5 8 4.5 11l3 3",
  reset: "M3 8a5 5 0 1 0 1.6-3.7M3 2v3.5h3.5",
  save: "M8 2v8M4.5 7 8 10.5 11.5 7M2.5 13.5h11",
  full: "M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10",
  help: "M5.5 6a2.5 2.5 0 1 1 3.6 2.2c-.8.4-1.1.8-1.1 1.8M8 12.6v.4",
};

const viewers = new WeakMap();

export default function (component) {
  const place = component.parentElement;
  const root = place.querySelector(".viewer");
  let viewer = viewers.get(root);
  if (!viewer) viewers.set(root, (viewer = new Viewer(root)));
  viewer.show(component.data);
  // called before every update too: only what has left the page is taken down
  return () => setTimeout(() => root.isConnected || viewer.stop());
}

// ---------------------------------------------------------------- data

function unpack(bytes) {
  if (bytes instanceof ArrayBuffer) bytes = new Uint8Array(bytes);
  const length = new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const scan = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const count = scan.shape.reduce((a, b) => a * b);
  const view = (Kind, offset) => {
    offset += 4 + length;
    const start = bytes.byteOffset + offset;
    if (start % Kind.BYTES_PER_ELEMENT === 0) return new Kind(bytes.buffer, start, count);
    return new Kind(bytes.slice(offset, offset + count * Kind.BYTES_PER_ELEMENT).buffer);
  };
  for (const layer of scan.layers) if (layer.offset !== undefined) layer.hu = view(Int16Array, layer.offset);
  for (const name of ["truth", "found", "heat"])
    if (scan[name]) scan[name].values = view(Uint8Array, scan[name].offset);
  return scan;
}

// The letter of the side of the patient to which a direction in LPS mm leads
function letter(direction) {
  const axis = [0, 1, 2].reduce((a, b) => (Math.abs(direction[b]) > Math.abs(direction[a]) ? b : a));
  return ["RL", "AP", "IS"][axis][direction[axis] > 0 ? 1 : 0];
}

function greyTable(width, level, invert) {
  const table = new Uint32Array(HU_VALUES), low = level - width / 2;
  for (let i = 0; i < HU_VALUES; i++) {
    let grey = ((i - 32768 - low) / width) * 255;
    grey = grey < 0 ? 0 : grey > 255 ? 255 : Math.round(grey);
    if (invert) grey = 255 - grey;
    table[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  return table;
}

function differenceTable(range) {
  const table = new Uint32Array(HU_VALUES);
  for (let i = 0; i < HU_VALUES; i++) {
    const at = (Math.max(-1, Math.min(1, (i - 32768) / range)) + 1) * 2;
    const low = Math.min(3, Math.floor(at)), share = at - low;
    const [r, g, b] = [0, 1, 2].map((c) =>
      Math.round(DIFFERENCE_STOPS[low][c] * (1 - share) + DIFFERENCE_STOPS[low + 1][c] * share));
    table[i] = (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
  }
  return table;
}

// ---------------------------------------------------------------- elements

function element(tag, properties = {}, children = []) {
  const { data = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

class Viewer {
  constructor(root) {
    this.root = root;
    this.state = { axis: "axial", panes: 1, layers: [], invert: false, lesions: true, heat: true, opacity: 0.5 };
    this.grey = null;
    this.wheel = 0;
    this.surface = document.createElement("canvas"); // one slice at its own matrix
    this.colour = document.createElement("canvas"); // what is laid over it
    this.build();
    this.listen();
  }

  // ---------------------------------------------------------------- a scan arrives

  show(bytes) {
    if (bytes === this.bytes) return this.draw();
    const began = performance.now();
    this.bytes = bytes;
    const scan = unpack(bytes), state = this.state, before = this.scan;
    this.scan = scan;
    const [slices, rows, columns] = scan.shape;
    this.counts = { axial: slices, coronal: rows, sagittal: columns };
    const other = !before || before.key !== scan.key || before.shape.join() !== scan.shape.join();
    if (other) {
      state.index = { axial: scan.start, coronal: rows >> 1, sagittal: columns >> 1 };
      state.axis = "axial";
      this.look();
      this.region = null;
      if (!before || before.presets.join() !== scan.presets.join()) this.preset(1);
    } else if (scan.go !== null && String(before.go) !== String(scan.go)) {
      state.index.axial = scan.go[0];
      state.axis = "axial";
    }
    const names = scan.layers.map((layer) => layer.name);
    if (!before || before.layers.map((layer) => layer.name).join() !== names.join()) {
      state.layers = [0, 1, 2, 3].map((place) => scan.panes[place] ?? Math.min(place, names.length - 1));
      state.panes = scan.panes.length || 1;
    }
    if (!before || before.range_hu !== scan.range_hu) this.range(scan.range_hu);
    this.outlines = new Map();
    this.refresh();
    this.draw(() => {
      this.root.dataset.loadMs = (performance.now() - began).toFixed(1);
      this.root.dataset.ready = scan.key;
    });
  }

  stop() {
    clearInterval(this.cine);
    this.watch.disconnect();
    this.life.abort();
  }

  // ---------------------------------------------------------------- the page's elements

  build() {
    const group = (label, ...buttons) => {
      const made = element("div", { className: "group", role: "group" }, buttons);
      made.setAttribute("aria-label", label);
      return made;
    };
    const button = (text, title, action, data = {}) => {
      const made = element("button", { type: "button", title, data, onclick: () => (action(), this.focus()) });
      made.append(text);
      made.setAttribute("aria-label", title);
      return made;
    };
    this.axisButtons = AXES.map((axis) =>
      button({ axial: "Ax", coronal: "Cor", sagittal: "Sag" }[axis], `${axis} (v)`, () => this.turn(axis), { axis }));
    this.paneButtons = [1, 2, 3, 4].map((count) =>
      button(String(count), count === 1 ? "one view" : `${count} views side by side`, () => this.split(count)));
    this.presetGroup = group("window");
    this.windowText = element("span", { className: "reading" });
    this.overlayButtons = {
      truth: button("Truth", "true lesions (g)", () => this.toggle("truth"), { overlay: "truth" }),
      found: button("Found", "lesions found (g)", () => this.toggle("found"), { overlay: "found" }),
      heat: button("Heat", "Grad-CAM (h)", () => this.toggle("heat"), { overlay: "heat" }),
    };
    this.opacity = element("input", { type: "range", min: 0, max: 1, step: 0.05, title: "opacity ([ and ])" });
    this.opacity.setAttribute("aria-label", "opacity of overlays");
    this.opacity.oninput = () => ((this.state.opacity = Number(this.opacity.value)), this.draw());
    this.overlayGroup = element("div", { className: "overlays" }, [
      group("overlays", ...Object.values(this.overlayButtons)), this.opacity]);
    this.toolButtons = {
      invert: button(icon("invert"), "invert (i)", () => this.invert()),
      play: button(icon("play"), "play (c)", () => this.play()),
      blink: button(icon("blink"), "blink to the next layer (t)", () => this.blink()),
      profile: button(icon("profile"), "profile of the row under the pointer (l)", () => this.profiles()),
      reset: button(icon("reset"), "reset zoom, place and window (space)", () => this.reset()),
      save: button(icon("save"), "save as PNG (p)", () => this.save()),
      full: button(icon("full"), "full screen (f)", () => this.fullScreen()),
      help: button(icon("help"), "keys (?)", () => this.help()),
    };
    const bar = element("div", { className: "bar" }, [
      group("plane", ...this.axisButtons), group("views", ...this.paneButtons), this.presetGroup,
      this.windowText, this.overlayGroup, element("span", { className: "spring" }),
      group("tools", ...Object.values(this.toolButtons))]);
    this.grid = element("div", { className: "grid" });
    this.panes = [0, 1, 2, 3].map((place) => this.pane(place));
    this.strip = element("canvas", { className: "strip", title: "click: go to this slice" });
    this.reading = element("span", { className: "reading hu" });
    this.note = element("span", { className: "note" });
    this.keys = element("dl", { className: "keys", hidden: true });
    for (const [key, what] of KEYS)
      this.keys.append(element("div", {}, [element("dt", { textContent: key }), element("dd", { textContent: what })]));
    const stage = element("div", { className: "stage" }, [this.grid, this.keys]);
    const foot = element("div", { className: "foot" }, [this.reading, this.note]);
    this.root.append(bar, stage, this.strip, foot);
  }

  pane(place) {
    const canvas = element("canvas"), select = element("select", { title: "layer" });
    const range = element("select", { title: "HU at full colour", className: "range" });
    range.append(...DIFFERENCE_RANGES_HU.map((hu) => element("option", { value: hu, textContent: `±${hu} HU` })));
    select.onchange = () => ((this.state.layers[place] = Number(select.value)), this.refresh(), this.draw(), this.focus());
    range.onchange = () => (this.range(Number(range.value)), this.refresh(), this.draw(), this.focus());
    select.setAttribute("aria-label", `layer of view ${place + 1}`);
    range.setAttribute("aria-label", "range of the difference");
    const box = element("div", { className: "pane", data: { pane: place } }, [
      canvas, element("div", { className: "choice" }, [select, range])]);
    return { box, canvas, select, range };
  }

  // What depends on the state but not on the slice
  refresh() {
    const { scan, state } = this;
    this.axisButtons.forEach((b) => b.setAttribute("aria-pressed", b.dataset.axis === state.axis));
    this.paneButtons.forEach((b, i) => {
      b.setAttribute("aria-pressed", i + 1 === state.panes);
      b.hidden = i >= scan.layers.length;
    });
    this.presetGroup.replaceChildren(...[...scan.presets.map((p, i) => [p[0], i + 1]), ["Auto", 0]].map(([name, i]) => {
      const made = element("button", { type: "button", textContent: name, data: { preset: i } });
      made.title = i ? `${scan.presets[i - 1][1]} / ${scan.presets[i - 1][2]} HU (${i})` : "from this slice (0)";
      made.onclick = () => (this.preset(i), this.draw(), this.focus());
      return made;
    }));
    for (const [name, b] of Object.entries(this.overlayButtons)) b.hidden = !scan[name];
    this.paneButtons[0].parentElement.hidden = scan.layers.length < 2;
    this.overlayGroup.hidden = !(scan.truth || scan.found || scan.heat);
    this.toolButtons.blink.hidden = scan.layers.length < 2;
    this.opacity.value = state.opacity;
    this.grid.replaceChildren(...this.panes.slice(0, state.panes).map((pane) => pane.box));
    this.panes.forEach((pane, place) => {
      pane.select.replaceChildren(...scan.layers.map((layer, i) => element("option", { value: i, textContent: layer.label })));
      pane.select.value = state.layers[place];
      pane.range.hidden = !this.isDifference(place);
      pane.range.value = this.rangeHu;
    });
    this.strip.hidden = false;
    this.arrange();
  }

  isDifference(place) {
    return this.scan.layers[this.state.layers[place]].minus !== undefined;
  }

  // Views as large as they can be: of all ways to lay them out the one with the largest square
  arrange() {
    const width = this.grid.clientWidth || 1200;
    const full = document.fullscreenElement === this.root;
    const room = window.innerHeight - this.above - 135; // strip and foot are below; where there is little, one scrolls
    const most = full ? window.innerHeight - 170 : Math.min(860, room >= 380 ? room : Math.max(420, window.innerHeight - 300));
    const count = this.state.panes;
    let best = null;
    for (let columns = count; columns >= 1; columns--) {
      if (count % columns) continue; // no empty place
      const rows = count / columns;
      const side = Math.min(width / columns, (rows > 1 && !full ? most * 1.1 : most) / rows);
      if (!best || side > best.side * 1.15) best // a single row leaves more of the page in sight
        = { columns, rows, side };
    }
    const height = full ? most / best.rows : Math.min(best.side, most);
    this.grid.style.gridTemplateColumns = `repeat(${best.columns}, minmax(0, 1fr))`;
    this.panes.forEach((pane) => (pane.box.style.height = `${Math.floor(height)}px`));
  }

  // How much of the page, unscrolled, is above the views
  get above() {
    const page = this.root.getRootNode().host?.closest("section");
    return this.grid.getBoundingClientRect().top + (page?.scrollTop ?? 0);
  }

  // ---------------------------------------------------------------- what hands do

  listen() {
    const { root } = this;
    this.watch = new ResizeObserver(() => this.scan && (this.arrange(), this.draw()));
    this.watch.observe(this.grid);
    const { signal } = (this.life = new AbortController());
    document.addEventListener("fullscreenchange", () => this.scan && (this.arrange(), this.draw()), { signal });
    // Streamlit itself listens for r and c: keys that the viewer has the focus for go no further
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("keyup", (event) => event.stopPropagation());
    this.grid.addEventListener("wheel", (event) => this.roll(event), { passive: false });
    this.grid.addEventListener("contextmenu", (event) => event.preventDefault());
    this.panes.forEach((pane, place) => {
      pane.canvas.addEventListener("pointerdown", (event) => this.press(event, place));
      pane.canvas.addEventListener("pointermove", (event) => this.hover(event, place));
      pane.canvas.addEventListener("pointerleave", () => ((this.cursor = null), this.draw()));
    });
    const jump = (event) => {
      if (!(event.buttons & 1)) return;
      const { left, width } = this.strip.getBoundingClientRect();
      const share = (event.clientX - left - this.stripLeft) / (width - this.stripLeft - 8);
      this.turn("axial", false);
      this.go(Math.floor(share * this.counts.axial));
    };
    this.strip.addEventListener("pointerdown", (event) => (this.strip.setPointerCapture(event.pointerId), jump(event), this.focus()));
    this.strip.addEventListener("pointermove", jump);
    this.strip.addEventListener("wheel", (event) => this.roll(event), { passive: false });
  }

  focus() {
    this.root.focus({ preventScroll: true });
  }

  key(event) {
    if (!this.scan || event.target.closest?.("select, input")) return event.stopPropagation();
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -5, PageDown: 5 }[event.key];
    const actions = {
      Home: () => this.go(0), End: () => this.go(Infinity), " ": () => this.reset(), i: () => this.invert(),
      c: () => this.play(), t: () => this.blink(), g: () => this.toggle("lesions"), h: () => this.toggle("heat"), l: () => this.profiles(),
      "[": () => this.fade(-0.1), "]": () => this.fade(0.1), v: () => this.turn(AXES[(AXES.indexOf(this.state.axis) + 1) % 3]),
      "+": () => this.magnify(1.2), "=": () => this.magnify(1.2), "-": () => this.magnify(1 / 1.2),
      f: () => this.fullScreen(), p: () => this.save(), r: () => this.reset(), "?": () => this.help(),
      Escape: () => ((this.region = null), (this.keys.hidden = true), this.draw()),
    };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if ((event.key === " " || event.key === "Enter") && event.target.closest?.("button")) return event.stopPropagation();
    if (step) this.go(this.index + step);
    else if (/^[0-6]$/.test(event.key)) this.preset(Number(event.key)), this.draw();
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  roll(event) {
    event.preventDefault();
    if (document.activeElement === document.body) this.focus();
    const pixels = event.deltaY * (event.deltaMode === 1 ? 33 : event.deltaMode === 2 ? 400 : 1);
    if (event.ctrlKey) return this.magnify(Math.exp(-pixels / 500), event);
    if (Math.abs(pixels) >= WHEEL_STEP) {
      this.wheel = 0;
      return this.go(this.index + Math.sign(pixels));
    }
    this.wheel = Math.sign(pixels) === Math.sign(this.wheel) ? this.wheel + pixels : pixels;
    if (Math.abs(this.wheel) < WHEEL_STEP) return;
    this.go(this.index + Math.sign(this.wheel));
    this.wheel = 0;
  }

  press(event, place) {
    this.focus();
    const { state } = this, canvas = this.panes[place].canvas;
    const from = { x: event.clientX, y: event.clientY, width: state.width, level: state.level, pan: [...state.pan] };
    const start = this.voxel(event, place);
    const kind = event.button === 2 ? "window" : event.button === 1 || event.shiftKey ? "pan" : "region";
    canvas.setPointerCapture(event.pointerId);
    if (kind === "region") this.region = null;
    const move = (next) => {
      const [x, y] = [next.clientX - from.x, next.clientY - from.y];
      if (kind === "window") this.window(from.width * Math.exp(x / 250), from.level + (y * from.width) / 300);
      if (kind === "pan") state.pan = [from.pan[0] + x, from.pan[1] + y];
      if (kind === "region" && Math.hypot(x, y) > 3)
        this.region = { axis: state.axis, from: start.at, to: this.voxel(next, place).at };
      this.draw();
    };
    const done = () => {
      canvas.removeEventListener("pointermove", move);
      canvas.removeEventListener("pointerup", done);
      canvas.removeEventListener("pointercancel", done);
      this.draw();
    };
    canvas.addEventListener("pointermove", move);
    canvas.addEventListener("pointerup", done);
    canvas.addEventListener("pointercancel", done);
    event.preventDefault();
    this.draw();
  }

  hover(event, place) {
    this.cursor = { place, ...this.voxel(event, place) };
    this.draw();
  }

  get index() {
    return this.state.index[this.state.axis];
  }

  go(index) {
    this.state.index[this.state.axis] = Math.max(0, Math.min(this.counts[this.state.axis] - 1, index));
    this.draw();
    if (this.scan.link && this.state.axis === "axial") {
      clearTimeout(this.linking); // the address follows, so that it can be passed on: no rerun
      this.linking = setTimeout(() => {
        const url = new URL(window.location);
        url.searchParams.set("slice", this.state.index.axial + 1);
        window.history.replaceState(window.history.state, "", url);
      }, 300);
    }
  }

  turn(axis, redraw = true) {
    if (this.state.axis !== axis) {
      this.state.axis = axis;
      this.look();
      this.region = null;
      this.refresh();
    }
    if (redraw) this.draw();
  }

  split(count) {
    this.state.panes = count;
    this.refresh();
    this.draw();
  }

  preset(number) {
    if (number === 0) return this.auto();
    const preset = this.scan.presets[number - 1];
    if (preset) this.window(preset[1], preset[2]);
  }

  // The window that holds nearly all of this slice's tissue
  auto() {
    const plane = this.plane(this.state.layers[0]), { hu } = plane;
    const counts = new Uint32Array(HU_VALUES);
    let all = 0;
    for (let r = 0; r < plane.rows; r++)
      for (let c = 0; c < plane.columns; c++) {
        const value = hu[plane.at + r * plane.row + c * plane.column];
        if (value > -300) counts[value + 32768]++, all++;
      }
    const at = (share) => {
      let sum = 0;
      for (let i = 0; i < HU_VALUES; i++) if ((sum += counts[i]) >= share * all) return i - 32768;
      return 3071;
    };
    if (all) this.window(Math.max(1, at(0.9) - at(0.02)), (at(0.9) + at(0.02)) / 2);
  }

  window(width, level) {
    width = Math.max(1, Math.min(8192, Math.round(width)));
    Object.assign(this.state, { width, level: Math.max(-2048, Math.min(4096, Math.round(level))) });
    this.grey = null;
  }

  range(hu) {
    this.rangeHu = hu;
    this.differences = differenceTable(hu);
  }

  look() {
    Object.assign(this.state, { zoom: 1, pan: [0, 0] });
  }

  reset() {
    this.look();
    this.state.invert = false;
    this.preset(1);
    this.draw();
  }

  magnify(factor, event) {
    const { state } = this, before = state.zoom;
    state.zoom = Math.max(0.5, Math.min(20, state.zoom * factor));
    if (event) { // what is under the cursor stays there
      const box = event.target.getBoundingClientRect();
      const at = [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
      state.pan = state.pan.map((pan, i) => at[i] - ((at[i] - pan) * state.zoom) / before);
    }
    this.draw();
  }

  invert() {
    this.state.invert = !this.state.invert;
    this.grey = null;
    this.draw();
  }

  play() {
    if (this.cine) this.cine = clearInterval(this.cine);
    else this.cine = setInterval(() => {
      if (!this.root.isConnected) return this.stop();
      this.go((this.index + 1) % this.counts[this.state.axis]);
    }, 120);
    this.toolButtons.play.setAttribute("aria-pressed", Boolean(this.cine));
  }

  blink() {
    const count = this.scan.layers.length;
    for (let place = 0; place < this.state.panes; place++)
      this.state.layers[place] = (this.state.layers[place] + 1) % count;
    this.refresh();
    this.draw();
  }

  toggle(name) {
    const { state } = this;
    if (name === "lesions") state.lesions = !state.lesions;
    else state[`no_${name}`] = !state[`no_${name}`];
    if (name !== "lesions" && name !== "heat") state.lesions = true;
    this.draw();
  }

  profiles() {
    this.state.profile = !this.state.profile;
    this.draw();
  }

  fade(step) {
    this.state.opacity = Math.max(0, Math.min(1, this.state.opacity + step));
    this.opacity.value = this.state.opacity;
    this.draw();
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.root.requestFullscreen?.();
  }

  help() {
    this.keys.hidden = !this.keys.hidden;
  }

  // ---------------------------------------------------------------- geometry

  // A plane of a layer: where it begins in the volume, and the steps to its next row and column
  plane(number) {
    const { scan } = this, [slices, rows, columns] = scan.shape;
    const [dz, dy, dx] = scan.spacing_mm, layer = scan.layers[number];
    const top = (slices - 1) * rows * columns; // the head is up
    const index = this.index;
    const shared = { hu: layer.hu ?? scan.layers[layer.of].hu, minus: layer.minus === undefined ? null : scan.layers[layer.minus].hu };
    return { ...shared, ...{
      axial: { at: index * rows * columns, row: columns, column: 1, rows, columns, mm: [dx, dy] },
      coronal: { at: top + index * columns, row: -rows * columns, column: 1, rows: slices, columns, mm: [dx, dz] },
      sagittal: { at: top + index, row: -rows * columns, column: columns, rows: slices, columns: rows, mm: [dy, dz] },
    }[this.state.axis] };
  }

  // (column, row, slice) of a place (x, y) in the plane
  corner(x, y) {
    const top = this.scan.shape[0] - 1;
    return { axial: [x, y, this.index], coronal: [x, this.index, top - y], sagittal: [this.index, x, top - y] }[this.state.axis];
  }

  millimetres([column, row, slice]) {
    return this.scan.affine.slice(0, 3).map((a) => a[0] * column + a[1] * row + a[2] * slice + a[3]);
  }

  // Where the plane lies in a view of width x height
  frame(plane, width, height, scale) {
    const { zoom, pan } = this.state;
    const wide = plane.columns * plane.mm[0], high = plane.rows * plane.mm[1];
    const perMm = Math.min(width / wide, height / high) * zoom;
    const [w, h] = [wide * perMm, high * perMm];
    return { x: (width - w) / 2 + pan[0] * scale, y: (height - h) / 2 + pan[1] * scale, w, h, perMm };
  }

  voxel(event, place) {
    const canvas = this.panes[place].canvas, box = canvas.getBoundingClientRect();
    const plane = this.plane(this.state.layers[place]), frame = this.frame(plane, box.width, box.height, 1);
    const x = ((event.clientX - box.left - frame.x) / frame.w) * plane.columns;
    const y = ((event.clientY - box.top - frame.y) / frame.h) * plane.rows;
    const inside = x >= 0 && y >= 0 && x < plane.columns && y < plane.rows;
    return { at: [x, y], inside };
  }

  // ---------------------------------------------------------------- drawing

  draw(done) {
    if (done) this.done = done;
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      if (!this.scan || !this.root.isConnected) return;
      const began = performance.now();
      const ratio = window.devicePixelRatio || 1;
      for (let place = 0; place < this.state.panes; place++) {
        const { canvas } = this.panes[place], [w, h] = [canvas.clientWidth, canvas.clientHeight];
        if (!w || !h) continue;
        if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
        if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
        const frame = this.paint(canvas.getContext("2d"), place, canvas.width, canvas.height, ratio);
        canvas.dataset.frame = [frame.x, frame.y, frame.w, frame.h].map((v) => v.toFixed(2)).join(" ");
      }
      this.drawStrip(ratio);
      this.tell();
      this.root.dataset.paintMs = (performance.now() - began).toFixed(1);
      this.done?.();
      this.done = null;
    });
  }

  paint(ctx, place, width, height, scale) {
    const { scan, state } = this, plane = this.plane(state.layers[place]);
    const frame = this.frame(plane, width, height, scale);
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.fillStyle = "#000";
    ctx.fillRect(0, 0, width, height);
    ctx.imageSmoothingEnabled = this.state.zoom < 4; // far in, pixels are to be seen
    this.picture(plane);
    ctx.drawImage(this.surface, frame.x, frame.y, frame.w, frame.h);
    const found = scan.found && state.lesions && !state.no_found, truth = scan.truth && state.lesions && !state.no_truth;
    if (scan.heat && !state.no_heat && state.heat && !plane.minus) { // a difference has colours of its own
      this.lay(plane, scan.heat.values, (share) => (Math.round(share * state.opacity) << 24) | this.heatColours[share]);
      ctx.drawImage(this.colour, frame.x, frame.y, frame.w, frame.h);
    }
    if (found && this.outline("found", plane)) {
      ctx.imageSmoothingEnabled = false;
      const cover = Math.round(255 * state.opacity * 0.6) << 24;
      this.lay(plane, scan.found.values, (value) => (value ? cover | FOUND_RGB : 0));
      ctx.drawImage(this.colour, frame.x, frame.y, frame.w, frame.h);
    }
    if (found) this.stroke(ctx, this.outline("found", plane), plane, frame, FOUND_COLOUR, scale);
    if (truth) this.stroke(ctx, this.outline("truth", plane), plane, frame, TRUE_COLOUR, scale);
    if (this.region?.axis === state.axis) this.drawRegion(ctx, plane, frame, scale);
    if (state.profile && this.cursor?.inside) this.profile(ctx, plane, frame, width, height, scale);
    if (this.cursor && this.cursor.inside && this.cursor.place !== place) this.cross(ctx, plane, frame, scale);
    this.write(ctx, place, plane, frame, width, height, scale);
    return frame;
  }

  get heatColours() {
    if (this.scan.heat.packed) return this.scan.heat.packed;
    return (this.scan.heat.packed = Uint32Array.from(this.scan.heat.colours, ([r, g, b]) => (b << 16) | (g << 8) | r));
  }

  picture(plane) {
    const { rows, columns, hu, minus, at, row, column } = plane;
    const image = this.image(this.surface, rows, columns);
    const out = image.out;
    if (minus) {
      const table = this.differences;
      for (let r = 0, i = 0; r < rows; r++)
        for (let c = 0, from = at + r * row; c < columns; c++, from += column) out[i++] = table[((hu[from] - minus[from]) & 0xffff) ^ 0x8000];
    } else {
      const table = (this.grey ??= greyTable(this.state.width, this.state.level, this.state.invert));
      for (let r = 0, i = 0; r < rows; r++)
        for (let c = 0, from = at + r * row; c < columns; c++, from += column) out[i++] = table[hu[from] + 32768];
    }
    this.surface.getContext("2d").putImageData(image.data, 0, 0);
  }

  lay(plane, values, colour) {
    const { rows, columns, at, row, column } = plane, image = this.image(this.colour, rows, columns);
    const table = Uint32Array.from({ length: 256 }, (_, value) => colour(value));
    for (let r = 0, i = 0; r < rows; r++)
      for (let c = 0, from = at + r * row; c < columns; c++, from += column) image.out[i++] = table[values[from]];
    this.colour.getContext("2d").putImageData(image.data, 0, 0);
  }

  image(canvas, rows, columns) {
    if (canvas.width !== columns || canvas.height !== rows || !canvas.pixels) {
      Object.assign(canvas, { width: columns, height: rows });
      const data = canvas.getContext("2d").createImageData(columns, rows);
      canvas.pixels = { data, out: new Uint32Array(data.data.buffer) };
    }
    return canvas.pixels;
  }

  // The edges between pixels inside and outside of a mask, in pixels of the plane; null where it is empty
  outline(name, plane) {
    const key = `${name} ${this.state.axis} ${this.index}`;
    if (this.outlines.has(key)) return this.outlines.get(key);
    const { rows, columns, at, row, column } = plane, values = this.scan[name].values;
    const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && values[at + r * row + c * column] > 0;
    let path = null;
    for (let r = 0; r < rows; r++)
      for (let c = 0, from = at + r * row; c < columns; c++, from += column) {
        if (!values[from]) continue;
        path ??= new Path2D();
        for (const [dr, dc, x0, y0, x1, y1] of [[-1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 1, 1], [0, -1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 1]])
          if (!inside(r + dr, c + dc)) path.moveTo(c + x0, r + y0), path.lineTo(c + x1, r + y1);
      }
    this.outlines.set(key, path);
    return path;
  }

  stroke(ctx, path, plane, frame, colour, scale) {
    if (!path) return;
    const placed = new Path2D();
    placed.addPath(path, new DOMMatrix([frame.w / plane.columns, 0, 0, frame.h / plane.rows, frame.x, frame.y]));
    Object.assign(ctx, { strokeStyle: colour, lineWidth: 1.5 * scale, lineCap: "round" });
    ctx.stroke(placed);
  }

  cross(ctx, plane, frame, scale) {
    const [x, y] = this.cursor.at, px = frame.x + (x / plane.columns) * frame.w, py = frame.y + (y / plane.rows) * frame.h;
    Object.assign(ctx, { strokeStyle: "rgba(255, 214, 10, 0.9)", lineWidth: scale });
    ctx.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      ctx.moveTo(px + 4 * dx * scale, py + 4 * dy * scale);
      ctx.lineTo(px + 12 * dx * scale, py + 12 * dy * scale);
    }
    ctx.stroke();
  }

  // HU along the row under the pointer, column over column, from the low to the high end of the window
  profile(ctx, plane, frame, width, height, scale) {
    const { state } = this, y = Math.floor(this.cursor.at[1]), [top, bottom] = [height * 0.64, height * 0.86];
    const [level, half] = plane.minus ? [0, this.rangeHu] : [state.level, state.width / 2];
    const at = (hu) => bottom - ((Math.max(-1, Math.min(1, (hu - level) / half)) + 1) / 2) * (bottom - top);
    ctx.fillStyle = "rgba(0, 0, 0, 0.5)";
    ctx.fillRect(0, top - 8 * scale, width, bottom - top + 16 * scale);
    Object.assign(ctx, { strokeStyle: "rgba(255, 214, 10, 0.6)", lineWidth: scale });
    ctx.setLineDash([4 * scale, 4 * scale]);
    const row = frame.y + ((y + 0.5) / plane.rows) * frame.h;
    ctx.strokeRect(frame.x, row, frame.w, 0);
    ctx.setLineDash([]);
    Object.assign(ctx, { strokeStyle: "#ffd60a", lineWidth: 1.5 * scale });
    ctx.beginPath();
    for (let x = 0; x < plane.columns; x++) ctx.lineTo(frame.x + ((x + 0.5) / plane.columns) * frame.w, at(this.value(plane, x, y)));
    ctx.stroke();
    for (const hu of [level - half, level + half]) this.text(ctx, `${Math.round(hu)} HU`, 10 * scale, at(hu), scale, { size: 10.5, colour: "#ffd60a" });
  }

  drawRegion(ctx, plane, frame, scale) {
    const { from, to } = this.region;
    const at = ([x, y]) => [frame.x + (x / plane.columns) * frame.w, frame.y + (y / plane.rows) * frame.h];
    const [[x0, y0], [x1, y1]] = [at(from), at(to)];
    Object.assign(ctx, { strokeStyle: "#ffd60a", lineWidth: 1.25 * scale });
    ctx.beginPath();
    ctx.ellipse((x0 + x1) / 2, (y0 + y1) / 2, Math.abs(x1 - x0) / 2, Math.abs(y1 - y0) / 2, 0, 0, 2 * Math.PI);
    ctx.stroke();
    const found = this.measure(plane);
    if (!found) return;
    this.text(ctx, `${found.mean.toFixed(1)} ± ${found.sd.toFixed(1)} HU`, Math.max(x0, x1) + 6 * scale, (y0 + y1) / 2, scale, { colour: "#ffd60a" });
    this.text(ctx, `${(found.area / 100).toFixed(2)} cm²`, Math.max(x0, x1) + 6 * scale, (y0 + y1) / 2 + 15 * scale, scale, { colour: "#ffd60a" });
  }

  // Mean and SD of the pixels whose centres lie in the ellipse of the region
  measure(plane) {
    const { from, to } = this.region;
    const [cx, cy] = [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
    const [rx, ry] = [Math.abs(to[0] - from[0]) / 2, Math.abs(to[1] - from[1]) / 2];
    let count = 0, sum = 0, squares = 0;
    for (let y = Math.max(0, Math.floor(cy - ry)); y < Math.min(plane.rows, cy + ry); y++)
      for (let x = Math.max(0, Math.floor(cx - rx)); x < Math.min(plane.columns, cx + rx); x++) {
        if (((x + 0.5 - cx) / rx) ** 2 + ((y + 0.5 - cy) / ry) ** 2 > 1) continue;
        const value = this.value(plane, x, y);
        count++, (sum += value), (squares += value * value);
      }
    if (count < 2) return null;
    const mean = sum / count;
    return { mean, sd: Math.sqrt(Math.max(0, squares - count * mean * mean) / (count - 1)), area: count * plane.mm[0] * plane.mm[1] };
  }

  value(plane, x, y) {
    const at = plane.at + y * plane.row + x * plane.column;
    return plane.hu[at] - (plane.minus ? plane.minus[at] : 0);
  }

  text(ctx, words, x, y, scale, { align = "left", colour = "#e8e8ea", size = 12, weight = 400 } = {}) {
    Object.assign(ctx, { font: `${weight} ${size * scale}px ${this.font}`, textAlign: align, textBaseline: "middle" });
    Object.assign(ctx, { lineWidth: 3 * scale, strokeStyle: "rgba(0, 0, 0, 0.75)", lineJoin: "round", fillStyle: colour });
    ctx.strokeText(words, x, y);
    ctx.fillText(words, x, y);
  }

  get font() {
    return (this.family ??= getComputedStyle(this.root).fontFamily || "sans-serif");
  }

  // Letters of the patient's sides, and what the view shows
  write(ctx, place, plane, frame, width, height, scale) {
    const { scan, state } = this, layer = scan.layers[state.layers[place]];
    const origin = this.millimetres(this.corner(0, 0));
    const right = this.millimetres(this.corner(1, 0)).map((v, i) => v - origin[i]);
    const down = this.millimetres(this.corner(0, 1)).map((v, i) => v - origin[i]);
    const minus = (v) => v.map((x) => -x);
    const letters = { left: letter(minus(right)), right: letter(right), top: letter(minus(down)), bottom: letter(down) };
    this.root.dataset.letters = Object.values(letters).join("");
    const edge = 10 * scale, line = 16 * scale, small = width < 330 * scale;
    const bold = { size: 15, weight: 600, colour: "#ffd479" };
    this.text(ctx, letters.left, edge, height / 2, scale, bold);
    this.text(ctx, letters.right, width - edge, height / 2, scale, { ...bold, align: "right" });
    this.text(ctx, letters.top, width / 2, edge + (small ? 30 : 4) * scale, scale, { ...bold, align: "center" }); // beside the names
    this.text(ctx, letters.bottom, width / 2, height - edge - 4 * scale, scale, { ...bold, align: "center" });
    const grey = { colour: "#b9b9c0", size: small ? 10.5 : 12 };
    const count = this.counts[state.axis], ends = { ...grey, align: "right" };
    this.text(ctx, `${this.index + 1}/${count}`, width - edge, 18 * scale, scale, { ...ends, size: 14, weight: 600, colour: "#fff" });
    const [x, y, z] = this.millimetres(this.corner(plane.columns / 2, plane.rows / 2));
    const where = { axial: z > 0 ? `S ${z.toFixed(1)}` : `I ${(-z).toFixed(1)}`, coronal: y > 0 ? `P ${y.toFixed(1)}` : `A ${(-y).toFixed(1)}`, sagittal: x > 0 ? `L ${x.toFixed(1)}` : `R ${(-x).toFixed(1)}` }[state.axis];
    this.text(ctx, `${where} mm`, width - edge, 18 * scale + line, scale, ends);
    [layer.dose, layer.model].filter(Boolean).forEach((words, i) => this.text(ctx, words, edge, 42 * scale + i * line, scale, grey));
    const [dz, dy, dx] = scan.spacing_mm;
    this.text(ctx, scan.notice, edge, height - 14 * scale, scale, { ...grey, size: small ? 9 : 10.5, colour: "#ffb4a8" });
    if (layer.minus === undefined) this.text(ctx, `W ${state.width} L ${state.level}${state.invert ? " inv" : ""}`, width - edge, height - 14 * scale, scale, ends);
    if (!small) this.text(ctx, `${dx.toFixed(2)} × ${dy.toFixed(2)} × ${dz.toFixed(2)} mm`, width - edge, height - 14 * scale - line, scale, ends);
    if (layer.minus !== undefined) this.bar(ctx, width - edge - 110 * scale, height - 22 * scale, 110 * scale, scale, `-${this.rangeHu}`, `+${this.rangeHu} HU`, (share) => this.differences[32768 + Math.round((2 * share - 1) * this.rangeHu)]);
    else if (scan.heat && !state.no_heat) this.bar(ctx, edge, height - 46 * scale, 110 * scale, scale, "0", scan.heat.label, (share) => this.heatColours[Math.round(255 * share)]);
    this.ruler(ctx, frame, width, height, scale);
  }

  bar(ctx, x, y, length, scale, low, high, colour) {
    for (let i = 0; i < length; i++) {
      const packed = colour(i / (length - 1));
      ctx.fillStyle = `rgb(${packed & 255}, ${(packed >> 8) & 255}, ${(packed >> 16) & 255})`;
      ctx.fillRect(x + i, y, 1.5, 6 * scale);
    }
    this.text(ctx, low, x, y + 14 * scale, scale, { size: 10, colour: "#b9b9c0" });
    this.text(ctx, high, x + length, y + 14 * scale, scale, { size: 10, colour: "#b9b9c0", align: "right" });
  }

  // A scale of 5 cm at the right edge, and 1 cm where zoomed in
  ruler(ctx, frame, width, height, scale) {
    const mm = SCALE_BAR_MM * frame.perMm < height * 0.5 ? SCALE_BAR_MM : 10;
    const length = mm * frame.perMm, x = width - 12 * scale, y = height * 0.72 - length / 2;
    if (length > height * 0.45) return;
    Object.assign(ctx, { strokeStyle: "#b9b9c0", lineWidth: scale, lineCap: "butt" });
    ctx.beginPath();
    for (let i = 0; i <= 5; i++) ctx.moveTo(x, y + (length * i) / 5), ctx.lineTo(x - (i % 5 ? 4 : 7) * scale, y + (length * i) / 5);
    ctx.moveTo(x, y);
    ctx.lineTo(x, y + length);
    ctx.stroke();
    if (width > 330 * scale) this.text(ctx, `${mm / 10} cm`, x - 11 * scale, y + length / 2, scale, { size: 10, align: "right", colour: "#b9b9c0" });
  }

  // ---------------------------------------------------------------- under the views

  drawStrip(ratio) {
    const { strip, scan, state } = this, slices = this.counts.axial, scores = scan.scores;
    strip.style.height = scores.length ? "92px" : "30px";
    const width = strip.clientWidth, height = strip.clientHeight, ctx = strip.getContext("2d");
    if (!width) return;
    if (strip.width !== Math.round(width * ratio)) strip.width = Math.round(width * ratio);
    if (strip.height !== Math.round(height * ratio)) strip.height = Math.round(height * ratio);
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.root), ink = style.color, faint = style.getPropertyValue("--faint") || "rgba(128,128,128,.25)";
    const left = (this.stripLeft = scores.length ? 30 : 8), right = width - 8, top = scores.length ? 20 : 4, bottom = height - 15;
    const step = (right - left) / slices, middle = (i) => left + (i + 0.5) * step, high = (p) => bottom - p * (bottom - top);
    ctx.font = `11px ${this.font}`;
    ctx.textBaseline = "middle";
    ctx.fillStyle = faint;
    ctx.fillRect(left, top, right - left, bottom - top);
    if (scan.truth_slices) {
      ctx.fillStyle = "rgba(61, 220, 132, 0.28)";
      scan.truth_slices.forEach((there, i) => there && ctx.fillRect(left + i * step, top, step, bottom - top));
    }
    scores.forEach(({ values, threshold, colour, label }, number) => {
      Object.assign(ctx, { strokeStyle: colour, fillStyle: colour, lineWidth: 1.75 });
      ctx.beginPath();
      values.forEach((p, i) => (i && values[i - 1] !== null ? ctx.lineTo(middle(i), high(p)) : ctx.moveTo(middle(i), high(p))));
      ctx.stroke();
      values.forEach((p, i) => {
        if (p === null) return; // not known
        ctx.beginPath();
        ctx.arc(middle(i), high(p), Math.min(3, step / 3), 0, 7);
        ctx.fill();
      });
      if (threshold !== null) {
        ctx.setLineDash([4, 4]);
        ctx.lineWidth = 1;
        ctx.beginPath();
        ctx.moveTo(left, high(threshold));
        ctx.lineTo(right, high(threshold));
        ctx.stroke();
        ctx.setLineDash([]);
      }
      const here = `${label} ${values[state.index.axial]?.toFixed(3) ?? "n/a"}`;
      ctx.textAlign = "left";
      const x = left + scores.slice(0, number).reduce((sum, one) => sum + ctx.measureText(`${one.label} 0.000`).width + 26, 0);
      ctx.fillRect(x, 6, 10, 3);
      ctx.fillStyle = ink;
      ctx.fillText(here, x + 14, 8);
    });
    ctx.fillStyle = ink;
    if (scores.length) {
      ctx.textAlign = "right";
      for (const p of [0, 1]) ctx.fillText(String(p), left - 6, high(p));
      ctx.fillText(scan.scores_title, right, 8);
    }
    ctx.textAlign = "center";
    const every = [1, 2, 5, 10, 20, 50, 100].find((n) => (n * (right - left)) / slices > 30) ?? 200;
    for (let i = 0; i < slices; i++) if (i === 0 || (i + 1) % every === 0) ctx.fillText(String(i + 1), middle(i), height - 6);
    if (state.axis === "axial") {
      ctx.fillStyle = style.getPropertyValue("--accent") || ink;
      ctx.globalAlpha = 0.9;
      ctx.fillRect(middle(state.index.axial) - Math.max(1, Math.min(step / 2, 2)), top - 2, Math.max(2, Math.min(step, 4)), bottom - top + 4);
      ctx.globalAlpha = 1;
    }
  }

  // What is said in words, and to tests
  tell() {
    const { scan, state, root, cursor } = this;
    this.windowText.textContent = `W ${state.width}  L ${state.level}`;
    for (const b of this.presetGroup.children) {
      const preset = scan.presets[b.dataset.preset - 1];
      b.setAttribute("aria-pressed", Boolean(preset && preset[1] === state.width && preset[2] === state.level));
    }
    this.toolButtons.invert.setAttribute("aria-pressed", state.invert);
    this.toolButtons.profile.setAttribute("aria-pressed", Boolean(state.profile));
    for (const [name, b] of Object.entries(this.overlayButtons))
      b.setAttribute("aria-pressed", !state[`no_${name}`] && (name === "heat" || state.lesions));
    let reading = "Point at the image to read HU; ? shows the keys";
    if (cursor?.inside) {
      const [x, y] = cursor.at.map(Math.floor), corner = this.corner(x, y);
      const [right, back, up] = this.millimetres(corner);
      const at = [["R", "L", right], ["A", "P", back], ["I", "S", up]].map(([low, high, v]) => `${v < 0 ? low : high} ${Math.abs(v).toFixed(1)}`);
      const values = scan.layers.map((layer, i) => layer.minus === undefined && `${layer.label} ${this.value(this.plane(i), x, y)}`).filter(Boolean);
      reading = `${values.join("  ·  ")} HU  |  ${at.join("  ")} mm  |  column ${corner[0] + 1}, row ${corner[1] + 1}`;
    }
    this.reading.textContent = reading;
    this.note.textContent = state.axis === "axial" ? scan.notes[state.index.axial] ?? "" : "";
    Object.assign(root.dataset, {
      slice: this.index + 1, slices: this.counts[state.axis], window: `${state.width}/${state.level}`, axis: state.axis,
      layers: state.layers.slice(0, state.panes).map((i) => scan.layers[i].name).join(" "), zoom: state.zoom.toFixed(2),
      heat: Boolean(scan.heat) && !state.no_heat, lesions: state.lesions, opacity: state.opacity.toFixed(2), key: scan.key,
    });
  }

  // The views as they are, on one picture, with what they are
  save() {
    const { scan, state } = this, scale = Math.max(2, window.devicePixelRatio || 1);
    const boxes = this.panes.slice(0, state.panes).map(({ canvas }) => canvas.getBoundingClientRect());
    const left = Math.min(...boxes.map((b) => b.left)), top = Math.min(...boxes.map((b) => b.top));
    const width = Math.max(...boxes.map((b) => b.right)) - left, height = Math.max(...boxes.map((b) => b.bottom)) - top;
    const sheet = element("canvas", { width: width * scale, height: (height + 44) * scale }), ctx = sheet.getContext("2d");
    ctx.fillStyle = "#000";
    ctx.fillRect(0, 0, sheet.width, sheet.height);
    boxes.forEach((box, place) => {
      const part = element("canvas", { width: Math.round(box.width * scale), height: Math.round(box.height * scale) });
      this.paint(part.getContext("2d"), place, part.width, part.height, scale);
      this.text(part.getContext("2d"), scan.layers[state.layers[place]].label, 10 * scale, 20 * scale, scale, { size: 14, weight: 600 });
      ctx.drawImage(part, (box.left - left) * scale, (box.top - top) * scale);
    });
    this.text(ctx, `${scan.title} · ${state.axis} ${this.index + 1}/${this.counts[state.axis]} · W ${state.width} L ${state.level} HU`, 10 * scale, (height + 14) * scale, scale);
    this.text(ctx, `${scan.notice}, not a medical device`, 10 * scale, (height + 31) * scale, scale, { colour: "#ffb4a8" });
    sheet.toBlob((blob) => {
      const link = element("a", { href: URL.createObjectURL(blob), download: `${scan.file}_${state.axis}_${this.index + 1}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    this.draw();
  }
}
