"""Draw the pictures of docs/concepts.md: ``python docs/pictures/draw.py`` writes the SVG files beside it.

Each file has its light and its dark colours, chosen by ``prefers-color-scheme``, and asks for nothing else: it is
shown on GitHub as on the site.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = """
  :root { --ink: #1f2328; --soft: #59636e; --line: #818b98; --paper: #ffffff; --box: #f3f5f8; --edge: #c4ccd6;
          --hot: #b3401a; --hot-box: #fde5da; --warm: #8a6100; --warm-box: #fff3cd; --good: #17703c; --good-box: #ddf4e4; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6edf3; --soft: #9da7b3; --line: #7d8793; --paper: #14181d; --box: #212830; --edge: #444e59;
            --hot: #ff9a70; --hot-box: #4a2316; --warm: #f0c75e; --warm-box: #3f3312; --good: #6fd492; --good-box: #173823; }
  }
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
  .small { font-size: 12px; fill: var(--soft); }
  .bold { font-weight: 600; }
  .mono { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 12.5px; }
  .paper { fill: var(--paper); }
  .plain { fill: var(--box); stroke: var(--edge); }
  .faint { fill: none; stroke: var(--edge); stroke-dasharray: 4 3; }
  .hot { fill: var(--hot-box); stroke: var(--hot); stroke-width: 2; }
  .warm { fill: var(--warm-box); stroke: var(--warm); }
  .good { fill: var(--good-box); stroke: var(--good); }
  .ink-hot { fill: var(--hot); } .ink-warm { fill: var(--warm); } .ink-good { fill: var(--good); }
  .arrow { stroke: var(--line); stroke-width: 1.5; fill: none; marker-end: url(#head); }
  .arrow-hot { stroke: var(--hot); stroke-width: 2.5; fill: none; marker-end: url(#head-hot); }
"""


class Picture:
    """An SVG picture, put together piece by piece; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.size = width, height
        self.parts = [f"<title>{escape(title)}</title>", f"<desc>{escape(description)}</desc>"]
        self.parts.append(f'<rect class="paper" width="{width}" height="{height}" rx="6"/>')

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "plain", ink: str = "") -> None:
        """Draw a box with centred lines of text."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5"/>')
        for number, line in enumerate(lines):
            middle = y + h / 2 + 5 + (number - (len(lines) - 1) / 2) * 17
            self.text(x + w / 2, middle, line, ink if number == 0 else f"{ink} small".replace("bold", ""), "middle")

    def text(self, x: float, y: float, line: str, kind: str = "", anchor: str = "start") -> None:
        """Write one line; ``y`` is its base line."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" xml:space="preserve">{escape(line)}</text>'
        )

    def lines(self, x: float, y: float, *lines: str) -> None:
        """Write small lines below each other; ``y`` is the base line of the first."""
        for number, line in enumerate(lines):
            self.text(x, y + number * 16, line, "small")

    def column(self, x: float, head: str, below: str) -> None:
        """Write the head of a column, and what explains it."""
        self.text(x, 30, head, "bold")
        self.text(x, 48, below, "small")

    def arrow(self, *points: tuple[float, float], kind: str = "arrow") -> None:
        """Draw a line through points with a head at its end."""
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M {path}"/>')

    def svg(self) -> str:
        """Return the file."""
        width, height = self.size
        head = '<path d="M 0 0 L 8 4 L 0 8 z" style="fill: var(--{})"/>'
        marker = '<marker id="{}" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto" markerUnits="userSpaceOnUse">'
        markers = "".join(
            f"{marker.format(name)}{head.format(colour)}</marker>"
            for name, colour in (("head", "line"), ("head-hot", "hot"))
        )
        start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        return "\n".join([start, f"<style>{STYLE}</style>", f"<defs>{markers}</defs>", *self.parts, "</svg>", ""])


def flip_one_op() -> Picture:
    """Show what is computed again for one op."""
    p = Picture(
        760,
        262,
        "One op is quantized, and what is downstream of it runs again",
        "A small attention block. k_proj is quantized. The embedding before it and q_proj beside it are not computed "
        "again; attention, o_proj, the MLP and the head are. The distance of the output to the reference is the score.",
    )
    p.box(20, 80, 80, 42, "embed")
    p.box(140, 44, 84, 42, "q_proj")
    p.box(140, 116, 84, 42, "k_proj", kind="hot", ink="ink-hot bold")
    p.arrow((100, 94), (120, 94), (120, 65), (138, 65))
    p.arrow((100, 108), (120, 108), (120, 137), (138, 137))
    chain = ("attention", "o_proj", "mlp", "head")
    for number, name in enumerate(chain):
        p.box(268 + number * 100, 80, 78, 42, name, kind="warm", ink="ink-warm")
        p.arrow((346 + number * 100, 101), (366 + number * 100, 101), kind="arrow-hot")
    p.box(668, 80, 76, 42, "output")
    p.arrow((224, 65), (246, 65), (246, 94), (266, 94))
    p.arrow((224, 137), (246, 137), (246, 108), (266, 108), kind="arrow-hot")
    p.text(20, 26, "Not downstream of it: values of the unquantized run, computed once for all ops")
    p.text(182, 182, "its weight and", "ink-hot", "middle")
    p.text(182, 200, "input are rounded", "ink-hot", "middle")
    p.text(457, 152, "what reads a changed value runs again", "ink-warm", "middle")
    p.box(628, 196, 116, 36, "reference", kind="faint")
    p.arrow((706, 194), (706, 125))
    p.text(618, 219, "nmse = Σ (output − reference)² / Σ reference²", "mono", "end")
    return p


def modes() -> Picture:
    """Show what is quantized in each mode."""
    p = Picture(
        760,
        270,
        "Modes isolated and fallback",
        "Isolated: of six ops only the third is quantized. Total: all are. Fallback: all but the third are. The gain of "
        "an op is the error of the total minus that of the fallback.",
    )
    rows = (
        ("isolated", "what does this op do alone?", "--#---", "nmse: higher, more sensitive"),
        ("total", "what does the whole scheme do?", "######", "nmse of everything quantized"),
        ("fallback", "what if this op stays in fp32?", "##-###", "nmse: lower, more sensitive"),
    )
    for number, (name, question, pattern, reading) in enumerate(rows):
        y = 24 + number * 66
        p.text(20, y + 18, name, "bold")
        p.text(20, y + 36, question, "small")
        for column, mark in enumerate(pattern):
            quantized = mark == "#"
            p.box(
                232 + column * 42,
                y,
                34,
                40,
                "8" if quantized else "32",
                kind="hot" if quantized else "plain",
                ink="ink-hot bold" if quantized else "small",
            )
        p.arrow((486, y + 20), (512, y + 20))
        p.text(522, y + 25, reading)
    p.parts.append('<rect class="faint" x="308" y="14" width="50" height="192" rx="5"/>')
    p.text(333, 222, "the op", "small", "middle")
    p.text(522, 222, "gain = total − fallback", "mono")
    p.text(522, 242, "higher: fp32 helps more here", "small")
    p.box(20, 236, 18, 18, kind="hot")
    p.text(46, 250, "quantized", "small")
    p.box(120, 236, 18, 18)
    p.text(146, 250, "as it was", "small")
    return p


def side_by_side() -> Picture:
    """Show how engine delta computes the ops of a block together."""
    p = Picture(
        760,
        350,
        "Engine delta takes the ops of a block through the graph together",
        "Four ops of one block are quantized one at a time, each in a lane of its own. In a linear layer only the "
        "differences go through one matrix product; in other layers each lane is computed with its whole values. Every "
        "lane ends in the error of its op.",
    )
    lanes = ("q_proj", "k_proj", "v_proj", "o_proj")
    p.column(20, "a block's ops,", "each quantized alone")
    p.column(190, "linear layer", "one product for all lanes")
    p.column(386, "anything else", "each lane with its values")
    p.column(572, "last layer", "no logits are made")
    for number, name in enumerate(lanes):
        y = 68 + number * 44
        p.box(20, y, 84, 32, name, kind="hot", ink="ink-hot")
        p.arrow((104, y + 16), (128, y + 16), kind="arrow-hot")
        p.text(146, y + 21, f"δ{'₁₂₃₄'[number]}", "ink-hot bold", "middle")
        p.arrow((164, y + 16), (188, y + 16), kind="arrow-hot")
        p.arrow((360, y + 16), (384, y + 16), kind="arrow-hot")
        p.arrow((546, y + 16), (570, y + 16), kind="arrow-hot")
        p.arrow((676, y + 16), (696, y + 16))
        p.text(702, y + 21, "nmse", "mono")
    linear = (
        "y + W · [δ₁ δ₂ δ₃ δ₄]",
        "in a difference nothing",
        "cancels: bf16 where the",
        "CPU and the weight have it",
    )
    p.box(190, 62, 170, 176, *linear, kind="warm", ink="ink-warm")
    other = ("f(x + δᵢ)", "activations, norms,", "attention, in-place", "writes: as in a replay")
    p.box(386, 62, 160, 176, *other, kind="warm", ink="ink-warm")
    p.box(572, 62, 104, 176, "δᵀ (WᵀW) δ", "WᵀW: the Gram", "matrix of the", "last layer", kind="warm", ink="ink-warm")
    p.box(20, 262, 656, 32, "clean values x, y of the unquantized model: one run, shared by all lanes and blocks")
    for x in (275, 466, 624):
        p.arrow((x, 260), (x, 241))
    p.lines(
        20,
        322,
        "The first op and the last but one are also replayed exactly. If the two do not agree, all ops are replayed,",
        "and the summary says why.",
    )
    return p


def gate() -> Picture:
    """Show how a score is judged by its snapshot."""
    p = Picture(
        760,
        330,
        "The snapshot gate",
        "An op is measured and compared with its line in the committed snapshot. Better or the same passes. Worse than "
        "the threshold, or new, fails: somebody repairs the cause, or accepts the new score with --snapshot-update, "
        "which is reviewed as a change of a file.",
    )
    p.box(20, 60, 130, 56, "measure the op", "or its cached score")
    p.box(200, 60, 170, 56, "worse by more than", "threshold and noise?", kind="warm", ink="ink-warm")
    p.box(200, 176, 170, 56, "snapshot, committed", "one line for each op")
    p.arrow((150, 88), (198, 88))
    p.arrow((285, 174), (285, 119))
    p.box(440, 20, 130, 50, "pass", "the same, or better", kind="good", ink="ink-good bold")
    p.box(440, 108, 130, 50, "fail", "worse, or new", kind="hot", ink="ink-hot bold")
    p.arrow((370, 78), (404, 78), (404, 45), (437, 45))
    p.arrow((370, 98), (404, 98), (404, 133), (437, 133), kind="arrow-hot")
    p.lines(586, 42, "exit code 0", "recorded by an update")
    p.lines(586, 130, "exit code 1: op, metric, old", "and new value, the limit")
    p.arrow((505, 160), (505, 182))
    p.text(505, 200, "somebody decides", "bold", "middle")
    p.box(420, 246, 152, 52, "--snapshot-update", "accept it")
    p.box(590, 246, 156, 52, "repair the cause", "or keep the op in fp32")
    p.arrow((480, 208), (480, 243))
    p.arrow((540, 208), (540, 226), (668, 226), (668, 243))
    p.arrow((418, 272), (285, 272), (285, 235))
    p.lines(20, 264, "a change of lines in a file,", "reviewed like code; in CI", "nothing is ever updated unasked")
    return p


PICTURES = {"flip-one-op": flip_one_op, "modes": modes, "side-by-side": side_by_side, "gate": gate}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
