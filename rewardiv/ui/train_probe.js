// The probe viewer: props.value is JSON of probes (step, url, caption, checkpoint), drawn into a fixed template, so that
// a new value moves no element. The slider follows the newest probe until it is moved.
const find = (selector) => element.querySelector(selector);
const slider = find("input"), section = find(".rd-probe");
const [baseFigure, nowFigure] = element.querySelectorAll("figure");
let data = { run: null, probes: [] }, following = true;

function read() {
  let next;
  try { next = JSON.parse(props.value || "{}"); } catch { next = {}; }
  if (!next.probes?.length) { data = { run: null, probes: [] }; section.hidden = true; return; }
  if (next.run !== data.run) following = true;
  const step = following ? undefined : data.probes[slider.value]?.step;
  data = next;
  const kept = data.probes.findIndex((probe) => probe.step === step);
  slider.max = data.probes.length - 1;
  slider.value = kept >= 0 ? kept : data.probes.length - 1;
  section.hidden = false;
  data.loaded = data.probes.slice(-64).map((probe) => Object.assign(new Image(), { src: probe.url })); // scrubbing waits for nothing
  draw();
}

function put(figure, probe, caption) {
  const picture = figure.querySelector("img");
  if (picture.getAttribute("src") !== probe.url) picture.src = probe.url;
  picture.alt = `${caption}: prompts by seeds`;
  figure.querySelector("a").href = probe.url;
  figure.querySelector("figcaption").textContent = caption;
}

function draw() {
  const at = Number(slider.value), probe = data.probes[at];
  const marks = [probe.step === data.best && "best trade-off", data.onset !== null && probe.step >= data.onset && "collapsing"];
  const title = [`Step ${probe.step}`, ...marks.filter(Boolean)].join(" · ");
  put(baseFigure, data.probes[0], data.probes[0].step === 0 ? "Base model" : `Step ${data.probes[0].step}`);
  put(nowFigure, probe, title);
  slider.dataset.step = probe.step;
  slider.setAttribute("aria-valuetext", `${title}, ${probe.caption}`);
  find("output").textContent = `step ${probe.step}`;
  find(".rd-probe-prompts").textContent = data.prompts;
  const compare = find("[data-compare]"), note = find(".rd-probe-foot small");
  compare.disabled = probe.checkpoint === null;
  const other = probe.checkpoint === probe.step ? "" : probe.checkpoint === null ? "no checkpoint yet" : `checkpoint of step ${probe.checkpoint}`;
  note.textContent = [probe.caption, other].filter(Boolean).join(" · ");
  element.querySelectorAll("[data-move]").forEach((button) => { button.disabled = !data.probes[at + Number(button.dataset.move)]; });
}

function move(to) {
  slider.value = to;
  following = Number(slider.value) === data.probes.length - 1;
  draw();
}

slider.addEventListener("input", () => move(slider.value));
element.addEventListener("rd-show-step", (event) => {
  const at = data.probes.findIndex((probe) => probe.step === event.detail);
  if (at >= 0) { move(at); following = false; }
});
element.addEventListener("click", (event) => {
  const step = event.target.closest("[data-move]");
  if (step) move(Number(slider.value) + Number(step.dataset.move));
  if (event.target.closest("[data-compare]")) trigger("compare", { step: data.probes[slider.value].step });
});
watch("value", read);
read();
