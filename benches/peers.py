"""The table of speed on a GPU: our attention and its peers on the same shapes, row by row in one run.

    python3 benches/peers.py --program target/release/gpu_speed --output benches/results

`gpu_speed` measures ours and answers one row at a time, so that changes of the GPU's clocks and temperature affect all
libraries alike. Peers are PyTorch's scaled_dot_product_attention with the cuDNN, flash, efficient and math backends, and FlashAttention-3
if `flash_attn_interface` can be imported; without PyTorch the table has ours alone and says so. A time is the median of
30 runs by device events, launched without waiting after a warm-up. Inputs are normal numbers; several sets take turns and
together exceed L2. TFLOP/s count 4 B H N^2 D operations forward, 2.5 times that backward, half under a causal mask. A large matmul and a
large copy show the limits of the GPU.

The script is one file without dependencies, so that it can be copied to the machine with the GPU.

Writes DATE-CARD.json (all measurements and the hardware), DATE-CARD.md (tables) and one SVG plot per pass.
`--render FILE.json` writes tables and plots from such a file again, on any machine.
"""

import argparse
import datetime
import json
import math
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

TOKENS, HIDDEN = 16384, 2048
PASSES = ["fwd", "bwd", "bwd-det"]
PASS_NAMES = {"fwd": "forward", "bwd": "backward", "bwd-det": "deterministic backward"}
SEQLENS = [512, 1024, 2048, 4096, 8192, 16384]
PEERS = ["cudnn", "flash", "efficient", "math", "fa3"]
LABELS = {
    "ours": "ours",
    "cudnn": "SDPA, cuDNN",
    "flash": "SDPA, flash",
    "efficient": "SDPA, efficient",
    "math": "SDPA, math",
    "fa3": "FlashAttention-3",
}
# TFLOP/s that the estimate assumes, about half of published H100 numbers, and the seconds of a row besides its runs.
ASSUMED = {"ours": 300, "cudnn": 300, "flash": 200, "efficient": 120, "math": 25, "fa3": 300}
ROW_SECONDS = 0.25
WARM_UP_SECONDS = 0.02


def shape(row, tokens=TOKENS, hidden=HIDDEN):
    """Returns (batch, heads) of a row (pass, dtype, mask, head_dim, seqlen)."""
    return max(1, tokens // row[4]), max(1, hidden // row[3])


def flops(row, tokens=TOKENS, hidden=HIDDEN):
    which, _, mask, head_dim, seqlen = row
    batch, heads = shape(row, tokens, hidden)
    full = 4 * batch * heads * seqlen * seqlen * head_dim
    return full * (0.5 if mask == "causal" else 1) * (1 if which == "fwd" else 2.5)


def rows(options):
    """Returns every row, grouped by dtype and shape."""
    middle = options.head_dims[len(options.head_dims) // 2]
    for dtype in options.dtypes:
        for head_dim in options.head_dims:
            for mask in options.masks:
                long = [options.once] if options.once and dtype == "bf16" and head_dim == middle else []
                for seqlen in options.seqlens + long:
                    for which in options.passes:
                        yield which, dtype, mask, head_dim, seqlen


def measures(peer, row, options):
    """Returns True if a peer can run a row. The math backend stores N x N scores. Of the peers only FlashAttention-3 has
    `deterministic`, and not at head_dim 256."""
    which, _, _, head_dim, seqlen = row
    if peer == "math" and seqlen > options.math_up_to:
        return False
    if which == "bwd-det" and peer != "fa3":
        return False
    return not (peer == "fa3" and which == "bwd-det" and head_dim == 256)


def runs_of(peer, row, options):
    """Returns the number of timed runs: 30, or for a slow peer as many as fit in --row-seconds, but at least 5."""
    once = flops(row, options.tokens, options.hidden) / (ASSUMED[peer] * 1e12)
    if peer == "ours":
        return options.runs
    return max(min(5, options.runs), min(options.runs, int(options.row_seconds / once)))


def estimate(all_rows, peers, options):
    """Returns the seconds of the table at the assumed speeds."""
    seconds = 0
    for row in all_rows:
        for peer in ["ours"] + peers:
            if peer == "ours" or measures(peer, row, options):
                once = flops(row, options.tokens, options.hidden) / (ASSUMED[peer] * 1e12)
                runs = runs_of(peer, row, options)
                seconds += (runs + 3) * once + WARM_UP_SECONDS + ROW_SECONDS
    return seconds + 30


class Ours:
    """The program that measures ours. It is restarted if it hangs or fails, since a failed kernel makes its context unusable."""

    PATIENCE = 60  # seconds for one row

    def __init__(self, options):
        self.command = [options.program, "--serve", "--device", options.device, "--runs", str(options.runs)]
        self.command += ["--tokens", str(options.tokens), "--hidden", str(options.hidden)]
        if options.arch:
            self.command += ["--arch", options.arch]
        self.header = self.start()
        if self.header["kind"] != "header":
            raise SystemExit(f"{options.program} does not start: {self.header['message']}")

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=self.read, args=(self.process, self.lines), daemon=True).start()
        return self.answer()

    @staticmethod
    def read(process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def answer(self):
        try:
            line = self.lines.get(timeout=self.PATIENCE)
        except queue.Empty:
            return {"kind": "error", "message": f"no answer in {self.PATIENCE} s, stopped"}
        if line is None:
            return {"kind": "error", "message": f"gpu_speed ended with status {self.process.wait()}"}
        return json.loads(line)

    def measure(self, row):
        try:
            print(*row, file=self.process.stdin, flush=True)
            answer = self.answer()
        except BrokenPipeError:
            answer = {"kind": "error", "message": "gpu_speed had ended"}
        if answer["kind"] == "error" and "the result is wrong" not in answer["message"]:
            self.close()
            self.start()
        return answer

    def close(self):
        self.process.kill()
        self.process.wait()


class Torch:
    """PyTorch, and FlashAttention-3 if it is installed."""

    def __init__(self, options):
        import torch  # optional
        from torch.nn import attention, functional

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self.torch, self.options = torch, options
        self.sdpa, self.choose = functional.scaled_dot_product_attention, attention.sdpa_kernel
        backends = attention.SDPBackend
        self.backends = {
            "cudnn": backends.CUDNN_ATTENTION,
            "flash": backends.FLASH_ATTENTION,
            "efficient": backends.EFFICIENT_ATTENTION,
            "math": backends.MATH,
        }
        self.versions = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        try:
            import flash_attn_interface

            self.fa3 = flash_attn_interface.flash_attn_func
            self.versions["flash_attn_interface"] = getattr(flash_attn_interface, "__version__", "of unknown version")
        except ImportError as error:
            self.fa3 = None
            self.versions["flash_attn_interface"] = f"absent: {error}"
        self.dtypes = {"f16": torch.float16, "bf16": torch.bfloat16}
        self.l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
        self.bound = None

    def peers(self):
        return ["cudnn", "flash", "efficient", "math"] + (["fa3"] if self.fa3 else [])

    def times(self, runs, seconds_expected, run):
        """Returns the seconds of each run, by events. `run` gets the number of its turn."""
        torch = self.torch
        warm_up = 3 + int(min(50, WARM_UP_SECONDS / seconds_expected))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for turn in range(warm_up):
            run(turn)
        for turn, (start, end) in enumerate(events):
            start.record()
            run(warm_up + turn)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def inputs(self, dtype, head_dim, seqlen):
        """Returns sets of q, k, v, dout as [batch, seqlen, heads, head_dim], which are kept as long as the shape is the same."""
        key = (dtype, head_dim, seqlen)
        if self.bound is None or self.bound[0] != key:
            self.bound = None
            torch = self.torch
            batch, heads = shape((None, dtype, None, head_dim, seqlen), self.options.tokens, self.options.hidden)
            size = (batch, seqlen, heads, head_dim)
            sets = max(2, math.ceil(2 * self.l2_bytes / (3 * 2 * math.prod(size))))
            make = lambda: torch.randn(size, device="cuda", dtype=self.dtypes[dtype])
            self.bound = (key, [[make() for _ in range(4)] for _ in range(sets)])
        return self.bound[1]

    def forward(self, peer, mask, q, k, v, deterministic=False):
        """Computes the output as [batch, seqlen, heads, head_dim]."""
        causal = mask == "causal"
        if peer == "fa3":
            out = self.fa3(q, k, v, causal=causal, deterministic=deterministic)
            return out[0] if isinstance(out, tuple) else out
        with self.choose([self.backends[peer]]):
            return self.sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal).transpose(1, 2)

    def measure(self, peer, row):
        """Answers a row in the format of `gpu_speed`."""
        which, dtype, mask, head_dim, seqlen = row
        torch, operations = self.torch, flops(row, self.options.tokens, self.options.hidden)
        runs = runs_of(peer, row, self.options)
        expected = operations / (ASSUMED[peer] * 1e12)
        answer = dict(zip(["pass", "dtype", "mask", "head_dim", "seqlen"], row), kind="row", runs=runs, flops=operations)
        try:
            sets = self.inputs(dtype, head_dim, seqlen)
            if which == "fwd":
                with torch.no_grad():
                    seconds = self.times(runs, expected, lambda i: self.forward(peer, mask, *sets[i % len(sets)][:3]))
            else:
                graphs = []
                for q, k, v, dout in sets:
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    graphs.append((self.forward(peer, mask, *leaves, deterministic=which == "bwd-det"), leaves, dout))

                def backward(i):
                    out, leaves, dout = graphs[i % len(graphs)]
                    torch.autograd.grad(out, leaves, dout, retain_graph=True)

                seconds = self.times(runs, expected, backward)
        except (RuntimeError, TypeError, ValueError) as error:  # no such kernel, or no room
            text = str(error).strip().splitlines() or [type(error).__name__]
            answer.update(kind="error", message=text[0][:200])
            seconds = None
        graphs = None
        if peer == "math":
            torch.cuda.empty_cache()
        if seconds:
            middle = statistics.median(seconds)
            answer.update(median_s=middle, min_s=min(seconds), max_s=max(seconds), tflops=operations / middle / 1e12)
        return answer

    def ceilings(self):
        torch = self.torch
        n = 8192
        pairs = [[torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(2)]
        out = torch.empty_like(pairs[0][0])
        seconds = self.times(30, 2e-3, lambda i: torch.matmul(*pairs[i % 2], out=out))
        big = torch.empty(4 << 30, device="cuda", dtype=torch.uint8)
        other = torch.empty_like(big)
        copies = self.times(30, 2e-3, lambda i: other.copy_(big))
        del pairs, out, big, other
        torch.cuda.empty_cache()
        return {
            "matmul_bf16_8192_tflops": 2 * n**3 / statistics.median(seconds) / 1e12,
            "copy_4gib_tb_per_s": 2 * (4 << 30) / statistics.median(copies) / 1e12,
        }


def said(*command):
    """Returns the first line that a command prints, or the reason why there is none."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip().splitlines()
        return lines[0] if lines else ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def commit():
    """Returns the commit of the bundle or the checkout."""
    readme = Path(__file__).resolve().parent.parent / "README.md"
    found = re.search(r"^- commit: (.*)$", readme.read_text(), re.MULTILINE) if readme.exists() else None
    return found.group(1) if found else said("git", "-C", str(readme.parent), "describe", "--always", "--dirty")


# Tables.


def table(results, which, dtype):
    """Returns Markdown for one pass and dtype: TFLOP/s of ours and each peer, and the ratio of ours to the best peer."""
    of = [r for r in results if (r["pass"], r["dtype"]) == (which, dtype)]
    by = {(r["mask"], r["head_dim"], r["seqlen"], r["peer"]): r for r in of}
    present = [p for p in ["ours"] + PEERS if any(r["peer"] == p for r in of)]
    peers = [p for p in present if p != "ours"]
    lines = [
        "| head_dim | mask | seqlen | " + " | ".join(LABELS[p] for p in present) + " |"
        + ("" if not peers else " ours / best peer |"),
        "| --- | --- | --- |" + " --- |" * (len(present) + bool(peers)),
    ]
    for mask, head_dim, seqlen in sorted({key[:3] for key in by}, key=lambda k: (k[1], k[0] != "full", k[2])):
        cells = []
        for peer in present:
            result = by.get((mask, head_dim, seqlen, peer))
            if result is None:
                cells.append("-")
            elif result["kind"] == "error":
                cells.append("failed")
            elif result.get("tflops") is None:
                cells.append(f"{result['median_s'] * 1e3:.2f} ms of the host")
            else:
                cells.append(f"{result['tflops']:.0f}")
        rates = {p: (by.get((mask, head_dim, seqlen, p)) or {}).get("tflops") for p in present}
        best = max((rates[p] for p in peers if rates[p]), default=None)
        if peers:
            cells.append(f"{rates['ours'] / best:.2f}" if best and rates.get("ours") else "-")
        lines.append(f"| {head_dim} | {mask} | {seqlen} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(run):
    """Returns the Markdown of a whole run."""
    header, ceilings, versions = run["header"], run["ceilings"], run["versions"]
    facts = [f"{name} {value}" for name, value in versions.items()]
    matmul, copy = ceilings.get("matmul_bf16_8192_tflops"), header.get("copy_tb_per_s")
    lines = [
        f"## {run['date']}, {run['card']}",
        "",
        f"Commit {run['commit']}; driver {run['driver']}; {'; '.join(facts) or 'no PyTorch, so no peers'}. "
        f"{run['tokens']} tokens a row, hidden {run['hidden']}; median of {header['runs']} runs ({header['clock']}).",
        "",
    ]
    if matmul:
        lines.append(f"A bf16 product of 8192^3 through PyTorch: {matmul:.0f} TFLOP/s.")
    if copy:
        lines.append(f"A copy of {header['copy_bytes'] / 2**30:.1f} GiB within the card's memory: {copy:.2f} TB/s, read and written.")
    if run["unmeasured"]:
        lines += ["", f"Time ran out: {run['unmeasured']} rows were not measured."]
    for which in PASSES:
        for dtype in ["bf16", "f16"]:
            if any((r["pass"], r["dtype"]) == (which, dtype) for r in run["rows"]):
                unit = ", TFLOP/s" if header["clock"] == "device events" else ""
                lines += ["", f"### {PASS_NAMES[which]}, {dtype}{unit}", "", table(run["rows"], which, dtype)]
    failures = {}
    for r in run["rows"]:
        if r["kind"] == "error":
            failures.setdefault((LABELS[r["peer"]], r["message"]), []).append(r)
    if failures:
        lines += ["", "What failed:", ""]
        for (label, message), failed in failures.items():
            first = " ".join(str(failed[0][k]) for k in ["pass", "dtype", "mask", "head_dim", "seqlen"])
            more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            lines.append(f"- {label}: {message} ({first}{more})")
    return "\n".join(lines) + "\n"


# Plots.

COLOURS = {
    "ours": "#D55E00",
    "cudnn": "#009E73",
    "flash": "#0072B2",
    "efficient": "#CC79A7",
    "math": "#999999",
    "fa3": "#E69F00",
}
PANEL, MARGIN, TOP = (300, 210), 52, 56


def escaped(text):
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def text_at(x, y, text, size=11, anchor="middle", extra=""):
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#000000"{extra}>{escaped(text)}</text>'
    )


def scale_end(most):
    """Returns the end of an axis that includes `most`, and its step."""
    step = next(s for s in [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] if most / s <= 6 or s == 1000)
    return max(1, math.ceil(most / step)) * step, step


def panel(results, title, left, top, most):
    """Draws one plot: TFLOP/s by seqlen, one line per library."""
    width, height = PANEL
    parts = [text_at(left + width / 2, top - 8, title, 12)]
    seqlens = sorted({r["seqlen"] for r in results})
    low, high = math.log2(seqlens[0]), math.log2(seqlens[-1])
    end, step = scale_end(most)
    across = lambda n: left + (width * (math.log2(n) - low) / (high - low) if high > low else width / 2)
    up = lambda rate: top + height * (1 - rate / end)
    for rate in range(0, end + 1, step):
        parts.append(
            f'<line x1="{left}" y1="{up(rate):.1f}" x2="{left + width}" y2="{up(rate):.1f}" stroke="#000000" opacity="0.15"/>'
        )
        parts.append(text_at(left - 5, up(rate) + 3.5, rate, 10, "end"))
    for n in seqlens:
        name = f"{n // 1024}k" if n % 1024 == 0 else str(n)
        parts.append(text_at(across(n), top + height + 14, name, 10))
    parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#000000"/>')
    for peer in PEERS[::-1] + ["ours"]:
        points = sorted((r["seqlen"], r["tflops"]) for r in results if r["peer"] == peer and r.get("tflops"))
        if not points:
            continue
        places = " ".join(f"{across(n):.1f},{up(rate):.1f}" for n, rate in points)
        weight = 2.5 if peer == "ours" else 1.5
        parts.append(f'<polyline points="{places}" fill="none" stroke="{COLOURS[peer]}" stroke-width="{weight}"/>')
        parts += [
            f'<circle cx="{across(n):.1f}" cy="{up(rate):.1f}" r="3" fill="{COLOURS[peer]}"/>' for n, rate in points
        ]
    return parts


def plot(run, which, dtype):
    """Returns the SVG of one pass, with a row of panels per mask and a column per head_dim; None if no TFLOP/s were measured."""
    results = [r for r in run["rows"] if (r["pass"], r["dtype"]) == (which, dtype) and r.get("tflops")]
    if not results:
        return None
    head_dims = sorted({r["head_dim"] for r in results})
    masks = [m for m in ["full", "causal"] if any(r["mask"] == m for r in results)]
    most = max(r["tflops"] for r in results)
    width = MARGIN + len(head_dims) * (PANEL[0] + MARGIN)
    height = TOP + len(masks) * (PANEL[1] + MARGIN) + 30
    title = f"{PASS_NAMES[which]}, {dtype}, TFLOP/s by seqlen, {run['card']}, {run['date']}"
    parts = [
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">',
        f'<rect x="0" y="0" width="{width}" height="{height}" fill="#FFFFFF"/>',
        text_at(width / 2, 22, title, 15),
    ]
    for i, mask in enumerate(masks):
        for j, head_dim in enumerate(head_dims):
            left, top = MARGIN + j * (PANEL[0] + MARGIN), TOP + i * (PANEL[1] + MARGIN)
            here = [r for r in results if (r["mask"], r["head_dim"]) == (mask, head_dim)]
            if here:
                parts += panel(here, f"head_dim {head_dim}, {mask}", left, top, most)
    at = MARGIN
    for peer in ["ours"] + PEERS:
        if any(r["peer"] == peer for r in results):
            parts.append(f'<rect x="{at}" y="{height - 24}" width="14" height="10" fill="{COLOURS[peer]}"/>')
            parts.append(text_at(at + 19, height - 15, LABELS[peer], 11, "start"))
            at += 40 + 7 * len(LABELS[peer])
    return "\n".join(parts + ["</svg>", ""])


def write(run, folder):
    """Writes the run's files: JSON, Markdown, and one plot per pass for the most common dtype."""
    stem = f"{run['date']}-{re.sub('[^A-Za-z0-9]+', '-', run['card']).strip('-').lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    text, paths = page(run), []
    for which in PASSES:
        for dtype in ["bf16", "f16"]:
            svg = plot(run, which, dtype)
            if svg:
                name = f"{stem}-{which}.svg"
                (folder / name).write_text(svg)
                paths.append(folder / name)
                text += f"\n![{PASS_NAMES[which]}, {dtype}]({name})\n"
                break
    for name, content in [(f"{stem}.json", json.dumps(run, indent=1) + "\n"), (f"{stem}.md", text)]:
        (folder / name).write_text(content)
        paths.append(folder / name)
    return text, paths


def measure(options):
    """Runs the whole table."""
    began = time.monotonic()
    ours = Ours(options)
    header = ours.header
    peer, peers, why = None, [], "left out"
    if options.peers != ["none"] and header["clock"] == "device events":
        try:
            peer = Torch(options)
            peers = [p for p in peer.peers() if p in options.peers]
        except ImportError as error:
            why = str(error)
    elif options.peers != ["none"]:
        why = "times here are the host's, so there is nothing to compare"
    if not peer:
        print(f"no peers: {why}", flush=True)
    all_rows = list(rows(options))
    print(
        f"{len(all_rows)} rows, ours and {', '.join(peers) or 'no peers'}: about {estimate(all_rows, peers, options):.0f} s, "
        f"{options.seconds} s at most",
        flush=True,
    )
    run = {
        "date": datetime.date.today().isoformat(),
        "card": header["name"],
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if peer else header["driver_cuda"],
        "commit": commit(),
        "versions": peer.versions if peer else {},
        "tokens": options.tokens,
        "hidden": options.hidden,
        "header": header,
        "ceilings": peer.ceilings() if peer else {},
        "unmeasured": 0,
        "rows": [],
    }
    for row in all_rows:
        if time.monotonic() - began > options.seconds:
            run["unmeasured"] += 1
            continue
        found = {"ours": ours.measure(row)}
        for name in peers:
            if measures(name, row, options):
                found[name] = peer.measure(name, row)
        keys = dict(zip(["pass", "dtype", "mask", "head_dim", "seqlen"], row))
        run["rows"] += [{**keys, **result, "peer": name} for name, result in found.items()]
        rate = lambda r: "failed" if r["kind"] == "error" else f"{r['tflops']:.0f}" if r.get("tflops") else "host"
        print(*row, *(f"{name} {rate(result)}" for name, result in found.items()), flush=True)
    ours.close()
    run["wall_s"] = round(time.monotonic() - began, 1)
    return run


def arguments(words=None):
    split = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default="target/release/gpu_speed", help="what measures ours")
    parser.add_argument("--output", type=Path, default=Path("benches/results"))
    parser.add_argument("--render", type=Path, help="a JSON file of an earlier run; nothing is measured")
    parser.add_argument("--device", default="cuda", help="where ours runs; cpu or emulator:sm_90a to test this program")
    parser.add_argument("--peers", type=split, default=["cudnn", "flash", "math", "fa3"], help=f"{','.join(PEERS)} or none")
    parser.add_argument("--passes", type=split, default=PASSES)
    parser.add_argument("--dtypes", type=split, default=["bf16", "f16"])
    parser.add_argument("--head-dims", type=numbers, default=[64, 128, 256])
    parser.add_argument("--masks", type=split, default=["full", "causal"])
    parser.add_argument("--seqlens", type=numbers, default=SEQLENS)
    parser.add_argument("--once", type=int, default=65536, help="a longer sequence, in bf16 with the middle head_dim; or 0")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--arch", help="our kernels of this architecture only: sm_80")
    parser.add_argument("--math-up-to", type=int, default=4096, help="longest sequence of the math backend")
    parser.add_argument("--row-seconds", type=float, default=1.5, help="of a slow peer's row")
    parser.add_argument("--seconds", type=float, default=400, help="no row starts after so many")
    options = parser.parse_args(words)
    unknown = [p for p in options.peers if p not in PEERS + ["none"]]
    if unknown:
        parser.error(f"no peer {unknown[0]}: {', '.join(PEERS)} or none")
    return options


def main():
    options = arguments()
    run = json.loads(options.render.read_text()) if options.render else measure(options)
    text, paths = write(run, options.output)
    print(text)
    print("written:", *paths)
    failed = [r for r in run["rows"] if r["kind"] == "error" and r["peer"] == "ours"]
    if failed or not run["rows"]:
        sys.exit(f"{len(failed)} of our rows failed")


if __name__ == "__main__":
    main()
