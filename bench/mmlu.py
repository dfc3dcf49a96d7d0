"""MMLU under `plain` against lm-eval's own HFLM: questions per second, and where the time goes.

    python bench/mmlu.py --data MMLU [--model tiny --num_fewshot 5 --per_subject 4]

The first questions of every subject, so that lengths are those of the whole test set, which `whole_set_seconds`
extrapolates to. Seconds are of processor time on a CPU, so that other work on the machine does not count. `apart` is
`plain` without running the beginning that a subject's prompts share once, `each_batch` with it run once a batch.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

from subject import seconds, settings, write

from harness.data import Labelled
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.methods.plain import Plain
from harness.plugins.registry import model_row
from harness.run.batches import Batching
from harness.run.system import ModelSystem
from harness.task import Generation, Selection
from harness.tasks.mmlu import MMLU

WHOLE = 14_042


def ours(
    lm: LanguageModel, task: MMLU, items: list[Labelled], size: int, *, share: bool = True, keep: bool = True
) -> dict[str, list[float]]:
    system = ModelSystem(lm, Plain(), Generation(1), batching=Batching(size))
    decoder, prefill = system.decoder, system.decoder._prefill
    decoder._begins_once &= share

    def forgetful(*rows: Any, **options: Any) -> Any:
        decoder._begun = (), None
        return prefill(*rows, **options)

    if not keep:
        decoder._prefill = forgetful  # type: ignore[method-assign]
    return {sample.id: sample.extra["logprobs"] for sample in task.respond(system, items)}


def theirs(lm: LanguageModel, items: list[Labelled], size: int) -> dict[str, list[float]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=lm.model, tokenizer=lm.encoder.tokenizer, batch_size=size, device=str(lm.device))
    asked = [(item.example, choice) for item in items for choice in item.example.choices]
    requests = [Instance("loglikelihood", {}, (example.text, choice), 0) for example, choice in asked]
    found: dict[str, list[float]] = {}
    for (example, _), (logprob, _) in zip(asked, model.loglikelihood(requests, disable_tqdm=True), strict=True):
        found.setdefault(example.id, []).append(logprob)
    return found


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """Seconds a piece of work takes: of the processor on a CPU, by the wall on a GPU."""

    def busy(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return busy if device == "cpu" else lambda work: seconds(work, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the CSVs")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--model_path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--subjects", default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num_fewshot", type=int, default=0)
    parser.add_argument("--per_subject", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = load_model(model_row(args.model, args.model_path), dtype=args.dtype, device=args.device)
    task = MMLU(args.data, args.subjects, num_fewshot=args.num_fewshot, per_subject=args.per_subject, users_from="none")
    items = list(task.items(Selection("test")))
    timed, size = clock(args.device), args.batch_size
    ours(lm, task, items[:size], size)  # allocations and kernels are made
    found: dict[str, dict[str, list[float]]] = {}
    took = {
        "hflm": timed(lambda: found.update(hflm=theirs(lm, items, size))),
        "plain": timed(lambda: found.update(plain=ours(lm, task, items, size))),
        "each_batch": timed(lambda: found.update(each_batch=ours(lm, task, items, size, keep=False))),
        "apart": timed(lambda: found.update(apart=ours(lm, task, items, size, share=False))),
    }
    encoder = lm.encoder
    encoder._whole.cache_clear()
    texts = [(item.example.template(item.example.text, (), ""), item.example.choices) for item in items]
    tokenising = timed(lambda: [(encoder.encode(text), [encoder.answer(c, text) for c in cs]) for text, cs in texts])
    worst = max(abs(a - b) for i in found["hflm"] for a, b in zip(found["hflm"][i], found["plain"][i], strict=True))
    assert found["each_batch"] == found["plain"]
    result = {
        "settings": settings(args, lm),
        "questions": len(items),
        "largest_difference_to_hflm_nats": worst,
        "results": {
            name: {
                "seconds": round(spent, 2),
                "questions_per_second": round(len(items) / spent, 1),
                "whole_set_seconds": round(spent / len(items) * WHOLE),
                "of_hflm": round(took["hflm"] / spent, 2),
            }
            for name, spent in took.items()
        },
        "tokenising_share_of_plain": round(tokenising / took["plain"], 3),
    }
    write(result, args.output)


if __name__ == "__main__":
    main()
