"""Seconds of BM25 over a growing history: every item of a user asked for among those before it, as training pairs are made.

    python bench/bm25.py [--items 1000 --words 150]

`anew` is rank_bm25's own class, built again for each item; `growing` is ours, one index that grows. Both score the same random
words (Zipf's law); the largest difference of a score is reported, and the ratio within this one run is the result.
"""

from __future__ import annotations

import argparse

import numpy as np
from rank_bm25 import BM25Okapi
from subject import seconds, write

from harness.plugins.retrieve import Bm25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--words", type=int, default=30, help="words an item; tweets have 15, abstracts 150")
    parser.add_argument("--every", type=int, default=10, help="rank_bm25 is timed on each N-th item and multiplied")
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    random = np.random.Generator(np.random.Philox(0))
    texts = [" ".join(map(str, random.zipf(1.3, args.words) % 20000)) for _ in range(args.items)]
    numbers = range(1, args.items, args.every)
    ours: list[np.ndarray] = []
    theirs: list[np.ndarray] = []

    def growing() -> None:
        index = Bm25(texts[:1])
        for text in texts[1:]:
            ours.append(index.scores(text))
            index.add(text)

    def anew() -> None:
        for n in numbers:
            theirs.append(BM25Okapi([text.split() for text in texts[:n]]).get_scores(texts[n].split()))

    spent = {"growing": seconds(growing, "cpu"), "anew": seconds(anew, "cpu") * len(texts) / len(numbers)}
    apart = max(float(np.abs(ours[n - 1] - scores).max()) for n, scores in zip(numbers, theirs, strict=True))
    result = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "seconds": {name: round(value, 3) for name, value in spent.items()},
        "times_faster": round(spent["anew"] / spent["growing"], 1),
        "largest_difference": apart,
    }
    write(result, args.output)


if __name__ == "__main__":
    main()
