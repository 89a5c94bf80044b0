// The γ editor: shows and edits props.value, the text of a schedule such as "power:2" or "knots:0=1,0.4=0.7,1=0".
// The server parses that text again (rewardiv.gamma); nothing here is trusted. γ is the base model's share.
const WIDTH = 340, HEIGHT = 156, LEFT = 4, TOP = 6;
const SHAPES = {
  power: { params: [{ key: "P", start: 2, min: 0.25, max: 8, step: 0.25, low: "hands over early", high: "stays with base → more variety" }] },
  linear: { params: [] },
  cosine: { params: [] },
  sigmoid: {
    params: [
      { key: "K", start: 12, min: 1, max: 40, step: 1, low: "hands over gently", high: "abruptly" },
      { key: "C", start: 0.5, min: 0.05, max: 0.95, step: 0.05, low: "hands over early", high: "late → more variety" },
    ],
  },
  step: { params: [{ key: "F", start: 0.5, min: 0, max: 1, step: 0.05, low: "switches early", high: "switches late → more variety" }] },
  knots: { params: [] },
};
const MIN_GAP = 0.02, MAX_KNOTS = 12, NUDGE = 0.02;

let state = parse(props.value);

function parse(text) {
  const [body, domain] = String(text ?? "").split("@");
  const [shape, ...rest] = body.split(":");
  if (!(shape in SHAPES)) return { shape: "power", params: [2], knots: [], domain: "" };
  const knots = shape === "knots" ? rest.join(":").split(",").map((pair) => pair.split("=").map(Number)) : [];
  return { shape, params: shape === "knots" ? [] : rest.map(Number), knots, domain: domain ? "@" + domain : "" };
}

function format({ shape, params, knots, domain }) {
  const short = (value) => String(+value.toFixed(3));
  const rest = shape === "knots" ? [knots.map(([x, y]) => `${short(x)}=${short(y)}`).join(",")] : params.map(short);
  return [shape, ...rest].join(":") + domain;
}

function gamma(progress) {
  const [a, b] = state.params;
  switch (state.shape) {
    case "linear": return 1 - progress;
    case "power": return 1 - progress ** a;
    case "cosine": return (1 + Math.cos(Math.PI * progress)) / 2;
    case "step": return progress >= a ? 0 : 1;
    case "sigmoid": {
      const [start, here, end] = [0, progress, 1].map((x) => Math.tanh((a * (b - x)) / 2));
      return (here - end) / (start - end);
    }
    default: return pchip(progress, state.knots);
  }
}

function pchip(x, knots) { // monotone cubic of Fritsch and Butland, as rewardiv.gamma
  const n = knots.length;
  const widths = knots.slice(1).map((knot, k) => knot[0] - knots[k][0]);
  const secants = knots.slice(1).map((knot, k) => (knot[1] - knots[k][1]) / widths[k]);
  const end = (h0, h1, s0, s1) => {
    const slope = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1);
    return slope * s0 <= 0 ? 0 : slope;
  };
  const slopes = knots.map((_, k) => {
    if (n === 2) return secants[0];
    if (k === 0) return end(widths[0], widths[1], secants[0], secants[1]);
    if (k === n - 1) return end(widths[n - 2], widths[n - 3], secants[n - 2], secants[n - 3]);
    const [before, after] = [secants[k - 1], secants[k]];
    if (before * after <= 0) return 0;
    const [near, far] = [2 * widths[k] + widths[k - 1], widths[k] + 2 * widths[k - 1]];
    return (near + far) / (near / before + far / after);
  });
  let k = 0;
  while (k < n - 2 && x > knots[k + 1][0]) k++;
  const s = (x - knots[k][0]) / widths[k];
  const value = (1 + 2 * s) * (1 - s) ** 2 * knots[k][1] + s * s * (3 - 2 * s) * knots[k + 1][1]
    + widths[k] * s * (1 - s) * ((1 - s) * slopes[k] - s * slopes[k + 1]);
  return Math.min(Math.max(value, knots[k + 1][1]), knots[k][1]);
}

const toX = (progress) => LEFT + progress * WIDTH;
const toY = (share) => TOP + (1 - share) * HEIGHT;

function curve() {
  const points = [];
  for (let i = 0; i <= 200; i++) points.push([i / 200, gamma(i / 200)]);
  return points;
}

function handles() { // knots of a drawn curve; for the other shapes, where it would get them
  if (state.shape === "knots") return state.knots;
  if (state.shape === "step") {
    const f = Math.min(Math.max(state.params[0], 2 * MIN_GAP), 1 - 2 * MIN_GAP);
    return [[0, 1], [f - MIN_GAP / 2, 1], [f + MIN_GAP / 2, 0], [1, 0]];
  }
  return [0, 0.25, 0.5, 0.75, 1].map((x) => [x, x === 0 ? 1 : x === 1 ? 0 : gamma(x)]);
}

function svg() {
  const line = curve().map(([x, y]) => `${toX(x).toFixed(1)},${toY(y).toFixed(1)}`).join(" ");
  const floor = `${toX(1)},${toY(0)} ${toX(0)},${toY(0)}`;
  const ceiling = `${toX(1)},${toY(1)} ${toX(0)},${toY(1)}`;
  const knots = handles().map(([x, y], k, all) => {
    const fixed = k === 0 || k === all.length - 1;
    const label = `knot at ${Math.round(100 * x)} % of the way, ${Math.round(100 * y)} % base; arrow keys move it, Delete removes it`;
    const keys = fixed ? 'class="rd-knot rd-fixed"'
      : `class="rd-knot" tabindex="0" role="slider" aria-valuemin="0" aria-valuemax="100" aria-valuenow="${Math.round(100 * y)}" aria-label="${label}"`;
    return `<circle ${keys} data-k="${k}" cx="${toX(x)}" cy="${toY(y)}" r="${fixed ? 3.5 : 6.5}"/>`;
  });
  return `<polygon class="rd-share-base" points="${line} ${floor}"/><polygon class="rd-share-finetuned" points="${line} ${ceiling}"/>
    <polyline class="rd-curve" points="${line}"/>
    <text x="${toX(0.03)}" y="${toY(0.06)}">base model</text>
    <text x="${toX(0.97)}" y="${toY(0.9)}" text-anchor="end">finetuned</text>${knots.join("")}`;
}

function sliders() {
  return SHAPES[state.shape].params.map((param, k) => `
    <label class="rd-gamma-slider"><span>${param.low}</span>
      <input type="range" data-param="${k}" min="${param.min}" max="${param.max}" step="${param.step}" value="${state.params[k]}"
        aria-label="${param.key}: from ${param.low} to ${param.high}">
      <span>${param.high}</span><output>${param.key} = ${+state.params[k].toFixed(3)}</output></label>`).join("");
}

function render() {
  const share = Math.round(100 * curve().reduce((sum, [, y]) => sum + y, 0) / 201);
  element.querySelector(".rd-gamma-plot").innerHTML = svg();
  element.querySelector(".rd-gamma-say").textContent = `The base model steers ${share} % of the way. More means more variety, less means more reward.`;
  element.querySelector(".rd-gamma-text").textContent = "γ = " + format(state);
  for (const chip of element.querySelectorAll("[data-shape]")) chip.setAttribute("aria-pressed", chip.dataset.shape === state.shape);
  element.querySelector(".rd-gamma-knots").hidden = state.shape !== "knots";
}

function renderAll() {
  element.querySelector(".rd-gamma-sliders").innerHTML = sliders();
  render();
}

function commit() {
  props.value = format(state);
  trigger("change");
}

function choose(shape) {
  const knots = shape === "knots" ? handles().map((knot) => [...knot]) : [];
  state = { ...state, shape, params: SHAPES[shape].params.map((param) => param.start), knots };
  renderAll();
  commit();
}

function moveKnot(k, x, y) { // stays between its neighbours, so the curve can never rise
  const [before, after] = [state.knots[k - 1], state.knots[k + 1]];
  state.knots[k] = [
    Math.min(Math.max(x, before[0] + MIN_GAP), after[0] - MIN_GAP),
    Math.min(Math.max(y, after[1]), before[1]),
  ];
  render();
}

function addKnot(x) {
  const near = state.knots.some((knot) => Math.abs(knot[0] - x) < 2 * MIN_GAP);
  if (near || state.knots.length >= MAX_KNOTS) return;
  state.knots.push([x, gamma(x)]);
  state.knots.sort((a, b) => a[0] - b[0]);
  render();
  commit();
}

function widestGap() {
  const gaps = state.knots.slice(1).map((knot, k) => [knot[0] - state.knots[k][0], (knot[0] + state.knots[k][0]) / 2]);
  return gaps.sort((a, b) => b[0] - a[0])[0][1];
}

function removeKnot(k) {
  if (k <= 0 || k >= state.knots.length - 1) return;
  state.knots.splice(k, 1);
  render();
  commit();
}

function toKnots() {
  if (state.shape !== "knots") choose("knots");
}

function place(event) {
  const plot = element.querySelector(".rd-gamma-plot");
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
  return [(at.x - LEFT) / WIDTH, 1 - (at.y - TOP) / HEIGHT];
}

function drag(event) {
  const [x, y] = place(event);
  toKnots();
  const inner = state.knots.map((knot, k) => [Math.hypot((knot[0] - x) * WIDTH, (knot[1] - y) * HEIGHT), k]).slice(1, -1);
  const [distance, k] = inner.sort((a, b) => a[0] - b[0])[0] ?? [Infinity, -1];
  if (distance > 60) return;
  const plot = element.querySelector(".rd-gamma-plot");
  plot.setPointerCapture(event.pointerId);
  const move = (moved) => moveKnot(k, ...place(moved));
  plot.addEventListener("pointermove", move);
  plot.addEventListener("lostpointercapture", () => { plot.removeEventListener("pointermove", move); commit(); }, { once: true });
  event.preventDefault();
}

function keyed(event) {
  const k = Number(event.target.dataset?.k ?? -1);
  const by = event.shiftKey ? 5 * NUDGE : NUDGE;
  const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, by], ArrowDown: [0, -by] };
  const remove = event.key === "Delete" || event.key === "Backspace";
  if (k < 0 || !(event.key in moves || remove)) return;
  event.preventDefault();
  toKnots();
  if (remove) return removeKnot(k);
  moveKnot(k, state.knots[k][0] + moves[event.key][0], state.knots[k][1] + moves[event.key][1]);
  commit();
  element.querySelector(`[data-k="${k}"]`)?.focus();
}

element.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-shape]");
  if (chip) choose(chip.dataset.shape);
  if (event.target.closest("[data-add-knot]")) addKnot(widestGap());
});
element.addEventListener("input", (event) => {
  if (event.target.dataset.param === undefined) return;
  state.params[Number(event.target.dataset.param)] = Number(event.target.value);
  const { key } = SHAPES[state.shape].params[Number(event.target.dataset.param)];
  event.target.closest("label").querySelector("output").textContent = `${key} = ${event.target.value}`;
  render();
});
element.addEventListener("change", (event) => { if (event.target.dataset.param !== undefined) commit(); });
const plot = element.querySelector(".rd-gamma-plot");
plot.addEventListener("pointerdown", drag);
plot.addEventListener("dblclick", (event) => { toKnots(); addKnot(place(event)[0]); });
plot.addEventListener("keydown", keyed);
watch("value", () => {
  if (props.value === format(state)) return;
  state = parse(props.value);
  renderAll();
});
renderAll();
