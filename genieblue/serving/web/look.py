"""How the page looks: its style, and the remarks under an answer as HTML."""

from html import escape

from genieblue.serving.web.answers import BASE_ALONE, Progress
from modeling_genieblue.view_routing_genieblue import MULTIMODAL, TEXT

NAMES = {TEXT: "text view", MULTIMODAL: "multimodal view"}
COLORS = {TEXT: "#1d6fb8", MULTIMODAL: "#b4471a", BASE_ALONE: "#3f7a4d"}
OTHER_COLOR = "#5c6670"
# The panel under a message has a button that sends pictures to the Hub, for which Gradio has no switch.
STYLE = """
.gradio-container { max-width: 1180px !important; margin: auto !important; }
.gb-remark { font-size: 13px; line-height: 1.8; color: color-mix(in srgb, var(--body-text-color) 70%, transparent); }
.gb-remark b { color: white; font-weight: 600; padding: 2px 9px; border-radius: 10px; white-space: nowrap; }
.message img { max-height: 200px; max-width: 100%; width: auto; object-fit: contain; margin: 0 !important; }
.message .image-frame { justify-content: flex-start; }
.message-content * { white-space: pre-wrap !important; }
.message-buttons { display: none !important; }
"""


def remark(text: str) -> str:
    """What is no part of an answer, in small print."""
    return f'<div class="gb-remark">{escape(text)}</div>'


def facts(progress: Progress, max_new_tokens: int) -> str:
    """Of an answer that has ended: the view that ran, the tokens, and how many a second; or that it was stopped."""
    if progress.result is None:
        return remark("Stopped: this turn is not part of the conversation.")
    view, prompt, count = (progress.result[key] for key in ("view", "prompt_tokens", "generated_tokens"))
    badge = f'<b style="background: {COLORS.get(view, OTHER_COLOR)}">{escape(NAMES.get(view, view))}</b>'
    seconds = f"{progress.seconds:.1f} s"
    if count is None:
        words = f"{seconds}; the server does not count tokens"
    else:
        speed = f"{count / max(progress.seconds, 1e-6):.1f} tokens/s"
        words = f"{prompt} prompt tokens · {count} generated in {seconds} · {speed}"
        words += ", cut off at the limit" if count >= max_new_tokens else ""
    return f'<div class="gb-remark">{badge} {words}</div>'
