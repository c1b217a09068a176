"""Draws the results of `cpu_peers.py` as an SVG with four panels of bars."""

from html import escape

COLOURS = ["#1f6f54", "#c0504d", "#e5a19f", "#8064a2", "#b3a2c7", "#f0a030"]
WIDTH, HEIGHT = 940, 620
LEFT, TOP, GAP = 56, 70, 64
PANELS = [("f32", "forward"), ("bf16", "forward"), ("f32", "both"), ("bf16", "both")]
TITLES = {"forward": "forward", "both": "forward and backward"}


def text(x, y, words, size=12, anchor="middle"):
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def step_of(highest):
    """Returns the distance of grid lines, for four to eight of them."""
    for step in (10, 20, 25, 50, 100, 200, 250, 500):
        if highest / step <= 8:
            return step
    return 1000


def panel(rows, names, title, x, y, width, height):
    """Draws one panel: a group of bars for each shape."""
    highest = max((rate for rates in rows.values() for rate in rates.values()), default=1)
    step = step_of(highest)
    top = step * (int(highest / step) + 1)
    parts = [text(x + width / 2, y - 10, title, 14)]
    for level in range(0, top + 1, step):
        at = y + height * (1 - level / top)
        parts.append(f'<line x1="{x}" y1="{at:.1f}" x2="{x + width}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(text(x - 6, at + 4, str(level), 11, "end"))
    group = width / max(1, len(rows))
    for i, (shape, rates) in enumerate(rows.items()):
        shown = [name for name in names if name in rates]
        bar = 0.84 * group / max(1, len(shown))
        for j, name in enumerate(shown):
            tall = height * rates[name] / top
            left = x + group * (i + 0.08) + bar * j
            colour = COLOURS[names.index(name)]
            parts.append(
                f'<rect x="{left:.1f}" y="{y + height - tall:.1f}" width="{bar - 1:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"><title>{escape(name)}: {rates[name]:.1f} GFLOP/s</title></rect>'
            )
        batch, heads, seqlen, _, head_dim = shape
        parts.append(text(x + group * (i + 0.5), y + height + 16, f"{batch}, {heads}, {seqlen}, {head_dim}", 11))
    return parts


def plot(rates, names):
    """Draws `{(dtype, mask, shape, pass): {name: GFLOP/s}}` as SVG: full attention of many queries."""
    width, height = (WIDTH - 2 * LEFT - 20) / 2, (HEIGHT - TOP - 2 * GAP) / 2
    parts = [text(WIDTH / 2, 22, "Attention on two CPU cores, GFLOP/s (shapes B, H, N, D)", 16)]
    across = (WIDTH - 40) / len(names)
    for i, name in enumerate(names):
        x = 24 + across * i
        parts.append(f'<rect x="{x:.0f}" y="34" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(text(x + 17, 45, name, 12, "start"))
    for i, (dtype, which) in enumerate(PANELS):
        rows = {
            case[2]: of
            for case, of in rates.items()
            if (case[0], case[1], case[3]) == (dtype, "full", which) and case[2][1] > 1 and case[2][2] > 1
        }
        x, y = LEFT + (i % 2) * (width + LEFT + 10), TOP + 14 + (i // 2) * (height + GAP)
        parts += panel(rows, names, f"{dtype}, {TITLES[which]}", x, y, width, height)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )
