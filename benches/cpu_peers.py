"""Runs PyTorch's attention on the CPU and ours, on the same shapes, in turn, and prints ratios.

    cargo build --release -p benches
    python benches/cpu_peers.py [--threads N] [--rounds N] [--seconds S] [--only TEXT] [--markdown FILE]

Needs torch; any wheel will do, the GPU is not used. Each round measures every shape once with each library, one after the
other, so that what else the machine does falls on both. A time is the least of a few runs in a round; reported are the
median and the least over the rounds. GFLOP/s count 4 B H N^2 D operations forward, half of that under a causal mask, and
3.5 times as many forward and backward.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# batch, heads, seqlen_q, seqlen_k, head_dim
SHAPES = [
    (1, 12, 512, 512, 64),
    (1, 12, 2048, 2048, 64),
    (1, 8, 4096, 4096, 128),
    (1, 2, 16384, 16384, 64),
]


def cases():
    """(dtype, mask, shape, pass) of every row."""
    for mask, shapes in [("full", SHAPES), ("causal", SHAPES[:2])]:
        for shape in shapes:
            for dtype in DTYPES:
                yield dtype, mask, shape, "forward"
    for shape in [SHAPES[0], SHAPES[1], SHAPES[2]]:
        for dtype in ["f32", "bf16"]:
            yield dtype, "full", shape, "both"
    yield "f32", "causal", SHAPES[1], "both"
    yield "f32", "full", (1, 1, 2048, 2048, 64), "both"
    for dtype in DTYPES:
        yield dtype, "full", (1, 1, 1, 16384, 64), "forward"
        yield dtype, "full", (1, 32, 1, 4096, 128), "forward"


class Peer:
    """One case in PyTorch."""

    def __init__(self, dtype, mask, shape, which):
        batch, heads, seqlen_q, seqlen_k, head_dim = shape
        grad = which == "both"
        make = lambda n, grad: torch.randn(batch, heads, n, head_dim).to(DTYPES[dtype]).requires_grad_(grad)
        self.inputs = [make(seqlen_q, grad), make(seqlen_k, grad), make(seqlen_k, grad)]
        self.dout = make(seqlen_q, False)
        self.causal, self.grad = mask == "causal", grad

    def run(self):
        for x in self.inputs:
            x.grad = None
        start = time.perf_counter()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(*self.inputs, is_causal=self.causal)
        if self.grad:
            out.backward(self.dout)
        return time.perf_counter() - start


class Ours:
    """The program that measures ours."""

    def __init__(self, program, threads):
        environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, dtype, mask, shape, which, runs):
        words = [dtype, mask, *shape, which, runs]
        print(*words, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/cpu_times")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each library, each shape, each round")
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = Ours(options.program, options.threads)
    rows = [case for case in cases() if options.only in f"{case[0]} {case[1]} {case[2]} {case[3]}"]
    times = {case: ([], []) for case in rows}
    device = ""
    for _ in range(options.rounds):
        for case in rows:
            peer = Peer(*case)
            once = peer.run()
            runs = max(2, min(200, int(options.seconds / once)))
            times[case][0].append(min(peer.run() for _ in range(runs)))
            del peer
            answer = ours.run(*case, runs + 1)
            times[case][1].append(min(answer["seconds"][1:]))
            device = answer["device"]
    lines = [
        f"{processor()}, {options.threads} threads; PyTorch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}); ours: {device}; {options.rounds} rounds; "
        f"load average at the end {os.getloadavg()[0]:.1f}",
        "",
        "| dtype | mask | B, H, Nq, Nk, D | pass | PyTorch, median (best) GFLOP/s | ours, median (best) | ratio of medians | of bests |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in rows:
        dtype, mask, (batch, heads, seqlen_q, seqlen_k, head_dim), which = case
        flops = 4 * batch * heads * seqlen_q * seqlen_k * head_dim
        flops *= (0.5 if mask == "causal" else 1) * (3.5 if which == "both" else 1)
        (theirs, best_theirs), (mine, best_mine) = [(statistics.median(t), min(t)) for t in times[case]]
        rate = lambda seconds: f"{flops / seconds / 1e9:.1f}"
        lines.append(
            f"| {dtype} | {mask} | {batch}, {heads}, {seqlen_q}, {seqlen_k}, {head_dim} | {which} "
            f"| {rate(theirs)} ({rate(best_theirs)}) | {rate(mine)} ({rate(best_mine)}) "
            f"| {theirs / mine:.2f} | {best_theirs / best_mine:.2f} |"
        )
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
