"""The strip of this session's runs: a click shows one again."""

from __future__ import annotations

import html
from collections.abc import Sequence

import gradio as gr

from rewardiv.ui.session import View

SCRIPT = """
element.addEventListener("click", (event) => {
  const card = event.target.closest("[data-index]");
  if (card) trigger("show", { index: Number(card.dataset.index) });
});
"""


def history_strip(**settings: object) -> gr.HTML:
    """Cards of earlier runs; its event `show` carries the index of the card that was clicked."""
    return gr.HTML(js_on_load=SCRIPT, apply_default_css=False, **settings)


def history_html(views: Sequence[View]) -> str:
    """Cards for `views`, newest first; nothing where there are none."""
    if not views:
        return ""
    cards = "".join(_card_html(index, view) for index, view in reversed(list(enumerate(views))))
    return f'<h3 class="rd-title">This session\'s runs</h3><div class="rd-history">{cards}</div>'


def _card_html(index: int, view: View) -> str:
    pictures = "".join(f'<img alt="" src="{uri}">' for uri in view.thumbnails)
    return f"""<button type="button" data-index="{index}"><span class="rd-thumbs">{pictures}</span>
<span><strong>{html.escape(view.title)}</strong><small>{html.escape(view.note)}</small></span></button>"""
