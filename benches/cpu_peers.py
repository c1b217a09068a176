"""Measures attention of this library, PyTorch, candle and burn on the CPU, in turn on the same shapes, and prints ratios.

    cargo build --release -p benches
    cargo build --release --manifest-path benches/rust_peers/Cargo.toml
    python benches/cpu_peers.py [--threads N] [--rounds N] [--seconds S] [--only TEXT] [--markdown FILE] [--plot FILE.svg]
    python benches/cpu_peers.py --standard [--threads N] [--rounds N] [--seconds S]

Needs torch (any wheel; the GPU is not used). Every library runs in a process that waits for a line `DTYPE MASK BATCH
HEADS SEQLEN_Q SEQLEN_K HEAD_DIM PASS RUNS` and answers with the seconds of every run. Each round measures every shape once
with each library, one after the other, so that other load on the machine affects all alike. A time is the least of a few
runs in a round; the median and the least over the rounds are reported. GFLOP/s count 4 B H N^2 D operations forward, half
of that under a causal mask, and 3.5 times as many forward and backward.

With `--standard`, ours is measured beside standard attention alone: PyTorch's math backend, which writes the scores to memory,
in f32 from 128 to 4096 tokens.

PyTorch runs twice: unrestricted ("512", on a processor where oneMKL takes its AVX-512 path), and restricted to AVX2
("stock", as oneMKL does on AMD's processors), by the settings in AVX2 below.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cpu_plot import plot

# batch, heads, seqlen_q, seqlen_k, head_dim
SHAPES = [
    (1, 12, 512, 512, 64),
    (1, 12, 2048, 2048, 64),
    (1, 8, 4096, 4096, 128),
    (1, 2, 16384, 16384, 64),
]
DTYPES = ["f32", "f16", "bf16"]

# Settings that restrict PyTorch to AVX2: its own kernels, those of oneDNN, those of oneMKL.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

OURS, FULL, STOCK = "ours", "PyTorch, 512", "PyTorch, stock"
MATH = "PyTorch, math"
RUST = ["candle", "candle-flash", "burn"]

# Number of rounds of the Rust peers, and of every library that needs more than SLOW seconds for a case.
SLOW_ROUNDS, SLOW = 1, 5

MATMUL = "matmul"
MATMUL_SIZE = 4096


def cases():
    """Yields (dtype, mask, shape, pass) of every row."""
    for mask, shapes in [("full", SHAPES), ("causal", SHAPES[:2])]:
        for shape in shapes:
            for dtype in DTYPES:
                yield dtype, mask, shape, "forward"
    for shape in SHAPES:
        for dtype in ["f32", "bf16"]:
            yield dtype, "full", shape, "both"
    yield "f16", "full", SHAPES[1], "both"
    yield "f32", "causal", SHAPES[1], "both"
    yield "f32", "full", (1, 1, 2048, 2048, 64), "both"
    for dtype in DTYPES:
        yield dtype, "full", (1, 1, 1, 16384, 64), "forward"
        yield dtype, "full", (1, 32, 1, 4096, 128), "forward"


def standard_cases():
    """Yields the rows beside standard attention: the lengths of the first FlashAttention paper, 12 heads of 64 elements."""
    for which in ["forward", "both"]:
        for seqlen in [128, 256, 512, 1024, 2048, 4096]:
            yield "f32", "full", (1, 12, seqlen, seqlen, 64), which


def is_for_rust(case):
    """Returns True if the Rust peers are measured too."""
    dtype, _, shape, which = case
    return dtype == "f32" or shape == SHAPES[1] and which == "forward"


def flops(case):
    _, mask, (batch, heads, seqlen_q, seqlen_k, head_dim), which = case
    operations = 4 * batch * heads * seqlen_q * seqlen_k * head_dim
    return operations * (0.5 if mask == "causal" else 1) * (3.5 if which == "both" else 1)


class Torch:
    """Runs one case in a backend of PyTorch's scaled_dot_product_attention."""

    def __init__(self, backend, dtype, mask, shape, which):
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        self.backend = lambda: sdpa_kernel(getattr(SDPBackend, backend))
        self.attention = scaled_dot_product_attention
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        batch, heads, seqlen_q, seqlen_k, head_dim = shape
        grad = which == "both"
        make = lambda n, grad: torch.randn(batch, heads, n, head_dim).to(kind).requires_grad_(grad)
        self.inputs = [make(seqlen_q, grad), make(seqlen_k, grad), make(seqlen_k, grad)]
        self.dout = make(seqlen_q, False)
        self.causal, self.grad = mask == "causal", grad

    def run(self):
        for x in self.inputs:
            x.grad = None
        start = time.perf_counter()
        with self.backend():
            out = self.attention(*self.inputs, is_causal=self.causal)
        if self.grad:
            out.backward(self.dout)
        return time.perf_counter() - start


def matmul(size):
    """Returns the seconds of a product of two square f32 matrices."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start


def work(threads, backend):
    """The process that measures a backend of PyTorch."""
    import torch

    torch.set_num_threads(threads)
    device = f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    for line in sys.stdin:
        *case, runs = line.split()
        if case[0] == MATMUL:
            seconds = [matmul(int(case[1])) for _ in range(int(runs))]
        else:
            dtype, mask, *shape, which = case
            try:
                problem = Torch(backend, dtype, mask, [int(n) for n in shape], which)
                seconds = [problem.run() for _ in range(int(runs))]
            except RuntimeError as error:
                print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
                continue
        print(json.dumps({"device": device, "seconds": seconds}), flush=True)


class Contestant:
    """A process that measures itself on request."""

    def __init__(self, command, threads, **environment):
        environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), **environment)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.device = ""

    def ask(self, words, runs):
        print(*words, runs, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.device = answer.get("device", self.device)
        return answer.get("seconds")

    def best(self, words, seconds):
        """Returns the least time of the runs that fit in `seconds`, at least 2 after the first; `None` if it cannot run."""
        first = self.ask(words, 2)
        time.sleep(0.02)  # until threads that spin for more work go to sleep
        if first is None:
            return None
        runs = max(2, min(200, int(seconds / first[1])))
        return min(self.ask(words, runs)) if first[1] < SLOW else first[1]


def words_of(case):
    dtype, mask, shape, which = case
    return [MATMUL, MATMUL_SIZE] if dtype == MATMUL else [dtype, mask, *shape, which]


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def measure(contestants, rows, options):
    """Returns {case: {name: least seconds of every round}}."""
    times = {case: {name: [] for name in contestants} for case in rows}
    for round_ in range(options.rounds):
        for case in rows:
            for name, contestant in contestants.items():
                if case[0] == MATMUL and name not in (FULL, STOCK):
                    continue
                if name in RUST and not is_for_rust(case):
                    continue
                before = times[case][name]
                if round_ >= SLOW_ROUNDS and (name in RUST or before and min(before) > SLOW):
                    continue
                best = contestant.best(words_of(case), options.seconds)
                if best is not None:
                    before.append(best)
        print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
    return times


def rate(operations, seconds):
    return operations / seconds / 1e9


def cell(operations, seconds):
    if not seconds:
        return "–"
    return f"{rate(operations, statistics.median(seconds)):.1f} ({rate(operations, min(seconds)):.1f})"


def ratio(theirs, mine):
    return f"{statistics.median(theirs) / statistics.median(mine):.2f}" if theirs and mine else "–"


def tables(times):
    """Returns the results as lines of Markdown."""
    rows = [case for case in times if case[0] != MATMUL]
    heads = ["dtype", "mask", "B, H, Nq, Nk, D", "pass"]
    head = lambda names: ["| " + " | ".join(names) + " |", "| " + " | ".join(["---"] * len(names)) + " |"]
    name = lambda case: f"| {case[0]} | {case[1]} | {', '.join(map(str, case[2]))} | {case[3]} "
    lines = head(heads + ["ours, median (best) GFLOP/s", "PyTorch 512", "PyTorch stock", "ours / 512", "ours / stock"])
    for case in rows:
        of = times[case]
        cells = [cell(flops(case), of[who]) for who in (OURS, FULL, STOCK)]
        cells += [ratio(of[who], of[OURS]) for who in (FULL, STOCK)]
        lines.append(name(case) + "| " + " | ".join(cells) + " |")
    product = times.get((MATMUL, "", (), ""))
    if product:
        operations = 2 * MATMUL_SIZE**3
        lines += ["", f"f32 matmul of {MATMUL_SIZE} x {MATMUL_SIZE} matrices in PyTorch, GFLOP/s, median (best): "
                  f"512 {cell(operations, product[FULL])}, stock {cell(operations, product[STOCK])}.", ""]
        lines += head(["f32 forward, full, N >= 2048", "ours", "of the matmul rate, median", "best"])
        for case in rows:
            dtype, mask, shape, which = case
            if (dtype, mask, which) == ("f32", "full", "forward") and shape[2] >= 2048 and times[case][OURS]:
                parts = [
                    100 * rate(flops(case), least(times[case][OURS])) / rate(operations, least(product[FULL]))
                    for least in (statistics.median, min)
                ]
                lines.append(
                    f"| {', '.join(map(str, shape))} | {cell(flops(case), times[case][OURS])} "
                    f"| {parts[0]:.0f} % | {parts[1]:.0f} % |"
                )
    peers = [case for case in rows if any(times[case].get(who) for who in RUST)]
    if peers:
        lines += [""] + head(heads + ["ours, median GFLOP/s", "candle", "candle flash", "burn", "ours / best of them"])
    for case in peers:
        of = times[case]
        median = lambda who: f"{rate(flops(case), statistics.median(of[who])):.1f}" if of.get(who) else "–"
        fastest = min((of[who] for who in RUST if of.get(who)), key=statistics.median)
        cells = [median(who) for who in [OURS, *RUST]] + [ratio(fastest, of[OURS])]
        lines.append(name(case) + "| " + " | ".join(cells) + " |")
    return lines


def standard_table(times):
    """Returns the rows beside standard attention as lines of Markdown."""
    lines = ["| dtype | B, H, N, D | pass | ours, median (best) ms | standard attention, ms | standard / ours |", "| --- " * 6 + "|"]
    milliseconds = lambda seconds: f"{1e3 * statistics.median(seconds):.2f} ({1e3 * min(seconds):.2f})"
    for (dtype, _, (batch, heads, seqlen, _, head_dim), which), of in times.items():
        lines.append(f"| {dtype} | {batch}, {heads}, {seqlen}, {head_dim} | {which} | {milliseconds(of[OURS])} "
                     f"| {milliseconds(of[MATH])} | {ratio(of[MATH], of[OURS])} |")
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/cpu_times")
    parser.add_argument("--rust-peers", default="benches/rust_peers/target/release/rust_peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contestant, each shape, each round")
    parser.add_argument("--only", default="")
    parser.add_argument("--standard", action="store_true", help="measure ours beside standard attention alone")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.threads, options.worker)
    torch = lambda backend: [sys.executable, __file__, "--worker", backend, "--threads", str(options.threads)]
    contestants = {OURS: Contestant([options.program], options.threads)}
    if options.standard:
        contestants[MATH] = Contestant(torch("MATH"), options.threads)
    else:
        contestants[FULL] = Contestant(torch("FLASH_ATTENTION"), options.threads)
        contestants[STOCK] = Contestant(torch("FLASH_ATTENTION"), options.threads, **AVX2)
        if Path(options.rust_peers).exists():
            for library in RUST:
                contestants[library] = Contestant([options.rust_peers, library], options.threads)
        else:
            print(f"{options.rust_peers} is not built: without candle and burn", file=sys.stderr)
    all_rows = standard_cases() if options.standard else cases()
    rows = [case for case in all_rows if options.only in f"{case[0]} {case[1]} {case[2]} {case[3]}"]
    if not options.standard:
        rows.append((MATMUL, "", (), ""))
    before = os.getloadavg()[0]
    times = measure(contestants, rows, options)
    devices = "; ".join(f"{name}: {contestant.device}" for name, contestant in contestants.items() if name not in RUST)
    lines = [
        f"{processor()}, {options.threads} threads; {devices}; {options.rounds} rounds; load average {before:.1f} at the "
        f"start, {os.getloadavg()[0]:.1f} at the end",
        "",
        *(standard_table(times) if options.standard else tables(times)),
    ]
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.plot:
        bars = {case: {who: rate(flops(case), statistics.median(t)) for who, t in times[case].items() if t}
                for case in rows if case[0] != MATMUL}
        options.plot.write_text(plot(bars, [OURS, FULL, STOCK, *RUST]))


if __name__ == "__main__":
    main()
