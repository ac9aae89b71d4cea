"""The README's picture: how long the optimizer's part of a training loop takes.

It is written as SVG by hand, so that its text is the same under any version of a
plotting library, and so that it follows the reader's light or dark theme.
"""

from html import escape

from fastopt.bench import report
from fastopt.bench.loop import microseconds

# The bars of a loop, with their classes of colour: torch's names, and fastopt first.
BARS = (
    ("fastopt torch", "fastopt.torch", "ours"),
    ("torch fused", "torch.optim, fused=True", "fused"),
    ("torch default", "torch.optim, default", "default"),
)
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; font-size: 15px; }
.small { font-size: 12px; fill: #57606a; }
.ours { fill: #0969da; } .fused { fill: #8c959f; } .default { fill: #c6cbd1; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .small { fill: #9198a1; }
  .ours { fill: #4493f8; } .fused { fill: #7d8590; } .default { fill: #484f58; }
}
"""
WIDTH, LEFT, RIGHT = 760, 120, 70
BAR, GAP, TOP = 13, 14, 74


def loops(measured):
    """Draw the loops with gradient clipping, in multiples of fastopt's time.

    Parameters
    ----------
    measured : list of fastopt.bench.loop.Measured
        Every loop is drawn to the same scale.

    Returns
    -------
    str
        An SVG file.
    """
    measured = [m for m in measured if m.loop.clip_norm]
    longest = max(m.timings[name].optimizer for m in measured for name, *_ in BARS)
    scale = (WIDTH - LEFT - RIGHT) / longest
    heading = "Adam, clipping and zero_grad in a PyTorch training loop on two cores"
    parts, x, y = [text(0, 18, heading, "title")], 0, TOP
    for _, label, style in BARS:
        parts += [bar(x, 34, 13, style), text(x + 19, 44, label)]
        x += 40 + 7 * len(label)
    for m in measured:
        parts.append(text(0, y + BAR + 8, m.loop.model))
        for name, _, style in BARS:
            timing = m.timings[name]
            length = timing.optimizer * scale
            words = f"{report.multiple(timing.optimizer)} ×"
            if style == "ours":
                words = f"{microseconds(timing.own)} µs"
            parts.append(bar(LEFT, y, length, style))
            parts.append(text(LEFT + length + 6, y + BAR - 3, words, "small"))
            y += BAR
        y += GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" '
        f'width="{WIDTH}" height="{y}" role="img">\n<title>{escape(heading)}</title>\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def bar(x, y, width, style):
    size = f'width="{width:.1f}" height="{BAR - 2}"'
    return f'<rect class="{style}" x="{x}" y="{y}" {size} rx="2"/>'


def text(x, y, words, style=""):
    style = f'class="{style}" ' if style else ""
    return f'<text {style}x="{x:.0f}" y="{y}">{escape(words)}</text>'
