"""Draw ``architecture.svg``, the network and its block; channels and depths are those of the model that timm builds.

    python docs/images/architecture.py

The picture has a background of its own, so that it is legible on any page, and turns dark where the reader's system is.
"""

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

import timm

from models import StripMLPNet

VARIANT = "strip_mlp_tiny"
WIDTH, HEIGHT = 1200, 664
STYLE = """
text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-size: 17px; font-weight: 600; text-anchor: start } .small { font-size: 11px }
.note { font-size: 12px; text-anchor: start }
.page { fill: #ffffff; stroke: #d0d7de } .box { fill: #f6f8fa; stroke: #57606a }
.frame { fill: none; stroke: #8c959f; stroke-dasharray: 5 4 }
.token { fill: #ddf4ff; stroke: #0969da } .local { fill: #dafbe1; stroke: #1a7f37 }
.channel { fill: #fff1e5; stroke: #bc4c00 }
.wire { fill: none; stroke: #57606a; stroke-width: 1.5 } .head { fill: #57606a }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117; stroke: #30363d } .box { fill: #21262d; stroke: #8b949e }
.token { fill: #0c2d6b; stroke: #58a6ff } .local { fill: #0f3d1e; stroke: #3fb950 }
.channel { fill: #4d2100; stroke: #f0883e }
.wire { stroke: #9aa4af } .head { fill: #9aa4af }
}
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Return a line of text whose baseline is at ``y``."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = "box") -> str:
    """Return a rectangle with centred lines of text."""
    first = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
    words = [text(x + width / 2, first + 16 * n, line, "small" if n else "") for n, line in enumerate(lines)]
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>' + "".join(words)


def wire(*points: tuple[float, float], arrow: bool = True) -> str:
    """Return a line through points, with a head at the last one."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{path}" class="wire"{" marker-end=" + chr(34) + "url(#head)" + chr(34) if arrow else ""}/>'
    )


def plus(x: float, y: float) -> str:
    """Return the sign of a sum."""
    cross = wire((x - 5, y), (x + 5, y), arrow=False) + wire((x, y - 5), (x, y + 5), arrow=False)
    return f'<circle cx="{x:g}" cy="{y:g}" r="9" class="box"/>{cross}'


def row(y: float, *parts: tuple[float, float, Sequence[str], str], height: float = 40) -> str:
    """Return boxes (x, width, lines, kind) around the height ``y``, with an arrow from each to the next."""
    drawn = [box(x, y - height / 2, width, height, lines, kind) for x, width, lines, kind in parts]
    pairs = zip(parts, parts[1:], strict=False)
    return "".join(drawn + [wire((one[0] + one[1], y), (two[0], y)) for one, two in pairs])


def network() -> str:
    """Return the upper half: stem, stages with merging, skips, head."""
    model: StripMLPNet = timm.create_model(VARIANT, device="meta")
    sides = [model.img_size[0] // info["reduction"] for info in model.feature_info]
    stages = [
        (f"stage {n + 1}: {len(stage)} blocks", f"{info['num_chs']} × {side} × {side}")
        for n, (stage, info, side) in enumerate(zip(model.stages, model.feature_info, sides, strict=True))
    ]
    patch, y = model.patch_embed.stride[0], 150
    merge = ("merge", "2×2 conv, ½")
    parts = [
        (12, 90, ("image", f"{model.in_chans} × {model.img_size[0]} × {model.img_size[1]}"), "box"),
        (116, 82, ("stem", f"{patch}×{patch} conv, ¼"), "box"),
        (216, 126, stages[0], "token"),
        (360, 82, merge, "box"),
        (466, 126, stages[1], "token"),
        (610, 82, merge, "box"),
        (748, 126, stages[2], "token"),
        (892, 82, merge, "box"),
        (1024, 126, stages[3], "token"),
    ]
    return "".join(
        [
            text(20, 36, f"Strip-MLP-T at {model.img_size[0]} × {model.img_size[1]}", "title"),
            text(330, 36, "channels × rows × columns; ½ halves rows and columns, and doubles the channels", "note"),
            row(y, *parts, height=50),
            wire((454, y), (454, 84), (520, 84), arrow=False),
            box(520, 68, 138, 32, ("skip 1 → 3",), "box"),
            wire((658, 84), (720, 84), (720, y - 9)),
            wire((720, 84), (798, 84)),
            box(798, 68, 138, 32, ("skip 1 → 4",), "box"),
            wire((936, 84), (999, 84), (999, y - 9)),
            wire((702, y), (702, 216), (798, 216)),
            box(798, 200, 138, 32, ("skip 2 → 4",), "box"),
            wire((936, 216), (999, 216), (999, y + 9)),
            text(20, 216, "skip: grouped 2×2 convolution, ½, one group for each channel that comes in", "note"),
            plus(720, y),
            plus(999, y),
            wire((1150, y), (1170, y), (1170, 184)),
            box(1104, 184, 84, 62, ("BatchNorm", "spatial mean", "linear"), "box"),
        ]
    )


def block() -> str:
    """Return the middle: one block, strip mixing then channel mixing, each added to its input."""
    y = 340
    strip = [
        (50, 72, ("BatchNorm", "GELU"), "box"),
        (140, 80, ("depthwise", "3×3 conv"), "box"),
        (238, 84, ("1×1 conv", "BatchNorm"), "box"),
        (340, 60, ("GELU", "split"), "box"),
    ]
    channel = [
        (722, 84, ("depthwise", "7×7 conv"), "channel"),
        (824, 78, ("LayerNorm",), "channel"),
        (920, 62, ("linear", "GELU"), "channel"),
        (1000, 46, ("GRN",), "channel"),
        (1064, 56, ("linear",), "channel"),
    ]
    return "".join(
        [
            text(20, 274, "One block", "title"),
            f'<rect x="40" y="{y - 52}" width="606" height="104" rx="8" class="frame"/>',
            f'<rect x="710" y="{y - 52}" width="422" height="104" rx="8" class="frame"/>',
            text(345, y + 70, "strip mixing"),
            text(921, y + 70, "channel mixing"),
            wire((14, y), (50, y)),
            row(y, *strip, height=44),
            box(430, y - 44, 112, 38, ("CGSMM", "half the channels"), "token"),
            box(430, y + 6, 112, 38, ("LSMM", "the other half"), "local"),
            wire((400, y - 8), (415, y - 8), (415, y - 25), (430, y - 25)),
            wire((400, y + 8), (415, y + 8), (415, y + 25), (430, y + 25)),
            wire((542, y - 25), (555, y - 25), (555, y - 8), (570, y - 8)),
            wire((542, y + 25), (555, y + 25), (555, y + 8), (570, y + 8)),
            box(570, y - 22, 66, 44, ("concat", "1×1 conv"), "box"),
            wire((636, y), (665, y)),
            wire((28, y), (28, y - 60), (675, y - 60), (675, y - 9)),
            plus(675, y),
            wire((684, y), (722, y)),
            row(y, *channel, height=44),
            wire((1120, y), (1145, y)),
            wire((697, y), (697, y - 60), (1155, y - 60), (1155, y - 9)),
            plus(1155, y),
            wire((1164, y), (1190, y)),
        ]
    )


def modules() -> str:
    """Return the lower part: what CGSMM and LSMM do."""
    y = 520
    cascade = [
        (56, 72, ("+ position",), "box"),
        (144, 108, ("Strip MLP", "along rows"), "token"),
        (270, 66, ("concat", "1×1 conv"), "box"),
        (354, 78, ("BatchNorm", "GELU"), "box"),
        (448, 70, ("+ position",), "box"),
        (534, 108, ("Strip MLP", "along columns"), "token"),
        (660, 66, ("concat", "1×1 conv"), "box"),
    ]
    x = 800
    return "".join(
        [
            text(20, 460, "CGSMM", "title"),
            text(100, 460, "cascade group strip mixing: long range, rows and then columns", "note"),
            wire((22, y), (56, y)),
            row(y, *cascade, height=44),
            wire((726, y), (752, y)),
            wire((38, y), (38, 572), (303, 572), (303, y + 22)),
            wire((303, 572), (693, 572), (693, y + 22)),
            text(
                20, 606, "Strip MLP: each token takes from all tokens of its own row and of the rows above and", "note"
            ),
            text(
                20,
                624,
                "below. Patches of channels share their weights; within a patch each channel has its own.",
                "note",
            ),
            text(x, 460, "LSMM", "title"),
            text(x + 64, 460, "local strip mixing: short range", "note"),
            wire((x, y), (x + 40, y)),
            wire((x + 20, y), (x + 20, y - 38), (x + 40, y - 38)),
            wire((x + 20, y), (x + 20, y + 38), (x + 40, y + 38)),
            box(x + 40, y - 53, 124, 30, ("7×3 depthwise",), "local"),
            box(x + 40, y - 15, 124, 30, ("3×7 depthwise",), "local"),
            box(x + 40, y + 23, 124, 30, ("unchanged",), "local"),
            wire((x + 164, y - 38), (x + 220, y - 38)),
            wire((x + 164, y), (x + 220, y)),
            wire((x + 164, y + 38), (x + 220, y + 38)),
            box(x + 220, y - 53, 110, 106, ("weighted sum",), "box"),
            wire((x + 330, y), (x + 366, y)),
            text(x, 606, "The three weights of a channel are a softmax, computed", "note"),
            text(x, 624, "from the mean over space of the sum of the three maps.", "note"),
        ]
    )


def drawing() -> str:
    """Return the picture as SVG."""
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" class="head"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        "<title>Architecture of Strip-MLP: the network, its block, and the two strip mixing modules</title>"
        f"<style>{STYLE}</style><defs>{marker}</defs>"
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" class="page"/>'
        f"{network()}{block()}{modules()}</svg>\n"
    ).replace("><", ">\n<")


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
