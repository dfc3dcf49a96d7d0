"""Registered tasks: name on the command line -> "module:Class", imported on use."""

TASKS: dict[str, str] = {
    "lamp1": "harness.tasks.lamp:Lamp1",
    "lamp2m": "harness.tasks.lamp:Lamp2M",
    "lamp2n": "harness.tasks.lamp:Lamp2N",
    "lamp3": "harness.tasks.lamp:Lamp3",
    "lamp4": "harness.tasks.lamp:Lamp4",
    "lamp5": "harness.tasks.lamp:Lamp5",
    "lamp6": "harness.tasks.lamp:Lamp6",
    "lamp7": "harness.tasks.lamp:Lamp7",
    "users": "harness.tasks.users:Users",
    "longlamp": "harness.tasks.long_texts.longlamp:LongLamp",
    "lamp_qa": "harness.tasks.long_texts.lamp_qa:LampQA",
    "prefeval": "harness.tasks.preferences.prefeval:PrefEval",
    "prefeval_generation": "harness.tasks.preferences.prefeval:PrefEvalGeneration",
    "personamem": "harness.tasks.preferences.personamem:PersonaMem",
    "persona": "harness.tasks.persona:Persona",
    "mmlu": "harness.tasks.mmlu:MMLU",
    "delta_vectors": "harness.tasks.delta_vectors:DeltaVectors",
    "patching": "harness.tasks.patching:Patching",
    "lm_eval": "harness.tasks.lm_eval_task:LmEvalTask",
}

STUDIES = frozenset({"delta_vectors", "patching"})
"""Tasks that look into a model: their metrics are effects, by which no method is better, so no leaderboard ranks them."""
