"""lm-eval under a method: with `plain` the numbers of lm-eval's own HFLM, and what differs under the others."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from harness.data import HistoryItem, Joint, Message, Prompt
from harness.engine.encoder import Encoder
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES
from harness.errors import DataMissing, UsageError
from harness.method import Method, Retrieval
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.methods.rag import RAG
from harness.plugins.registry import model_row, task_class
from harness.run.batches import Batching
from harness.run.contract import random_lm
from harness.run.lm_eval.bridge import MethodLM, generation_of
from harness.run.lm_eval.contexts import ContextTemplate, UserPool, query, written
from harness.run.system import ModelSystem
from harness.task import Generation, Selection
from harness.tasks.lm_eval_task import LmEvalTask
from harness.tasks.mmlu import MMLU

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
STORIES = SHARED / "stories260K/hf"
YAMLS = Path(lm_eval.__file__).parent / "tasks/mmlu/default"


def hflm(lm: LanguageModel) -> HFLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(pretrained=lm.model, tokenizer=lm.encoder.tokenizer, batch_size=4, device="cpu")


def bridge(lm: LanguageModel, method: Method | None = None, users: UserPool | None = None) -> MethodLM:
    return MethodLM(ModelSystem(lm, method or Plain(), Generation(8), batching=Batching(4)), users)


def ask(pairs: Sequence[tuple[str, Any]], kind: Any = "loglikelihood", same_doc: bool = False) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("task", 0 if same_doc else n, 1)) for n, pair in enumerate(pairs)]


def assert_equal(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    """In float64, so that neither side's order of sums decides which token is the likeliest; lm-eval may round to float32."""
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-6)


PAIRS = [
    ("A question?\nAnswer:", " A"),
    ("A question?\nAnswer:", " B"),
    ("A question?\nAnswer:", " a longer answer"),
    ("It ends in a space ", "word"),
    ("two lines\n\n", "and more"),
    ("", "no context at all"),
    ("", "<s>a begin token first"),
    ("<s>begun already", " yes"),
    ("x" * 700 + " too long", " cut"),
    ("y" * 508, "four"),
    ("y" * 509, "four"),
    ("z" * 30, "w" * 500),
]


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_gives_the_log_likelihoods_of_hflm(family: str, bos: bool) -> None:
    lm = random_lm(family)
    if bos:
        processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
        lm.encoder.tokenizer.backend_tokenizer.post_processor = processor
    assert_equal(bridge(lm).loglikelihood(ask(PAIRS)), hflm(lm).loglikelihood(ask(PAIRS), disable_tqdm=True))


def test_an_answer_depends_on_no_other_request() -> None:
    lm = random_lm()
    together = bridge(lm).loglikelihood(ask(PAIRS, same_doc=True))
    for pair, found in zip(reversed(PAIRS), reversed(together), strict=True):
        ((logprob, greedy),) = bridge(lm).loglikelihood(ask([pair]))
        assert (logprob, greedy) == (pytest.approx(found[0], rel=1e-9), found[1])


def test_what_does_not_fit_is_cut_from_the_left_and_counted() -> None:
    lm = random_lm()
    asked = bridge(lm)
    asked.loglikelihood(ask(PAIRS))
    cut = sorted(asked.system.cut_tokens.values())
    # 709 + 4 tokens, of which 512 are read and one more is predicted; 30 + 500 and 509 + 4 lose 17 and none
    assert cut == [30 + 500 - 513, 709 + 4 - 513]
    assert asked.get_model_info()["contexts_cut_from_the_left"] == 2


@pytest.mark.parametrize("stop", [["\n"], ["e", "o"], []])
def test_plain_generates_what_hflm_generates(stop: list[str]) -> None:
    lm = random_lm()
    settings = {"until": stop, "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    pairs = [(context, settings) for context, _ in PAIRS if context]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hflm(lm).generate_until(ask(pairs, "generate_until"), disable_tqdm=True)
    assert bridge(lm).generate_until(ask(pairs, "generate_until")) == expected


def test_generation_settings_that_no_plan_can_follow_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'num_beams' is not supported; allowed: max_gen_toks, "):
        generation_of({"num_beams": 4})
    assert generation_of({}) == Generation(256)
    sampled = generation_of({"do_sample": True, "temperature": 0.5, "until": "\n", "max_new_tokens": 3})
    assert (sampled.max_new_tokens, sampled.stop, sampled.sampling.temperature) == (3, ("\n",), 0.5)


def test_perplexity_of_whole_texts_and_the_response_cache_are_refused_in_one_line() -> None:
    asked = bridge(random_lm())
    with pytest.raises(UsageError, match="a method answers prompts"):
        asked.loglikelihood_rolling([])
    with pytest.raises(UsageError, match="knows neither method nor user"):
        asked.set_cache_hook(None)
    with pytest.raises(UsageError, match="more than text"):
        asked.loglikelihood(ask([("look:", "a", {"visual": 1})]))  # type: ignore[list-item]


# Users and history


POOL = UserPool("lamp4")


def test_documents_get_the_same_user_whatever_else_is_asked() -> None:
    names = [f"task/{n}" for n in range(40)]
    users = [POOL.user(name).id for name in names]
    assert users == [UserPool("lamp4").user(name).id for name in names]
    assert len(set(users)) > 20
    assert users != [UserPool("lamp4", seed=1).user(name).id for name in names]
    assert UserPool("none").user("task/1").history == ()


def test_equal_contexts_of_two_users_are_two_prompts() -> None:
    lm = random_lm(max_position_embeddings=4096)
    pairs = [("Which letter?\nAnswer:", " A")] * 2
    first, second = bridge(lm, RAG(Retrieval(k=2)), POOL).loglikelihood(ask(pairs))
    assert POOL.user("task/0") != POOL.user("task/1")
    assert abs(first[0] - second[0]) > 1e-6
    plain = bridge(lm, Plain(), POOL).loglikelihood(ask(pairs))
    assert plain[0][0] == pytest.approx(plain[1][0], rel=1e-9)


def test_history_is_dropped_before_the_context_is_cut() -> None:
    encoder, template = random_lm().encoder, ContextTemplate()
    items = tuple(
        HistoryItem(str(n), {"text": "word " * 10}, "") for n in range(5)
    )  # 59 bytes each, and 31 to announce them
    for length, kept, cut in ((100, 5, 0), (300, 3, 0), (500, 0, 0), (530, 0, 18)):
        fitted = encoder.encode_within(Prompt(template, "q" * length, items), 512)
        assert (fitted.items, fitted.dropped, fitted.cut) == (kept, 5 - kept, cut)
        assert len(fitted.encoded.ids) == 512 if cut else len(fitted.encoded.ids) <= 512


def test_under_a_method_every_stream_scores_the_same_continuation() -> None:
    lm = random_lm(max_position_embeddings=4096)
    pairs = [("Which letter?\nAnswer:", f" {letter}") for letter in "ABCD"]
    half = bridge(lm, CAD(Retrieval(k=2), alpha=0.0), POOL).loglikelihood(ask(pairs, same_doc=True))
    with_history = bridge(lm, RAG(Retrieval(k=2)), POOL).loglikelihood(ask(pairs, same_doc=True))
    assert_equal(half, with_history)


def test_a_history_stands_before_the_context_or_in_the_first_user_turn() -> None:
    items = [HistoryItem("1", {"title": "Old", "text": "news"}, "")]
    told = "About the person who asks: calm\nRecords of the person who asks:\n- title: Old; text: news"
    assert ContextTemplate()("Q?\nAnswer:", items, "calm") == Joint(f"{told}\n\nQ?\nAnswer:")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    expected = (Message("system", "Be brief."), Message("user", f"{told}\n\nQ?"))
    assert ContextTemplate()(written(turns), items, "calm") == Joint(expected)
    assert ContextTemplate()(written(turns), (), "") == Joint((expected[0], Message("user", "Q?")))


def test_a_history_is_searched_with_the_question_and_not_with_the_examples() -> None:
    assert query("About cats.\n\nQ: one?\nA: yes\n\nQ: two?\nA:") == "Q: two?\nA:"
    assert query(written([{"role": "user", "content": "Shots.\n\nLast?"}])) == "Last?"


# Conversations


def test_a_conversation_is_written_out_as_hflm_writes_it() -> None:
    lm = random_lm()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One or two?"}]
    goes_on = [*turns, {"role": "assistant", "content": "The answer is"}]
    other, own = hflm(lm), bridge(lm)
    pairs, expected = [], []
    for conversation, opened in ((turns, True), (goes_on, False)):
        for letter in "AB":
            pairs.append((own.apply_chat_template(conversation, opened), letter))
            expected.append((other.apply_chat_template(conversation, opened), letter))
    found = own.loglikelihood(ask(pairs))
    assert_equal(found, other.loglikelihood(ask(expected), disable_tqdm=True))
    assert len(set(found)) == 4


def test_a_conversation_without_a_chat_template_is_one_line() -> None:
    own = bridge(random_lm(chat=False))
    context = own.apply_chat_template([{"role": "user", "content": "One or two?"}])
    with pytest.raises(UsageError, match="no chat template"):
        own.loglikelihood(ask([(context, "A")]))


# Whole tasks


SUBJECTS = ("abstract_algebra", "virology")


@pytest.fixture(scope="session")
def csvs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MMLU of our own questions, in the original layout."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split, count in (("dev", 5), ("val", 3), ("test", 7)):
        (folder / split).mkdir()
        for subject in SUBJECTS:
            rows = [
                [
                    f"{subject.title()}: how many is {n} and {k}?",
                    n + k,
                    n - k,
                    "NA" if n == 2 else n * k,
                    f" {k} ",
                    "ABCD"[n % 4],
                ]
                for k, n in enumerate(range(count), start=2)
            ]
            rows[0][0] = f"A question\nof two lines about {subject}?"
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


def mmlu_of_lm_eval(folder: Path, source: Path, subjects: Sequence[str], limit: int | None = None) -> TaskManager:
    """lm-eval's own task files, pointed at questions read from the CSVs."""
    folder.mkdir(exist_ok=True)
    for subject in subjects:
        files = {}
        for split in ("dev", "test"):
            with (source / split / f"{subject}_{split}.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[: limit if split == "test" else None]
            docs = [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows]
            files[split] = str(folder / f"{subject}_{split}.json")
            Path(files[split]).write_text("\n".join(json.dumps(doc) for doc in docs))
        config = {
            "include": str(YAMLS / f"mmlu_{subject}.yaml"),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        (folder / f"{subject}.yaml").write_text(yaml.safe_dump(config))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, manager: TaskManager, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
        )
    assert results is not None
    return results


@pytest.fixture(autouse=True)
def _library_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()


@dataclass(frozen=True)
class Case:
    shots: int
    chat: bool = False
    multiturn: bool = False


CASES = [Case(0), Case(5), Case(5, chat=True), Case(2, chat=True, multiturn=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mmlu_asks_what_lm_eval_asks_and_plain_answers_what_hflm_answers(
    case: Case, csvs: Path, tmp_path: Path
) -> None:
    lm = random_lm(dtype=torch.float32, max_position_embeddings=2048)
    _assert_mmlu_equal(lm, csvs, SUBJECTS, case, tmp_path, None)


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ["stories260K", "tiny"])
def test_mmlu_on_real_questions_and_trained_models_equals_hflm(name: str, shots: int, tmp_path: Path) -> None:
    source = SHARED / "mmlu/data"
    if not source.is_dir() or not (name == "tiny" or STORIES.is_dir()):
        pytest.skip(f"no {source} or {STORIES} (set HARNESS_SHARED)")
    lm = load_model(model_row("tiny" if name == "tiny" else str(STORIES)), device="cpu", dtype="float64")
    subjects = ("abstract_algebra" if shots else "high_school_us_history", "virology")  # histories are often cut
    _assert_mmlu_equal(lm, source, subjects, Case(shots), tmp_path, limit=7 - shots)


def _assert_mmlu_equal(
    lm: LanguageModel, source: Path, subjects: Sequence[str], case: Case, tmp_path: Path, limit: int | None
) -> None:
    manager = mmlu_of_lm_eval(tmp_path / "tasks", source, subjects, limit)
    names = [f"mmlu_{subject}" for subject in subjects]
    options: dict[str, Any] = {
        "num_fewshot": case.shots,
        "apply_chat_template": case.chat,
        "fewshot_as_multiturn": case.multiturn,
    }
    theirs = evaluate(hflm(lm), manager, names, **options)
    bridged = evaluate(bridge(lm), manager, names, **options)
    task = MMLU(str(source), ",".join(subjects), case.shots, limit, case.chat, case.multiturn)
    items = task.items(Selection("test"))
    system = ModelSystem(lm, Plain(), Generation(1), batching=Batching(4))
    samples = {sample.id: task.grade(sample) for sample in task.respond(system, items)}
    metrics = task.aggregate(list(samples.values()))
    for subject, name in zip(subjects, names, strict=True):
        accuracy = theirs["results"][name]["acc,none"]
        assert bridged["results"][name]["acc,none"] == accuracy
        assert metrics[f"accuracy/{subject}"].value == pytest.approx(accuracy)
        for one, other in zip(theirs["samples"][name], bridged["samples"][name], strict=True):
            expected = [tuple(resp) for resp in one["filtered_resps"]]
            assert_equal([tuple(resp) for resp in other["filtered_resps"]], expected)
            sample = samples[f"{subject}/{one['doc_id']}"]
            ours = list(zip(sample.extra["logprobs"], sample.extra["greedy"], strict=True))
            assert_equal(ours, expected)
            assert not case.chat or other["arguments"][0][0].startswith("\x02")
    if not case.chat:
        contexts = {item.example.id: item.example.text for item in items}
        for subject, name in zip(subjects, names, strict=True):
            assert [contexts[f"{subject}/{s['doc_id']}"] for s in theirs["samples"][name]] == [
                s["arguments"][0][0] for s in theirs["samples"][name]
            ]


DOCS = [{"q": f"what is {n}", "options": [f"{n}", f"{n + 1}", "none of them"], "gold": n % 3} for n in range(6)]
LOCAL: Mapping[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "Q: {{q}}\nA:", "doc_to_choice": "options", "doc_to_target": "gold",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info")],
    },
    "contexts": {
        "output_type": "multiple_choice", "doc_to_text": "{{gold}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "is it so", "metric_list": [{"metric": "acc"}],
    },
    "last_word": {
        "output_type": "loglikelihood", "doc_to_text": "{{q}} is", "doc_to_target": " {{options[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "Q: {{q}}\nA:", "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "filter_list": [
            {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of one's own."""
    folder = tmp_path_factory.mktemp("local")
    docs = folder / "docs.json"
    docs.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    for name, config in LOCAL.items():
        config = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(docs)}},
        } | config
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, "test_split": "test"}))
    group = {
        "group": "own_group",
        "task": ["own_choices", "own_contexts"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


def _run(lm: LanguageModel, name: str, folder: Path, method: Method | None = None) -> tuple[LmEvalTask, list[Any]]:
    task = task_class(f"lm_eval:{name}")(data=str(folder))  # type: ignore[call-arg]
    assert isinstance(task, LmEvalTask)
    defaults = task.generation()
    generation = Generation(defaults.max_new_tokens, defaults.stop)
    system = ModelSystem(lm, method or Plain(), generation, batching=Batching(4))
    return task, [task.grade(sample) for sample in task.respond(system, task.items(Selection("test")))]


@pytest.mark.parametrize("name", LOCAL)
def test_any_lm_eval_task_gives_a_record_with_lm_evals_numbers(name: str, local: Path) -> None:
    lm = random_lm()
    manager = TaskManager(include_path=str(local), include_defaults=False)
    expected = evaluate(hflm(lm), manager, [f"own_{name}"])
    task, samples = _run(lm, f"own_{name}", local)
    metrics = task.aggregate(samples)
    numbers = {
        key: value for key, value in expected["results"][f"own_{name}"].items() if isinstance(value, float | int)
    }
    for key, metric in metrics.items():
        assert metric.value == pytest.approx(numbers[key if "," in key else f"{key},none"], rel=1e-6)
        assert metric.n == len(DOCS)
    assert len(metrics) == len(LOCAL[name]["metric_list"])
    by_id = {sample.id: sample for sample in samples}
    for one in expected["samples"][f"own_{name}"]:
        sample = by_id[f"own_{name}/{one['doc_id']}"]
        for ours, theirs in zip(sample.extra["resps"], one["resps"], strict=True):
            if name == "written":
                assert ours == theirs[0]
            else:
                assert_equal([tuple(ours)], [tuple(theirs[0])])


def test_a_group_pools_its_documents_and_names_its_tasks(local: Path) -> None:
    task, samples = _run(random_lm(), "own_group", local)
    metrics = task.aggregate(samples)
    parts = [metrics["acc/own_choices"], metrics["acc/own_contexts"]]
    assert metrics["acc"].n == 12 == sum(part.n for part in parts)
    assert metrics["acc"].value == pytest.approx(sum(part.value or 0 for part in parts) / 2)
    assert "acc_norm/own_choices" in metrics


def test_an_lm_eval_task_runs_from_the_command_line_and_goes_on(harness: Callable, toy: Path, local: Path) -> None:
    line = f"run --task lm_eval:own_contexts --method plain --method rag --model {toy} --data {local} --set rag.k=1"
    done = harness(f"{line} --limit 5")
    assert done.code == 0, done.err
    assert "already there" in harness(f"{line} --limit 5").err
    (folder,) = Path("runs/toy").glob("lm_eval*/rag-*")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert {line["user"] for line in lines} <= {f"{20_000 + n}" for n in range(200)}
    assert {line["finish"] for line in lines} == {"choice"}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("--task lm_eval", 2, "name one as in lm_eval:hellaswag"),
        ("--task lm_eval:own_choices --split dev", 2, "lm-eval itself says which split"),
        ("--task lm_eval:own_choices --method dps", 4, "--fit_task lamp4"),
        ("--task lamp4:own", 2, "task 'lamp4' is no family of tasks"),
        ("--task lamp4 --num_fewshot 2", 2, "task 'lamp4' has no option 'num_fewshot'"),
    ],
)
def test_a_mistake_is_one_line(harness: Callable, toy: Path, local: Path, line: str, code: int, words: str) -> None:
    method = "" if "--method" in line else "--method plain"
    data = f"--data {local}" if "lm_eval" in line else ""
    done = harness(f"run {line} {method} --model {toy} {data}")
    assert (done.code, words in done.error()) == (code, True), done.err


def test_an_absent_data_set_says_what_is_missing(tmp_path: Path) -> None:
    config = {"task": "own_absent", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/nowhere.json"}}}
    (tmp_path / "absent.yaml").write_text(yaml.safe_dump({**config, **LOCAL["choices"], "test_split": "test"}))
    task = task_class("lm_eval:own_absent")(data=str(tmp_path))  # type: ignore[call-arg]
    with pytest.raises(DataMissing, match=r"lm_eval:own_absent cannot be loaded .*hub's cache, or the network"):
        task.items(Selection("test"))


def test_the_encoder_says_when_a_continuation_adds_nothing() -> None:
    encoder: Encoder = random_lm().encoder
    with pytest.raises(Exception, match="adds no token"):
        encoder.answer("", Joint("some context"))
