"""lm-eval asks, a method answers: a `ModelSystem` as an lm-eval model.

    ModelSystem(lm, method, generation) -> MethodLM(system, users) -> lm_eval.simple_evaluate(model=..., tasks=["mmlu"], ...)

Code read: EleutherAI/lm-evaluation-harness 0.4.13, api/model.py and models/huggingface.py. With `plain` the numbers are
HFLM's: context and continuation are tokenised together, a BOS is added as its tokenizer call adds one, and what does not
fit is cut from the left (see `harness.data.Joint`). Differs from that code:
- Under a method with history the history is dropped first, item by item, and only then is the context cut; both are counted.
- A conversation reaches the method as messages; HFLM has written it out by then. Templates get no day and no thoughts.
- Choices that differ in their last token cost one pass for each user and prompt; HFLM shares by text, whoever the user is.
- Whole-text perplexity is refused: a method answers a prompt, and there is none.
- lm-eval's response cache is refused: its keys know neither the method nor the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from harness.data import Example
from harness.errors import UsageError
from harness.plan import Sampling
from harness.run.lm_eval.contexts import ContextTemplate, UserPool, query, written
from harness.run.system import ModelSystem
from harness.task import Generation

MAX_GEN_TOKS = 256
"""What a task that does not say may generate, as HFLM has it."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k")


class MethodLM(LM):
    """An lm-eval model whose answers are a method's."""

    def __init__(self, system: ModelSystem, users: UserPool | None = None) -> None:
        """`users` are dealt to documents; without any everyone is a user without a history."""
        super().__init__()
        self.system = system
        self.users = users or UserPool("none")
        self._device = system.lm.device

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-probability in nats, and whether greedy decoding would give it."""
        by_context: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            by_context.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(number)
        groups = list(by_context.values())
        examples = [self._example(requests[group[0]], number) for number, group in enumerate(groups)]
        scores = self.system.score(
            examples,
            [[_second(requests[number], str) for number in group] for group in groups],
            alike=lambda example: example.id.partition("/")[0],
        )
        found: dict[int, tuple[float, bool]] = {}
        for group, scored in zip(groups, scores, strict=True):
            for number, score in zip(group, scored, strict=True):
                found[number] = (sum(score.logprobs), all(score.greedy))
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UsageError(
            "a method answers prompts, and the perplexity of a whole text has none; choose a task that scores "
            "continuations, offers choices or asks for text"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses, decoded as each request's settings say; greedy unless they ask for samples."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(json.dumps(_second(request, dict), sort_keys=True), []).append(number)
        found: dict[int, str] = {}
        for settings, numbers in by_settings.items():
            examples = [self._example(requests[number], number, scored=False) for number in numbers]
            generation = generation_of(json.loads(settings), seed=self.system.generation.sampling.seed)
            answers = self.system.generate(examples, generation)
            found.update({number: answer.text for number, answer in zip(numbers, answers, strict=True)})
        return [found[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation, not yet written out: the method speaks first."""
        return written(chat_history, open_turn=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.system.lm.encoder.tokenizer.chat_template or ""

    @property
    def tokenizer_name(self) -> str:
        """Names what lm-eval keeps: contexts here are the same for all models."""
        return "conversation"

    def set_cache_hook(self, cache_hook: Any) -> None:
        raise UsageError(
            "lm-eval's response cache knows neither method nor user and would mix them; leave use_cache out"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What stands in lm-eval's results beside the model's name."""
        lm, method = self.system.lm, self.system.method
        return {
            "model_num_parameters": lm.parameters,
            "model_dtype": lm.dtype,
            "model_revision": lm.revision,
            "model_source": lm.source,
            "method": type(method).__name__,
            "method_options": method.options(),
            "users": self.users.describe(),
            "contexts_cut_from_the_left": len(self.system.cut_tokens),
        }

    def _example(self, request: Instance, number: int, *, scored: bool = True) -> Example:
        context, name = request.args[0], f"{request.task_name}/{request.doc_id}"
        user = self.users.user(name)
        return Example(f"{name}/{number}", user, context, query(context), ContextTemplate(scored))


def generation_of(settings: Mapping[str, Any], *, seed: int = 0) -> Generation:
    """lm-eval's generation settings as the engine's. Raises UsageError for those a plan cannot be decoded with."""
    unknown = [name for name in settings if name not in _KNOWN]
    if unknown:
        raise UsageError(f"generation setting {unknown[0]!r} is not supported; allowed: {', '.join(_KNOWN)}")
    lengths = [int(settings[name]) for name in _LENGTHS if settings.get(name) is not None]
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0)
    sampled = settings.get("do_sample", temperature > 0) and temperature > 0
    sampling = Sampling(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0), seed)
    return Generation(
        max_new_tokens=(lengths or [MAX_GEN_TOKS])[0],
        stop=(until,) if isinstance(until, str) else tuple(until),
        sampling=sampling if sampled else Sampling(seed=seed),
    )


def _second(request: Instance, kind: type) -> Any:
    """The continuation, or the settings, of a request about text alone."""
    args: Sequence[Any] = request.args
    if len(args) != 2 or not isinstance(args[1], kind):
        raise UsageError(f"{request.task_name} asks about more than text, which a text model cannot answer")
    return args[1]
