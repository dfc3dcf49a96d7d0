"""What a batch takes of a CPU's memory against what `--batch_size auto` reckons with (`harness.engine.machine`).

    python bench/memory.py [--size 50m --tokens 256 1024 --batch_sizes 4 16]

A random model in float32; each measurement is a process of its own, which runs one short prompt first, so that what grows
is the batch alone. `share` is the peak's growth over the estimate: below 1 the estimate holds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from subject import SIZES, model, settings, write

from harness.data import Prompt
from harness.engine.decode import Decoder
from harness.engine.machine import row_bytes
from harness.engine.model import LanguageModel
from harness.plan import Plan, Stream
from harness.run.contract import ToyTemplate

NEW = 16


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(lm: LanguageModel, rows: int, tokens: int) -> None:
    decoder = Decoder(lm)
    texts = ["".join(chr(97 + (row + i) % 26) for i in range(tokens)) for row in range(rows)]
    plans = [Plan((Stream(Prompt(ToyTemplate(), text)),)) for text in texts]
    decoder.generate([decoder.prepare(str(n), plan, NEW) for n, plan in enumerate(plans)], max_new_tokens=NEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--tokens", type=int, nargs="+", default=(256, 1024))
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=(4, 16))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    if args.alone:
        lm = model(args.size, "cpu", torch.float32)
        answer(lm, 1, 16)
        before = peak_bytes()
        answer(lm, args.batch_sizes[0], args.tokens[0])
        print(json.dumps([peak_bytes() - before, args.batch_sizes[0] * row_bytes(lm, args.tokens[0], NEW)]))
        return
    found = []
    for tokens in args.tokens:
        for rows in args.batch_sizes:
            asked = ["--alone", "--size", args.size, "--tokens", str(tokens), "--batch_sizes", str(rows)]
            done = subprocess.run([sys.executable, __file__, *asked], capture_output=True, text=True, check=True)
            grown, estimate = json.loads(done.stdout)
            line = {"tokens": tokens, "rows": rows, "grown_mib": grown >> 20, "estimated_mib": estimate >> 20}
            found.append({**line, "share": round(grown / estimate, 2)})
    write({"settings": settings(args, model("toy", "cpu", torch.float32)), "results": found}, args.output)


if __name__ == "__main__":
    main()
