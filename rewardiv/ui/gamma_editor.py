"""The γ editor: choose a shape, slide its numbers or drag the knots of the curve; its value is the schedule's text."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from rewardiv.ui.form import DEFAULT_GAMMA

SHAPES = {
    "power": "Power",
    "linear": "Linear",
    "cosine": "Cosine",
    "sigmoid": "Sigmoid",
    "step": "Switch",
    "knots": "Drawn",
}
SCRIPT = Path(__file__).with_name("gamma_editor.js")


def gamma_editor(value: str = DEFAULT_GAMMA, **settings: object) -> gr.HTML:
    """An editable γ curve. The browser may send anything as its value: parse it with `rewardiv.gamma.parse_gamma`."""
    return gr.HTML(value, html_template=_template(), js_on_load=SCRIPT.read_text(), apply_default_css=False, **settings)


def _template() -> str:
    """Everything that doesn't depend on the value; the script draws the rest, so that a new value moves no element."""
    chips = "".join(f'<button type="button" data-shape="{shape}">{name}</button>' for shape, name in SHAPES.items())
    return f"""
<div class="rd-gamma" role="group" aria-label="How AIG goes from the base to the finetuned model">
  <div class="rd-gamma-head"><strong>From base to finetuned</strong>
    <span class="rd-gamma-note">who steers AIG on the way from noise to image</span></div>
  <div class="rd-chips" role="group" aria-label="Shape">{chips}</div>
  <svg class="rd-gamma-plot" viewBox="0 0 348 168" role="group" aria-label="γ curve"></svg>
  <div class="rd-gamma-axis"><span>noise</span><span>image</span></div>
  <p class="rd-gamma-say"></p>
  <div class="rd-gamma-sliders"></div>
  <div class="rd-gamma-foot"><code class="rd-gamma-text"></code>
    <span class="rd-gamma-hint">drag the dots</span>
    <button type="button" class="rd-gamma-knots" data-add-knot hidden>add a knot</button></div>
</div>"""
