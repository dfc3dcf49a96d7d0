"""LoRA of all users and of each: PEFT's arithmetic, PEFT's files, and no user's data in another's adapter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch

from harness.data import Example, Labelled, User
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.training.train import train
from harness.engine.weights.adapters import adapter_identity, read_adapter, write_adapter
from harness.errors import DataMissing, HarnessError, UsageError, UserFailed
from harness.fit.kit import ModelKit
from harness.fit.trains import lora
from harness.fit.writer import Summaries
from harness.method import Fitted, Method, Retrieval, Written
from harness.methods.lora_c import LoRAC
from harness.methods.lora_p import LoRAP
from harness.methods.oppu import OPPU
from harness.methods.perfit import PerFit
from harness.plan import Plan
from harness.plugins.registry import model_row
from harness.run.contract import ToyTemplate, check_method, random_lm, toy_examples
from harness.training import Adapter, Learner, Recipe

# PEFT asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUICK = {"lr": 1e-2, "batch_size": 2}
TRAIN = toy_examples(5, seed=1)
USERS = [item.example.user for item in toy_examples(4, seed=2)]
GPT2 = {"targets": "c_attn", "rank": 2}


def _fitted(states: Sequence[Fitted | UserFailed | None]) -> list[Fitted]:
    assert all(isinstance(state, Fitted) for state in states), states
    return [state for state in states if isinstance(state, Fitted)]


def _equal(a: Fitted, b: Fitted) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.allclose(a.tensors[name], b.tensors[name], atol=1e-9, rtol=0) for name in a.tensors
    )


def _logp(lm: LanguageModel, plan: Plan) -> torch.Tensor:
    decoder = Decoder(lm)
    return decoder.distributions([decoder.prepare("x", plan, 4)], [(9, 8, 7)])[0]


@pytest.mark.parametrize(
    "method",
    [LoRAC(), LoRAP(), OPPU(), OPPU(retrieval=Retrieval(k=2)), OPPU(profile="self")],
    ids=["lora_c", "lora_p", "oppu", "oppu+rag", "oppu+pag"],
)
def test_lora_methods_keep_their_promises(method: Method) -> None:
    check_method(method)


def test_lora_methods_keep_their_promises_with_fused_projections() -> None:
    check_method(OPPU(targets="c_attn", personal_targets="attn.c_proj,c_fc", rank=2), lm=random_lm("gpt2"))


# The arithmetic is PEFT's


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_trains_as_peft_trains_it(family: str) -> None:
    lm = random_lm(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    lessons = LoRAP().learners(USERS[:1])[0].lessons
    steps, recipe = 5, Recipe(epochs=5, batch_size=len(lessons), lr=1e-2, warmup=0.0, schedule="constant")
    learner = Learner("ann", lessons)
    (first,) = _fitted(train(lm, [learner], [Adapter(tuple(targets), 4, 2.0)], dataclasses.replace(recipe, epochs=0)))
    (ours,) = _fitted(train(lm, [learner, Learner("bob", lessons[:1])], [Adapter(tuple(targets), 4, 2.0)], recipe)[:1])

    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(lm.model, config)
    assert {name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad} == set(
        first.tensors
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.double()
    peft.set_peft_model_state_dict(model, dict(first.tensors))
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    for _ in range(steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for lesson in lessons:
            prompt = lm.encoder.encode(lesson.stream.prompt.render()).ids
            answer = [*lm.encoder.answer(lesson.answer, lesson.stream.prompt.render()), 1]
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
            count += len(answer)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
    theirs = peft.get_peft_model_state_dict(model)
    model.unload()
    assert theirs.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-8, rtol=0), name


def test_parameters_are_those_of_the_published_table() -> None:
    lm = random_lm(num_hidden_layers=2, num_key_value_heads=4)
    for targets, matrices in (("q_proj,k_proj,v_proj", 3), ("q_proj,v_proj", 2)):
        (state,) = _fitted(LoRAP(targets=targets).adapt(ModelKit(lm), USERS[:1], None))
        assert state.meta["parameters"] == matrices * 2 * 8 * (32 + 32)  # blocks, rank, in + out


# Who learns from what


def test_every_user_starts_fresh_whoever_comes_before(lm: LanguageModel) -> None:
    method, kit = OPPU(**QUICK), ModelKit(lm)
    shared = method.fit(kit, TRAIN)
    before = {name: tensor.clone() for name, tensor in shared.tensors.items()}
    forth = _fitted(method.adapt(kit, USERS, shared))
    back = _fitted(method.adapt(kit, USERS[::-1], shared))[::-1]
    for user, a, b in zip(USERS, forth, back, strict=True):
        assert _equal(a, b) and _equal(a, _fitted(method.adapt(kit, [user], shared))[0])
    assert not _equal(forth[0], forth[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.tensors.items())


def test_another_users_history_changes_no_adapter(lm: LanguageModel) -> None:
    other = User(USERS[1].id, USERS[1].history, tuple(dataclasses.replace(p, targets=("zzz",)) for p in USERS[1].pairs))
    a, b = (_fitted(LoRAP(**QUICK).adapt(ModelKit(lm), [USERS[0], user], None)) for user in (USERS[1], other))
    assert _equal(a[0], b[0]) and not _equal(a[1], b[1])


def test_under_another_users_history_is_that_users_adapter(lm: LanguageModel) -> None:
    method = LoRAP(**QUICK)
    own, wrong = _fitted(method.adapt(ModelKit(lm), [USERS[0], User("new", USERS[0].history, USERS[0].pairs)], None))
    assert _equal(own, wrong)


def test_oppu_is_both_adapters_one_on_the_other_as_if_merged_and_merges_nothing(lm: LanguageModel) -> None:
    method = OPPU(**QUICK)
    shared = method.fit(ModelKit(lm), TRAIN)
    (personal,) = _fitted(method.adapt(ModelKit(lm), USERS[:1], shared))
    example = TRAIN[0].example
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    stacked = _logp(lm, method.plan(example, shared, personal))
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    for state in (shared, personal):
        for name, (down, up) in lora(state).weights.items():
            lm.model.get_submodule(name).weight.data += up @ down
    merged = _logp(lm, Plan((method.plan(example, shared, personal).streams[0].bare(),)))
    assert torch.allclose(stacked, merged, atol=1e-10)


def test_a_user_without_pairs_has_the_collective_adapter_alone(lm: LanguageModel) -> None:
    method = OPPU(**QUICK)
    shared = method.fit(ModelKit(lm), TRAIN)
    states = _fitted(method.adapt(ModelKit(lm), [User("new"), USERS[0]], shared))
    counts = [len(method.plan(TRAIN[0].example, shared, state).streams[0].adapters) for state in states]
    assert counts == [1, 2]


def test_missing_adapters_and_targets_are_named(lm: LanguageModel) -> None:
    example = TRAIN[0].example
    for method in (LoRAC(), OPPU()):
        with pytest.raises(HarnessError, match="adapter was trained; run 'harness fit"):
            method.plan(example, None, None)
    for targets in ("q_proj,out_proj", ""):
        with pytest.raises(UsageError, match=r"LoRA target '(out_proj)?' matches no module"):
            LoRAC(targets=targets).fit(ModelKit(lm), TRAIN)


def test_a_stage_that_fails_is_one_line_that_names_who() -> None:
    lm = random_lm(dtype=torch.float32)
    with pytest.raises(HarnessError, match=r"training 'all users': the .* at step .*; lower the learning rate"):
        LoRAC(lr=1e30, clip=0.0).fit(ModelKit(lm), TRAIN)
    states = LoRAP(lr=1e30, clip=0.0).adapt(ModelKit(lm), USERS, None)
    assert [isinstance(state, UserFailed) and user.id in str(state) for state, user in zip(states, USERS, strict=True)]


# PEFT's files


def test_our_adapter_in_plain_peft_gives_the_same_distributions(lm: LanguageModel, tmp_path: Path) -> None:
    for model, options in ((lm, {}), (random_lm("gpt2"), GPT2)):
        method = LoRAC(**QUICK, alpha=3.0, **options)
        shared = method.fit(ModelKit(model), TRAIN)
        folder = tmp_path / model.name
        write_adapter(shared, folder, model)
        plan = method.plan(TRAIN[0].example, shared, None)
        ours, bare = _logp(model, plan), _logp(model, Plan((plan.streams[0].bare(),)))
        loaded = peft.PeftModel.from_pretrained(model.model, folder, autocast_adapter_dtype=False)
        theirs = _logp(model, Plan((plan.streams[0].bare(),)))
        loaded.unload()
        assert torch.allclose(ours, theirs, atol=1e-10)
        assert not torch.allclose(ours, bare, atol=1e-3)
        assert _equal(read_adapter(folder, model), shared)


def _peft_folder(lm: LanguageModel, folder: Path, **settings: object) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)  # type: ignore[arg-type]
    model = peft.get_peft_model(lm.model, config)
    model.save_pretrained(folder)
    model.unload()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "use_rslora": True},
        {
            "r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "o_proj"], "rank_pattern": {"o_proj": 5},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 3},
        },
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_peft_made_runs_as_in_peft(
    lm: LanguageModel, tmp_path: Path, settings: dict[str, object]
) -> None:
    _peft_folder(lm, tmp_path / "theirs", **settings)
    method = LoRAC(adapter=str(tmp_path / "theirs"))
    shared = method.fit(ModelKit(lm), [])
    plan = method.plan(TRAIN[0].example, shared, None)
    ours = _logp(lm, plan)
    loaded = peft.PeftModel.from_pretrained(lm.model, tmp_path / "theirs", autocast_adapter_dtype=False)
    theirs = _logp(lm, Plan((plan.streams[0].bare(),)))
    loaded.unload()
    assert torch.allclose(ours, theirs, atol=1e-6)  # PEFT starts its matrices in fp32
    assert not torch.allclose(ours, _logp(lm, Plan((plan.streams[0].bare(),))), atol=1e-3)


@pytest.mark.parametrize(
    "begun", [True, "gaussian", "mica", "orthogonal", "pissa", "pissa_niter_4", "olora", "unheard_of"]
)
def test_an_adapter_whose_loading_changes_the_models_weights_is_refused(tmp_path: Path, begun: object) -> None:
    lm = random_lm(dtype=torch.float32)
    _peft_folder(lm, tmp_path / "theirs", r=2, target_modules=["q_proj"])
    file = tmp_path / "theirs/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": begun}))
    changed = True
    if begun != "unheard_of":
        other = random_lm(dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(other.model, tmp_path / "theirs")
        now = dict(loaded.unload().named_parameters())
        changed = any(not torch.equal(weight, now[name]) for name, weight in lm.model.named_parameters())
    if changed:
        with pytest.raises(UsageError, match=rf"is no plain LoRA \(init_lora_weights='{begun}'\)"):
            read_adapter(tmp_path / "theirs", lm)
    else:
        assert read_adapter(tmp_path / "theirs", lm).tensors


def test_one_adapter_at_two_scales_is_two_in_a_batch(lm: LanguageModel) -> None:
    shared = LoRAC(**QUICK).fit(ModelKit(lm), TRAIN)
    states = [dataclasses.replace(shared, meta={**shared.meta, "scale": scale}) for scale in (1.0, 5.0)]
    plans = [LoRAC().plan(TRAIN[0].example, state, None) for state in states]
    decoder = Decoder(lm)
    together = decoder.distributions([decoder.prepare("x", plan, 4) for plan in plans], [(9, 8, 7)] * 2)
    for plan, logp in zip(plans, together, strict=True):
        assert torch.allclose(logp, _logp(lm, plan), atol=1e-10)


def test_personal_adapters_are_read_by_user_id_and_who_has_none_is_a_failure(lm: LanguageModel, tmp_path: Path) -> None:
    for user in USERS[:2]:
        _peft_folder(lm, tmp_path / user.id, r=2, target_modules=["q_proj"])
    method = LoRAP(adapters=str(tmp_path))
    a, b, missing = method.adapt(ModelKit(lm), USERS[:3], None)
    assert isinstance(missing, UserFailed) and f"{USERS[2].id} has no adapter_config.json" in str(missing)
    assert not _equal(*_fitted([a, b]))
    (given,) = method.adapt(
        ModelKit(lm), [dataclasses.replace(USERS[2], history=USERS[1].history, pairs=USERS[1].pairs)], None
    )
    assert _equal(*_fitted([b, given]))  # as --control wrong_user has it
    assert (
        method.options()["adapters"] == adapter_identity(str(tmp_path)) != adapter_identity(str(tmp_path / USERS[0].id))
    )


def test_a_module_whose_matrices_count_nothing_is_no_scale_for_others(lm: LanguageModel, tmp_path: Path) -> None:
    _peft_folder(
        lm, tmp_path, r=2, lora_alpha=4, target_modules=["q_proj"], alpha_pattern={"layers.0.self_attn.q_proj": 0}
    )
    found = read_adapter(tmp_path, lm)
    assert found.meta["scale"] == 2
    first, *others = (tensor for name, tensor in found.tensors.items() if name.endswith("lora_B.weight"))
    assert not first.any() and all(tensor.any() for tensor in others)


def test_an_adapter_behind_a_link_to_its_folder_is_part_of_the_identity(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "ann").symlink_to(tmp_path / "elsewhere")
    _peft_folder(lm, tmp_path / "elsewhere", r=2, target_modules=["q_proj"])
    before = adapter_identity(str(tmp_path / "users"))
    _peft_folder(lm, tmp_path / "elsewhere", r=2, target_modules=["v_proj"])
    assert adapter_identity(str(tmp_path / "users")) != before


def test_adapters_written_by_a_run_are_peft_folders_and_answer_alike_elsewhere(
    harness: Callable, toy: Path, tmp_path: Path
) -> None:
    line = f"run --method oppu --task lamp3 --users 2 --fit_split dev:0.02 --max_new_tokens 3 --model {toy}"
    line += " --set epochs=1 --set items=2 --set lr=0.01"
    done = harness(f"{line} --export peft --set collective_epochs=1 --output_path one")
    assert done.code == 0 and "wrote 3 adapters to" in done.err
    (folder,) = tmp_path.glob("one/*/lamp3/*/peft")
    lm = load_model(model_row(str(toy)))
    loaded = peft.PeftModel.from_pretrained(lm.model, folder / "collective")
    assert {config.r for config in loaded.peft_config.values()} == {8}
    again = harness(f"{line} --set adapter={folder}/collective --set adapters={folder}/users --output_path two")
    assert again.code == 0
    one, two = (
        next(tmp_path.glob(f"{name}/*/lamp3/*/samples.jsonl")).read_text().splitlines() for name in ("one", "two")
    )
    assert [json.loads(row)["response"] for row in one] == [json.loads(row)["response"] for row in two]
    refused = harness(f"run --method reft --task lamp3 --model {toy} --export peft")
    assert (
        refused.code == 2 and "--export peft is for methods that train LoRA adapters; reft does not" in refused.error()
    )


def test_no_user_id_decides_where_an_exported_adapter_lies(harness: Callable, toy: Path, tmp_path: Path) -> None:
    ids = ["../../../../escaped", "../collective", "/abs", ".", "a\x00b", "u" * 300, "Ann", "ann"]
    asked = [
        {"id": str(n), "user_id": id, "input": "Generate a headline for the following article: A storm.",
         "profile": [{"id": f"{n}{k}", "text": f"Council met on day {k}.", "title": f"Day {k}"} for k in range(2)]}
        for n, id in enumerate(ids)
    ]  # fmt: skip
    (tmp_path / "d" / "LaMP_4").mkdir(parents=True)
    golds = {"task": "LaMP_4", "golds": [{"id": q["id"], "output": "Storm"} for q in asked]}
    for split in ("dev", "train"):
        (tmp_path / "d" / "LaMP_4" / f"{split}_questions.json").write_text(json.dumps(asked))
        (tmp_path / "d" / "LaMP_4" / f"{split}_outputs.json").write_text(json.dumps(golds))
    line = f"run --method lora_p --task lamp4 --data d --model {toy} --max_new_tokens 2 --set epochs=1"
    done = harness(f"{line} --export peft --output_path one")
    assert done.code == 0, done.err
    (users,) = tmp_path.glob("one/*/lamp4/*/peft/users")
    names = json.loads((users / "names.json").read_text())
    assert sorted(names.values()) == sorted(ids)
    made = {path.parent for path in tmp_path.parent.rglob("adapter_config.json") if tmp_path in path.parents}
    assert made == {users / name for name in names}
    read = harness(f"{line} --set adapters={users} --output_path two")
    assert read.code == 0, read.err  # every one of them found its own again


def test_an_adapter_of_another_kind_or_model_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises((UsageError, DataMissing)) as raised:
            read_adapter(folder, lm)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    _peft_folder(lm, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert "is no plain LoRA (use_dora=True)" in message(tmp_path / "dora")
    _peft_folder(random_lm(hidden_size=64), tmp_path / "wide", target_modules=["q_proj"])
    assert "is for another model: model.layers.0.self_attn.q_proj is (64, 64) there, (32, 32) here" in message(
        tmp_path / "wide"
    )
    _peft_folder(random_lm(num_hidden_layers=4), tmp_path / "deep", target_modules=["q_proj"])
    assert "not in the blocks of random-llama" in message(tmp_path / "deep")
    assert "has no adapter_config.json" in message(tmp_path / "nothing")
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert "is no plain LoRA (peft_type=" in message(tmp_path / "dora")
    (tmp_path / "wide" / "adapter_model.safetensors").write_bytes(b"broken")
    assert "cannot be read" in message(tmp_path / "wide")


def test_an_adapter_whose_config_or_matrices_make_no_lora_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "own"
    _peft_folder(lm, folder, target_modules=["q_proj"])
    config, weights = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )

    def message(tensors: dict, **changed: object) -> str:
        (folder / "adapter_config.json").write_text(json.dumps(config | changed))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises((UsageError, DataMissing)) as raised:
            read_adapter(folder, lm)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    for changed, problem in (
        ({"r": 0}, "field r: Input should be greater than or equal to 1, found 0"),
        ({"lora_alpha": None}, "field lora_alpha: Input should be a valid number, found None"),
        ({"rank_pattern": {"q_proj": 0}}, "field rank_pattern.q_proj"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"r": config["r"] + 1}, "is of ranks"),
        ({"bias": "all"}, "is no plain LoRA (bias='all')"),
        ({"trainable_token_indices": [1, 2]}, "is no plain LoRA (trainable_token_indices=[1, 2])"),
        ({"kasa_config": {"beta": 1}}, "is no plain LoRA (kasa_config={'beta': 1})"),
        ({"an_option_of_next_year": 0.5}, "is no plain LoRA (an_option_of_next_year=0.5)"),
    ):
        assert problem in message(weights, **changed)
    (name, *_) = weights
    for tensor in (weights[name][0], weights[name][:0], weights[name] * torch.nan, weights[name].int()):
        assert "expected a matrix of finite floating-point numbers" in message(weights | {name: tensor.contiguous()})


def test_history_items_retrieved_for_a_lesson_are_earlier_ones(lm: LanguageModel) -> None:
    user = USERS[0]
    (learner,) = OPPU(retrieval=Retrieval(k=9)).learners([user])
    for n, lesson in enumerate(learner.lessons):
        assert {item.id for item in lesson.stream.prompt.items} == {record.id for record in user.history[:n]}


def test_a_profile_stands_before_every_prompt_in_both_stages_and_in_the_answer(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Summaries, kit: ModelKit, users: Sequence[User]) -> dict[str, Written | UserFailed]:
        return {u.id: UserFailed("no reply") if u.id == USERS[3].id else Written(f"I am {u.id}.", 1) for u in users}

    monkeypatch.setattr(Summaries, "write", write)
    learnt: list[Learner] = []
    monkeypatch.setattr(ModelKit, "train", lambda self, own, parts, recipe: learnt.extend(own) or [Fitted()] * len(own))
    users, kit = {item.example.user.id for item in TRAIN}, ModelKit(lm)
    for method in (OPPU(profile="self"), PerFit(profile="self"), PerFit(profile="self", ablation="stage1")):
        learnt.clear()
        method.fit(kit, TRAIN)
        assert {lesson.stream.prompt.summary for lesson in learnt[0].lessons} == {f"I am {name}." for name in users}
    method = LoRAP(profile="self")
    learnt.clear()
    *states, failed = method.adapt(kit, USERS, None)
    assert isinstance(failed, UserFailed)
    for user, state, learner in zip(USERS, _fitted(states), learnt, strict=False):
        assert {lesson.stream.prompt.summary for lesson in learner.lessons} == {f"I am {user.id}."}
        example = TRAIN[0].example
        assert method.plan(example, None, state).streams[0].prompt == example.prompt((), f"I am {user.id}.")
    alone = PerFit(profile="self", ablation="stage1").adapt(kit, USERS, None)
    assert [state.meta["summary"] for state in _fitted(alone[:3])] == [f"I am {user.id}." for user in USERS[:3]]


def test_a_profile_in_the_collective_stage_holds_no_answer_to_a_question_of_its_user(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a user whose earlier questions are the history, later histories have the answers to earlier questions."""
    history = USERS[0].history
    growing = [
        dataclasses.replace(item, example=dataclasses.replace(item.example, user=User("one", history[:count])))
        for item, count in zip(TRAIN, (2, 1, 3), strict=False)
    ]
    read: list[Sequence[User]] = []
    monkeypatch.setattr(Summaries, "write", lambda self, kit, users: read.append(users) or {})
    OPPU(profile="self").collective(ModelKit(lm), growing)
    assert [[(user.id, user.history) for user in users] for users in read] == [[("one", history[:1])]]


def test_a_poisoned_gold_or_later_item_changes_no_lesson() -> None:
    user = USERS[0]
    pairs = [
        Labelled(Example(p.example.id, p.example.user, p.example.text, p.example.query, ToyTemplate()), ("poison",))
        for p in user.pairs
    ]
    method = OPPU(retrieval=Retrieval(k=9))
    (clean,), (poisoned,) = (method.learners([User(user.id, user.history, own)]) for own in (user.pairs, pairs))
    assert [x.stream.prompt.render() for x in clean.lessons] == [x.stream.prompt.render() for x in poisoned.lessons]
    assert {lesson.answer for lesson in poisoned.lessons} == {"poison"}
