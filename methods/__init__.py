"""Registered methods: name on the command line -> "module:Class", imported on use."""

METHODS: dict[str, str] = {
    "copy": "harness.methods.copy:Copy",
    "plain": "harness.methods.plain:Plain",
    "rag": "harness.methods.rag:RAG",
    "rspg": "harness.methods.rspg:RSPG",
    "cad": "harness.methods.cad:CAD",
    "dps": "harness.methods.dps:DPS",
    "decore": "harness.methods.decore:DeCoRe",
    "dola": "harness.methods.dola:DoLa",
    "cos": "harness.methods.cos:CoS",
    "pag": "harness.methods.pag:PAG",
    "reft": "harness.methods.reft:ReFT",
    "persona_vector": "harness.methods.persona_vector:PersonaVector",
    "clamp": "harness.methods.clamp:Clamp",
    "perfit": "harness.methods.perfit:PerFit",
    "lora_c": "harness.methods.lora_c:LoRAC",
    "lora_p": "harness.methods.lora_p:LoRAP",
    "oppu": "harness.methods.oppu:OPPU",
    "cope": "harness.methods.cope:CoPe",
    "style_vector": "harness.methods.style_vector:StyleVector",
}
