"""Measures ragged batches and decoding of this library and of PyTorch on the CPU, in turn, and prints a table.

    cargo build --release -p benches
    python benches/cpu_sequences.py [--rounds N]

Needs torch (any wheel; the GPU is not used). A round runs target/release/cpu_sequences, then each call of PyTorch once, so that
other load on the machine affects both alike. The least time of each call counts.

The ragged batch has 32 sequences of 64 to 2048 tokens, 8 heads of 64 elements, f32, full attention. PyTorch has it padded to 2048
tokens with a mask of keys, and as a call a sequence. Decoding has one query of each of 32 sequences of 4096 keys, 32 query and 8 key
heads of 128 elements. PyTorch has it as one call over all sequences, and as a call a sequence. Beside it, all threads read as many
bytes in order, in the same rounds.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

OURS = Path(__file__).parent.parent / "target" / "release" / "cpu_sequences"
LENS = [64 * (1 + 11 * i % 32) for i in range(32)]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def ragged_calls():
    """Returns PyTorch's calls over the ragged batch, by name. Backward passes have a forward pass of their own before them."""
    longest = max(LENS)
    padded = torch.randn(len(LENS), 8, longest, 64)
    mask = (torch.arange(longest) < torch.tensor(LENS)[:, None])[:, None, None, :]
    alone = [torch.randn(1, 8, n, 64) for n in LENS]

    def both(x, mask=None):
        x = [x.clone().requires_grad_() for _ in range(3)]
        sdpa(*x, attn_mask=mask).sum().backward()

    return {
        "forward, padded": lambda: sdpa(padded, padded, padded, attn_mask=mask),
        "forward, a call a sequence": lambda: [sdpa(x, x, x) for x in alone],
        "both, padded": lambda: both(padded, mask),
        "both, a call a sequence": lambda: [both(x) for x in alone],
    }


def decode_calls(name):
    """Returns PyTorch's calls of decoding in a dtype, by name."""
    dtype = DTYPES[name]
    q = torch.randn(32, 32, 1, 128).to(dtype)
    k, v = (torch.randn(32, 4096, 8, 128).to(dtype).transpose(1, 2) for _ in range(2))
    one_by_one = [(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(32)]
    return {
        f"decode, {name}": lambda: sdpa(q, k, v, enable_gqa=True),
        f"decode, {name}, a call a sequence": lambda: [sdpa(*x, enable_gqa=True) for x in one_by_one],
    }


def note(times, name, seconds):
    times[name] = min(times.get(name, seconds), seconds)


def measure(rounds):
    """Returns the least seconds of our calls and of PyTorch's."""
    ours, peer = {}, {}
    for _ in range(rounds):
        answer = json.loads(subprocess.run([OURS, "3"], capture_output=True, check=True, text=True).stdout)
        for name, seconds in answer.items():
            note(ours, name, seconds)
        for calls in [ragged_calls, *(lambda name=name: decode_calls(name) for name in DTYPES)]:
            for name, call in calls().items():
                start = time.perf_counter()
                with torch.set_grad_enabled("both" in name):
                    call()
                note(peer, name, time.perf_counter() - start)
    return ours, peer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    ours, peer = measure(parser.parse_args().rounds)
    for which in ["forward", "both"]:
        total = ours["forward, full, ragged"] + (ours["backward, full, ragged"] if which == "both" else 0)
        ours[which] = total
        for how in ["padded", "a call a sequence"]:
            print(f"| {which}, ragged | {1e3 * total:.0f} ms | {how} | {1e3 * peer[f'{which}, {how}']:.0f} ms "
                  f"| {total / peer[f'{which}, {how}']:.2f} |")
    for mask in ["full", "causal"]:
        for which in ["forward", "backward"]:
            ratio = ours[f"{which}, {mask}, ragged"] / ours[f"{which}, {mask}, a call a sequence"]
            print(f"{which}, {mask}: {ratio:.2f} of our calls a sequence")
    for name, dtype in DTYPES.items():
        reading = ours[f"decode, {name}, reading"]
        rate = 2 * 32 * 4096 * 8 * 128 * dtype.itemsize / reading
        for kind in ["rectangle", "cache of rows", "pages of 16", "pages of 64", "pages of 256"]:
            seconds = ours[f"decode, {name}, {kind}"]
            against = [peer[f"decode, {name}"] / seconds, peer[f"decode, {name}, a call a sequence"] / seconds]
            print(f"| {name} | {kind} | {1e3 * seconds:.1f} ms | {100 * reading / seconds:.0f} % of {rate / 1e9:.1f} GB/s "
                  f"| {against[0]:.2f} | {against[1]:.2f} |")


if __name__ == "__main__":
    main()
