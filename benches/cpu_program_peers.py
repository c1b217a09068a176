"""Measures score programs of this library beside PyTorch's on the CPU, in turn on the same problems, and prints ratios.

    cargo build --release -p benches
    python benches/cpu_program_peers.py [--threads N] [--rounds N] [--seconds S] [--only TEXT] [--markdown FILE]

Needs torch, and a C++ compiler for torch.compile. PyTorch computes each feature in two ways: by `flex_attention`, compiled, with
a block mask where the feature is a mask (its CPU backend has no backward pass), and by `scaled_dot_product_attention` with the
mask or the bias as a dense tensor of the inputs' dtype. A softcap has no such tensor. Compilation and the making of masks are
not timed. As in `cpu_peers.py` every library answers requests, each round measures every case once with each, a time is the
least of a few runs in a round, and the median over the rounds is reported.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from cpu_peers import Contestant, processor

HEADS = {2048: 12, 16384: 2}
HEAD_DIM = 64

OURS, FLEX, SDPA = "ours", "flex_attention", "SDPA"

# Features as `cpu_programs` names them.
FEATURES = ["causal", "window of 512", "one tile in eight", "ALiBi", "softcap of 20", "documents of 512", "bias"]


def cases():
    """Yields (dtype, seqlen, pass, feature) of every row."""
    for seqlen in HEADS:
        for feature in FEATURES[: None if seqlen <= 4096 else 3]:
            for which in ["forward", "both"]:
                for dtype in ["f32", "bf16"]:
                    yield dtype, seqlen, which, feature


def mask_of(feature, seqlen):
    """Returns the feature's mask as `flex_attention` takes one, or None."""
    tiles = seqlen // 128
    return {
        "causal": lambda b, h, q, k: q >= k,
        "window of 512": lambda b, h, q, k: (q >= k) & (q - k < 512),
        "one tile in eight": lambda b, h, q, k: (k // 128 % tiles + 5 * (q // 128)) % 8 == 0,
        "documents of 512": lambda b, h, q, k: q // 512 == k // 512,
    }.get(feature)


def dense_of(feature, seqlen, kind):
    """Returns the mask or the bias as a dense tensor, [1, heads or 1, seqlen, seqlen], or None."""
    import torch

    q, k = torch.arange(seqlen)[:, None], torch.arange(seqlen)[None, :]
    if feature == "ALiBi":
        return (-slopes(seqlen)[None, :, None, None] * (q - k).abs()[None, None]).to(kind)
    if feature == "bias":
        return bias(seqlen)[None, None].to(kind)
    mask = mask_of(feature, seqlen)
    return mask(0, 0, q, k)[None, None] if mask else None


def slopes(seqlen):
    """Returns the slopes of ALiBi, one a head."""
    import torch

    heads = HEADS[seqlen]
    return torch.tensor([0.5 ** (1 + head * 8 // heads) for head in range(heads)])


def bias(seqlen):
    """Returns a bias, [seqlen, seqlen]."""
    import torch

    return (torch.arange(seqlen * seqlen) % 97 * 0.01).reshape(seqlen, seqlen)


class Torch:
    """Runs one case in PyTorch, by flex_attention or by SDPA."""

    def __init__(self, way, dtype, seqlen, which, feature):
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.grad = which == "both"
        draw = lambda: torch.randn(1, HEADS[seqlen], seqlen, HEAD_DIM).to(kind)
        self.inputs = [draw().requires_grad_(self.grad) for _ in range(3)]
        self.dout = draw()
        if way == FLEX:
            if self.grad:
                raise RuntimeError("flex_attention has no backward pass on the CPU")
            self.attention = self.flex(seqlen, kind, feature)
        else:
            dense = dense_of(feature, seqlen, kind)
            if dense is None:
                raise RuntimeError(f"{feature} is no dense tensor")
            causal = feature == "causal"
            arguments = {"is_causal": True} if causal else {"attn_mask": dense}
            self.attention = lambda q, k, v: scaled_dot_product_attention(q, k, v, **arguments)

    @staticmethod
    def flex(seqlen, kind, feature):
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, score = mask_of(feature, seqlen), None
        if feature == "ALiBi":
            of_heads = slopes(seqlen)
            score = lambda s, b, h, q, k: s - of_heads[h] * (q - k).abs()
        elif feature == "softcap of 20":
            score = lambda s, b, h, q, k: 20 * torch.tanh(s / 20)
        elif feature == "bias":
            table = bias(seqlen).to(kind)
            score = lambda s, b, h, q, k: s + table[q, k]
        blocks = create_block_mask(mask, None, None, seqlen, seqlen, device="cpu") if mask else None
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=blocks)

    def run(self):
        for x in self.inputs:
            x.grad = None
        start = time.perf_counter()
        out = self.attention(*self.inputs)
        if self.grad:
            out.backward(self.dout)
        return time.perf_counter() - start


def work(way, threads):
    """The process that measures PyTorch."""
    import torch

    torch.set_num_threads(threads)
    torch._dynamo.config.cache_size_limit = 1000
    device = f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    current, problem = None, None
    for line in sys.stdin:
        dtype, seqlen, which, runs, feature = line.strip().split(" ", 4)
        case = (dtype, int(seqlen), which, feature)
        try:
            if current != case:
                problem = Torch(way, *case)
                current = case
            seconds = [problem.run() for _ in range(int(runs))]
        except Exception as error:
            current = None
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)
            continue
        print(json.dumps({"device": device, "seconds": seconds}), flush=True)


class Programs(Contestant):
    """A contestant whose requests end with the feature's name."""

    def ask(self, words, runs):
        dtype, seqlen, which, feature = words
        print(dtype, seqlen, which, runs, feature, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.device = answer.get("device", self.device)
        if "error" in answer:
            print(f"{' '.join(map(str, words))}: {answer['error']}", file=sys.stderr)
        return answer.get("seconds")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/cpu_programs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contestant, each case, each round")
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.threads)
    torch = [sys.executable, __file__, "--threads", str(options.threads), "--worker"]
    contestants = {
        OURS: Programs([options.program, "--serve"], options.threads),
        FLEX: Programs([*torch, FLEX], options.threads),
        SDPA: Programs([*torch, SDPA], options.threads),
    }
    rows = [case for case in cases() if options.only in " ".join(map(str, case))]
    times = {case: {name: [] for name in contestants} for case in rows}
    absent = set()
    before = os.getloadavg()[0]
    for round_ in range(options.rounds):
        for case in rows:
            for name, contestant in contestants.items():
                if (case, name) in absent:
                    continue
                best = contestant.best(case, options.seconds)
                if best is None:
                    absent.add((case, name))
                else:
                    times[case][name].append(best)
        print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
    devices = "; ".join(f"{name}: {contestant.device}" for name, contestant in contestants.items())
    lines = [
        f"{processor()}, {options.threads} threads; {devices}; {options.rounds} rounds; load average {before:.1f} at the "
        f"start, {os.getloadavg()[0]:.1f} at the end",
        "",
        "| dtype | B, H, N, D | feature | pass | ours, ms | flex_attention, ms | SDPA, ms | flex / ours | SDPA / ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in rows:
        dtype, seqlen, which, feature = case
        middle = {name: statistics.median(t) if t else None for name, t in times[case].items()}
        cell = lambda name: f"{1e3 * middle[name]:.1f}" if middle[name] else "–"
        ratio = lambda name: f"{middle[name] / middle[OURS]:.2f}" if middle[name] else "–"
        lines.append(
            f"| {dtype} | 1, {HEADS[seqlen]}, {seqlen}, {HEAD_DIM} | {feature} "
            f"| {'forward' if which == 'forward' else 'forward and backward'} "
            f"| {cell(OURS)} | {cell(FLEX)} | {cell(SDPA)} | {ratio(FLEX)} | {ratio(SDPA)} |"
        )
    text = "\n".join(lines)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
