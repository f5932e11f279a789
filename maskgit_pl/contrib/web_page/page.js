// Generates and edits images with the graphs and the numbers of this folder, which `maskgit export --format web` wrote.
// Tokens are those of MaskGIT.generate in Python with the same settings and seed: the random numbers are the same bits.

const element = (id) => document.getElementById(id);
const round = Math.fround;

// Random numbers: randomness.py. Words are unsigned numbers of 32 bits.

function highHalf(a, b) { // of the product of two words, in parts of 16 bits, which doubles hold exactly
  const a0 = a & 0xffff, a1 = a >>> 16, b0 = b & 0xffff, b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) / 65536 >>> 0);
  const low = a0 * b1 + (middle % 65536);
  return a1 * b1 + Math.floor(middle / 65536) + Math.floor(low / 65536);
}

export function philox(counter, key) {
  let [c0, c1, c2, c3] = counter, [k0, k1] = key;
  for (let turn = 0; turn < 10; turn++) {
    [c0, c1, c2, c3] = [
      (highHalf(0xcd9e8d57, c2) ^ c1 ^ k0) >>> 0, Math.imul(0xcd9e8d57, c2) >>> 0,
      (highHalf(0xd2511f53, c0) ^ c3 ^ k1) >>> 0, Math.imul(0xd2511f53, c0) >>> 0,
    ];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

export function randomBits(key, seed, epoch, count) {
  const words = [];
  for (let block = 0; words.length < count; block++) words.push(...philox([block, 0, epoch, seed], key));
  return words.slice(0, count);
}

const uniform = (word) => Math.max(word >>> 8, 1) * 2 ** -24;
const gumbel = (value) => round(-round(Math.log(-round(Math.log(value)))));

export function gumbelRow(first, second, size) {
  const numbers = new Float32Array(size);
  for (let k = 0; k < size; k++) {
    let word = (first + Math.imul(k, 0x9e3779b9)) | 0;
    word ^= word >>> 16;
    word = Math.imul(word, 0x7feb352d);
    word ^= word >>> 15;
    word ^= second;
    word = Math.imul(word, 0x846ca68b);
    word ^= word >>> 16;
    const value = Math.min(round(round(round(word & 0x7fffffff) + 0.5) * 2 ** -31), 1 - 2 ** -24);
    numbers[k] = -round(Math.log(-round(Math.log1p(-value))));
  }
  return numbers;
}

// Decoding: decoding/decoder.py, for one image.

export function countAfter(ratios, step, unknown, masked) {
  if (step === ratios.length - 1) return 0;
  const planned = Math.floor(round(round(ratios[step]) * unknown));
  return Math.min(masked, Math.max(1, Math.min(masked - 1, planned)));
}

function keepLikeliest(logits, count) { // with -Infinity elsewhere
  const least = [...logits].sort((a, b) => b - a)[Math.min(count, logits.length) - 1];
  return logits.map((value) => (value < least ? -Infinity : value));
}

function likeliest(values) {
  let best = 0;
  for (let k = 1; k < values.length; k++) if (values[k] > values[best]) best = k;
  return best;
}

function drawCode(logits, temperature, topK, words) { // as CodeSampling.draw
  if (temperature === 0 || 1 / temperature > 1e30) return likeliest(logits);
  const factor = round(1 / temperature), scaled = logits.map((value) => value * factor);
  const noise = gumbelRow(...words, logits.length);
  const kept = topK ? keepLikeliest(scaled, topK) : scaled;
  return likeliest(kept.map((value, k) => value + noise[k]));
}

function logProbability(logits, code) {
  const most = logits[likeliest(logits)];
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - most);
  return round(logits[code] - most - Math.log(sum));
}

/** Decodes tokens, (N) with the mask token at unknown places; yields after each step.
 *  settings: {label, seed, steps, schedule, guidance, choice, first, last}; model: an entry of `models` in model.json;
 *  predict(tokens, label, scale) resolves to logits (N K) float32. */
export async function* decode(page, model, predict, start, settings) {
  const size = start.length, codes = page.codebook_size, mask = page.mask_token_id, { seed, steps } = settings;
  const scales = model.guidance[steps - 1], ratios = model.schedules[settings.schedule][steps - 1];
  let tokens = start.slice(), masked = tokens.map((token) => token === mask);
  const isFree = masked.slice(), unknown = masked.filter(Boolean).length, confidence = new Float32Array(size).fill(1);
  const skipped = unknown < size ? Math.floor(steps / 6) : 0; // an edit has context from the start, as in pipeline/regions.py
  for (let step = skipped, left = unknown; step < steps && left > 0; step++) {
    // 1. Predict. The first step of a student sees random codes in place of some mask tokens.
    const draw = (stream) => randomBits(page.streams[stream], seed, step, size);
    let shown = tokens;
    if (step === 0 && model.random_start > 0) {
      const chance = draw("decode/start"), random = draw("decode/start/codes");
      shown = tokens.map((token, n) => token !== mask || uniform(chance[n]) >= round(model.random_start) ? token
        : Math.min(Math.floor(round(uniform(random[n]) * codes)), codes - 1));
    }
    const logits = await predict(shown, settings.label, settings.guidance * scales[step]);
    // 2. Draw. 3. Score.
    const first = draw("decode/codes"), second = draw("decode/codes/second"), choice = draw("decode/choice");
    const progress = steps > 1 ? step / (steps - 1) : 1;
    const temperature = settings.first + (settings.last - settings.first) * progress;
    const noise = settings.choice * (1 - (step + 1) / steps), scores = [], drawn = tokens.slice();
    for (let n = 0; n < size; n++) {
      if (!masked[n]) continue;
      const row = logits.subarray(n * codes, (n + 1) * codes);
      drawn[n] = drawCode(row, temperature, model.top_k, [first[n], second[n]]);
      const surety = logProbability(row, drawn[n]), chance = gumbel(uniform(choice[n]));
      confidence[n] = Math.exp(surety);
      scores.push([model.selector === "random" ? chance : round(surety + round(chance * round(noise))), n]);
    }
    // 4. Count. 5. Mask the lowest scores again.
    left = countAfter(ratios, step, unknown, left);
    const before = masked;
    masked = masked.map(() => false);
    tokens = drawn.slice();
    for (const [, n] of scores.sort((a, b) => a[0] - b[0]).slice(0, left)) {
      masked[n] = true;
      tokens[n] = mask;
    }
    yield { step, steps, tokens: drawn, before, masked, left, isFree, confidence: confidence.slice() };
  }
}

// Graphs

async function load(url, hash, name) {
  const answer = await fetch(url, { integrity: `sha256-${hash}` }).catch(() => null);
  if (!answer?.ok) throw new Error(`${name} is missing or has changed. Export the page again.`);
  return answer.arrayBuffer();
}

async function loadRuntime({ folder, files }) { // blob URLs, because an import has no hash in all browsers
  const [script, wasm] = await Promise.all(Object.entries(files).map(([name, hash]) =>
    load(folder + name, hash, folder ? `ONNX Runtime (${folder}${name})` : name)));
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const runtime = await import(url);
  Object.assign(runtime.env.wasm, { wasmBinary: wasm, numThreads: 1 });
  return runtime;
}

export async function loadGraphs(page) {
  const runtime = await loadRuntime(page.runtime), graphs = {};
  for (const [name, { file, hash }] of Object.entries(page.graphs)) {
    const bytes = await load(file, hash, file);
    const session = await runtime.InferenceSession.create(new Uint8Array(bytes), { executionProviders: ["wasm"] });
    graphs[name] = async (inputs, batch) => {
      const tensors = Object.entries(inputs).map(([key, values]) =>
        [key, new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), key === "labels" ? [batch] : [batch, values.length / batch])]);
      return Object.values(await session.run(Object.fromEntries(tensors)))[0].data;
    };
  }
  return graphs;
}

export const guidedBy = (page, graph) => async (tokens, label, scale) => {
  if (scale === 0) return graph({ tokens, labels: [label] }, 1);
  const both = await graph({ tokens: [...tokens, ...tokens], labels: [label, page.null_label] }, 2);
  const half = both.length / 2, weight = round(round(1 + scale) - 1);
  return both.subarray(0, half).map((value, k) => value + round(weight * round(value - both[half + k])));
};

// Pictures

async function toPixels(page, decoder, tokens) { // RGBA, rounded as in Python
  const values = await decoder({ tokens }, 1), [height, width] = page.image_size, area = height * width;
  const image = new ImageData(width, height);
  for (let k = 0; k < area; k++) {
    for (let c = 0; c < 3; c++) image.data[4 * k + c] = values[(page.channels === 3 ? c : 0) * area + k];
    image.data[4 * k + 3] = 255;
  }
  return image;
}

const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

function draw(page, canvas, frame, { painted = new Set(), cursor = -1, showsConfidence = false } = {}) {
  const [height, width] = page.image_size, scale = Math.ceil(420 / Math.max(height, width)), side = page.token_size * scale;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  const cells = (chosen, paint) => page.cells.forEach(([x, y], n) => chosen(n) && paint(x * side, y * side, n));
  const outline = (chosen, color, line) => {
    Object.assign(context, { strokeStyle: color, lineWidth: line });
    cells(chosen, (x, y) => context.strokeRect(x + line / 2, y + line / 2, side - line, side - line));
  };
  const fill = (chosen, color) => cells(chosen, (x, y, n) => {
    context.fillStyle = color(n);
    context.fillRect(x, y, side, side);
  });
  if (frame && !showsConfidence) {
    const small = new OffscreenCanvas(width, height);
    small.getContext("2d").putImageData(frame.image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    fill((n) => frame.masked[n], () => page.colors.masked);
    outline((n) => frame.masked[n], "#fff", 1);
    if (frame.left > 0) outline((n) => frame.before[n] && !frame.masked[n], page.colors.new, 3); // the result has none
  } else if (frame) {
    const top = Math.max(1e-9, ...frame.confidence.filter((_, n) => frame.isFree[n]));
    fill(() => true, (n) => !frame.isFree[n] ? "#fff" : VIRIDIS[Math.min(9, Math.floor(10 * frame.confidence[n] / top))]);
  }
  context.globalAlpha = 0.55;
  fill((n) => painted.has(n), () => page.colors.painted);
  context.globalAlpha = 1;
  outline((n) => n === cursor, "#000", 3);
}

// The page

async function open() {
  const answer = await fetch("model.json").catch(() => null);
  if (!answer?.ok) throw new Error("model.json is missing. Open the folder through a web server: python -m http.server");
  const page = await answer.json(), [model, student] = page.models, [rows, columns] = page.grid;
  page.cells = Array.from({ length: rows * columns }, (_, n) => [n % columns, Math.floor(n / columns)]);
  const graphs = await loadGraphs(page);
  const networks = [model, student].map((_, k) => guidedBy(page, graphs[["transformer", "student"][k]]));
  const state = { frames: [], position: 0, painted: new Set(), cursor: 0, timer: 0 };
  const allMasked = () => page.cells.map(() => page.mask_token_id);
  fillFields(page, model);

  const show = () => {
    const frame = state.frames[state.position], isEditing = document.activeElement === element("picture");
    draw(page, element("picture"), frame, {
      painted: state.painted, cursor: isEditing ? state.cursor : -1, showsConfidence: element("confidence").checked,
    });
    element("position").max = Math.max(0, state.frames.length - 1);
    element("position").value = state.position;
    element("scale").hidden = !element("confidence").checked;
    element("fill").disabled = element("clear").disabled = state.painted.size === 0;
    if (frame) element("caption").textContent = `Step ${frame.step + 1} of ${frame.steps}: ${frame.left} of ${page.cells.length} tokens masked${frame.left ? "" : state.took}`;
  };

  const run = async (which, start, settings, isStale, use) => { // the time of drawing is not counted
    let milliseconds = 0, begin = performance.now();
    for await (const step of decode(page, page.models[which], networks[which], start, settings)) {
      step.image = await toPixels(page, graphs["tokenizer-decoder"], step.tokens);
      milliseconds += performance.now() - begin;
      use(step, milliseconds);
      await new Promise((resolve) => setTimeout(resolve)); // the browser draws
      if (isStale()) return;
      begin = performance.now();
    }
  };

  const decodeInto = async (start, isStale) => {
    state.frames = [];
    clearInterval(state.timer);
    await run(0, start, readFields(), isStale, (frame, milliseconds) => {
      state.frames.push(frame);
      state.position = state.frames.length - 1;
      state.took = `, ${milliseconds.toFixed(0)} ms`;
      show();
    });
    if (!isStale()) document.body.dataset.done = Number(document.body.dataset.done ?? 0) + 1;
  };

  const decodeStudent = (isStale) => run(1, allMasked(), { ...readFields(), ...settingsOf(student) }, isStale, (frame, milliseconds) => {
    element("student-figure").hidden = false;
    draw(page, element("student"), { ...frame, masked: [], left: 0 });
    element("student-caption").textContent = `Student, ${frame.steps} step${frame.steps > 1 ? "s" : ""}: ${milliseconds.toFixed(0)} ms`;
  });

  let wanted = null, isBusy = false; // only the newest request is computed
  const request = async (task) => {
    wanted = task;
    if (isBusy) return;
    isBusy = true;
    while (wanted) {
      const next = wanted;
      wanted = null;
      await next(() => wanted !== null).catch(report);
    }
    isBusy = false;
  };
  const generate = (withTeacher) => request(async (isStale) => {
    if (student) await decodeStudent(() => false);
    if (withTeacher && !isStale()) await decodeInto(allMasked(), isStale);
  });

  const settings = element("settings");
  settings.addEventListener("submit", (event) => event.preventDefault());
  settings.addEventListener("input", (event) => {
    showNumbers();
    if (student && ["seed", "label"].includes(event.target.id) && state.painted.size === 0) generate(false);
  });
  settings.addEventListener("change", () => settings.reportValidity() && state.painted.size === 0 && generate(true));
  element("reset").onclick = () => { fillFields(page, model, true); generate(true); };
  element("position").oninput = (event) => { clearInterval(state.timer); state.position = Number(event.target.value); show(); };
  const move = (by) => {
    state.position = Math.max(0, Math.min(state.frames.length - 1, state.position + by));
    show();
  };
  element("back").onclick = () => move(-1);
  element("forward").onclick = () => move(1);
  element("play").onclick = () => {
    clearInterval(state.timer);
    state.position = 0;
    show();
    state.timer = setInterval(() => state.position < state.frames.length - 1 ? move(1) : clearInterval(state.timer), 500);
  };
  element("confidence").onchange = show;
  element("clear").onclick = () => { state.painted.clear(); show(); };
  element("fill").onclick = () => {
    const known = state.frames.at(-1).tokens, painted = new Set(state.painted);
    state.painted.clear();
    request((isStale) => decodeInto(known.map((token, n) => painted.has(n) ? page.mask_token_id : token), isStale));
  };

  const picture = element("picture");
  const paintAt = (event) => {
    const box = picture.getBoundingClientRect(), [height, width] = page.image_size;
    const column = Math.floor((event.clientX - box.left) / box.width * width / page.token_size);
    const row = Math.floor((event.clientY - box.top) / box.height * height / page.token_size);
    if (row < 0 || row >= rows || column < 0 || column >= columns) return;
    state.painted.add(row * columns + column);
    move(state.frames.length); // the brush works on the image, not on a step
  };
  picture.onpointerdown = (event) => { picture.setPointerCapture(event.pointerId); paintAt(event); };
  picture.onpointermove = (event) => event.buttons && paintAt(event);
  picture.onfocus = picture.onblur = show;
  picture.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (by === undefined && event.key !== " ") return;
    event.preventDefault();
    if (by === undefined) state.painted.delete(state.cursor) || state.painted.add(state.cursor);
    else state.cursor = (state.cursor + by + page.cells.length) % page.cells.length;
    move(state.frames.length);
  };
  await generate(true);
}

const settingsOf = (model) => ({
  steps: model.num_steps, schedule: Object.keys(model.schedules)[0], guidance: model.guidance_scale,
  choice: model.choice_temperature, first: model.sampling_temperature[0], last: model.sampling_temperature[1],
});

function fillFields(page, model, isReset = false) {
  const fields = settingsOf(model);
  if (!isReset) {
    document.title = `MaskGIT ${page.name}`;
    element("name").textContent = page.name;
    element("footer").textContent = page.license ? `License of the model: ${page.license}` : "";
    const labels = [...page.class_names.entries(), ...(page.null_label === null ? [] : [[page.null_label, "(no class)"]])];
    element("label").replaceChildren(...labels.map(([label, name]) => new Option(name, label)));
    element("schedule").replaceChildren(...Object.keys(model.schedules).map((name) => new Option(name)));
    element("steps").max = model.guidance.length;
    element("guidance").disabled = page.null_label === null;
    const [masked, fresh, painted] = document.querySelectorAll(".swatch");
    Object.assign(masked.style, { background: page.colors.masked, borderColor: page.colors.masked });
    Object.assign(fresh.style, { borderColor: page.colors.new });
    Object.assign(painted.style, { background: page.colors.painted, borderColor: page.colors.painted });
  }
  for (const [name, value] of Object.entries(fields)) element(name).value = value;
  showNumbers();
}

function showNumbers() {
  for (const name of ["seed", "steps"]) element(`${name}-shown`).value = element(name).value;
}

const readFields = () => ({
  ...Object.fromEntries(["label", "seed", "steps", "guidance", "choice", "first", "last"].map((name) => [name, Number(element(name).value)])),
  schedule: element("schedule").value,
});

function report(error) {
  element("error").hidden = false;
  element("error").textContent = error.message;
  element("caption").textContent = "";
}

open().catch(report);
