"""Tests of peers.py on made-up measurements: python3 -m unittest benches/test_peers.py"""

import contextlib
import io
import json
import sys
import tempfile
import unittest
import xml.dom.minidom
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers


def made_up():
    """Makes up a run: ours has 100 TFLOP/s plus one per element of head_dim, the others a fraction of it."""
    run = {
        "date": "1970-01-01",
        "card": "Made-up <card> & co",
        "driver": "0",
        "commit": "none",
        "versions": {"torch": "0"},
        "tokens": 16384,
        "hidden": 2048,
        "header": {"runs": 30, "clock": "device events", "copy_bytes": 4 << 30, "copy_tb_per_s": 4.25},
        "ceilings": {"matmul_bf16_8192_tflops": 700.4},
        "unmeasured": 2,
        "rows": [],
    }
    for row in peers.rows(peers.arguments([])):
        which, dtype, mask, head_dim, seqlen = row
        keys = dict(zip(["pass", "dtype", "mask", "head_dim", "seqlen"], row), kind="row")
        for peer, share in [("ours", 1.0), ("cudnn", 0.8), ("flash", 0.5)]:
            if which != "bwd-det" or peer == "ours":
                rate = (100 + head_dim) * share
                run["rows"].append({**keys, "peer": peer, "tflops": rate, "median_s": 1.0})
        if which == "fwd" and seqlen == 16384:
            run["rows"].append({**keys, "peer": "math", "kind": "error", "message": "out of memory"})
    return run


class Tables(unittest.TestCase):
    def test_operations_are_those_of_the_field(self):
        full = peers.flops(("fwd", "bf16", "full", 128, 4096))
        self.assertEqual(full, 4 * 16384 * 4096 * 2048)
        self.assertEqual(peers.flops(("bwd", "bf16", "causal", 128, 4096)), 1.25 * full)
        self.assertEqual(peers.shape(("fwd", "f16", "full", 96, 65536)), (1, 21))

    def test_a_row_names_ours_over_the_best_peer(self):
        text = peers.table(made_up()["rows"], "fwd", "f16")
        self.assertIn("| head_dim | mask | seqlen | ours | SDPA, cuDNN | SDPA, flash | SDPA, math | ours / best peer |", text)
        self.assertIn("| 64 | full | 512 | 164 | 131 | 82 | - | 1.25 |", text)
        self.assertIn("| 256 | causal | 16384 | 356 | 285 | 178 | failed | 1.25 |", text)
        self.assertEqual(len(text.splitlines()), 2 + 3 * 2 * 6)

    def test_ours_alone_has_no_ratio(self):
        text = peers.table(made_up()["rows"], "bwd-det", "f16")
        self.assertIn("| head_dim | mask | seqlen | ours |\n| --- | --- | --- | --- |\n| 64 | full | 512 | 164 |\n", text)

    def test_the_times_of_a_host_are_no_rates(self):
        rows = [{**r, "tflops": None} for r in made_up()["rows"]]
        self.assertIn("1000.00 ms of the host", peers.table(rows, "fwd", "f16"))

    def test_the_page_says_what_is_missing(self):
        text = peers.page(made_up())
        self.assertIn("Time ran out: 2 rows were not measured.", text)
        self.assertIn("- SDPA, math: out of memory (fwd bf16 full 64 16384 and 11 more)", text)
        self.assertIn("8192^3 through PyTorch: 700 TFLOP/s", text)
        self.assertIn("A copy of 4.0 GiB within the card's memory: 4.25 TB/s", text)
        for which in ["forward", "backward", "deterministic backward"]:
            self.assertIn(f"### {which}, bf16, TFLOP/s", text)


class Plots(unittest.TestCase):
    def test_a_plot_is_an_image_of_every_panel(self):
        run = made_up()
        svg = peers.plot(run, "fwd", "bf16")
        document = xml.dom.minidom.parseString(svg)
        texts = [node.firstChild.data for node in document.getElementsByTagName("text")]
        for name in ["head_dim 64, full", "head_dim 256, causal", "ours", "SDPA, cuDNN", "64k", "512"]:
            self.assertIn(name, texts)
        self.assertTrue(any("Made-up <card> & co" in text for text in texts))
        self.assertEqual(len(document.getElementsByTagName("polyline")), 3 * 2 * 3)
        # Six lengths, and the long one at head_dim 128.
        self.assertEqual(len(document.getElementsByTagName("circle")), 3 * (2 * 3 * 6 + 2))
        width, height = (float(document.documentElement.getAttribute(name)) for name in ["width", "height"])
        for circle in document.getElementsByTagName("circle"):
            self.assertTrue(0 < float(circle.getAttribute("cx")) < width)
            self.assertTrue(0 < float(circle.getAttribute("cy")) < height)

    def test_higher_is_faster(self):
        points = lambda rate: peers.panel([{"seqlen": 512, "peer": "ours", "tflops": rate}], "", 0, 0, 100)
        height = lambda parts: float(parts[-1].split('cy="')[1].split('"')[0])
        self.assertLess(height(points(90)), height(points(10)))

    def test_axes_hold_what_they_show(self):
        for most in [0.3, 1, 7, 99, 101, 640, 1200]:
            end, step = peers.scale_end(most)
            self.assertGreaterEqual(end, most)
            self.assertEqual(end % step, 0)
            self.assertLessEqual(end / step, 7)

    def test_nothing_measured_is_no_plot(self):
        run = made_up()
        run["rows"] = [{**r, "tflops": None} for r in run["rows"]]
        self.assertIsNone(peers.plot(run, "fwd", "bf16"))


class Runs(unittest.TestCase):
    def test_files_come_back_as_they_were_written(self):
        with tempfile.TemporaryDirectory() as folder:
            _, paths = peers.write(made_up(), Path(folder))
            names = sorted(path.name for path in paths)
            stem = "1970-01-01-made-up-card-co"
            self.assertEqual(names, sorted(f"{stem}{end}" for end in ["-bwd-det.svg", "-bwd.svg", "-fwd.svg", ".json", ".md"]))
            self.assertEqual(json.loads((Path(folder) / f"{stem}.json").read_text()), made_up())
            self.assertIn(f"![forward, bf16]({stem}-fwd.svg)", (Path(folder) / f"{stem}.md").read_text())

    def test_the_whole_table_fits_a_booking(self):
        options = peers.arguments([])
        rows = list(peers.rows(options))
        self.assertEqual(len(rows), 2 * 3 * 2 * 6 * 3 + 2 * 3)
        self.assertLess(peers.estimate(rows, ["cudnn", "flash", "math", "fa3"], options), 600)

    def test_slow_peers_run_less_often_and_ours_does_not(self):
        options = peers.arguments([])
        long = ("bwd", "bf16", "full", 128, 65536)
        self.assertEqual(peers.runs_of("ours", long, options), 30)
        self.assertEqual(peers.runs_of("flash", long, options), 5)
        self.assertEqual(peers.runs_of("flash", ("fwd", "bf16", "full", 128, 512), options), 30)
        self.assertFalse(peers.measures("math", long, options))

    def test_a_program_that_hangs_or_ends_is_started_again(self):
        script = """
import sys
print('{"kind": "header", "name": "made up"}', flush=True)
for line in sys.stdin:
    if "hang" in line:
        import time; time.sleep(60)
    if "end" in line:
        sys.exit(3)
    print('{"kind": "row"}', flush=True)
"""
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "program"
            program.write_text(f"#!{sys.executable}\n{script}")
            program.chmod(0o755)
            ours = peers.Ours(peers.arguments(["--program", str(program)]))
            ours.PATIENCE = 1
            self.assertEqual(ours.header["name"], "made up")
            self.assertEqual(ours.measure(["row"]), {"kind": "row"})
            self.assertIn("no answer in 1 s", ours.measure(["hang"])["message"])
            self.assertIn("ended with status 3", ours.measure(["end"])["message"])
            self.assertEqual(ours.measure(["row"]), {"kind": "row"})
            ours.close()

    def test_an_unknown_peer_is_refused(self):
        with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            peers.arguments(["--peers", "cudnn,fast"])


if __name__ == "__main__":
    unittest.main()
