"""A small random Llama as a GGUF file, written with gguf's own writer as llama.cpp's converter lays such files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), "ab")


def toy_llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True, head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_gguf(
    path: Path,
    model: Any,
    *,
    bos: int | None = 1,
    add_bos: bool = False,
    eos: int = 2,
    template: str | None = CHATML,
    extra: Sequence[str] = (),
    scaling: str | None = None,
    rope: torch.Tensor | None = None,
    parts: int = 1,
) -> Path:
    config, writer = model.config, GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(add_bos)
    if bos is not None:
        writer.add_bos_token_id(bos)
    if template is not None:
        writer.add_chat_template(template)
    if scaling is not None:
        writer.add_string("llama.rope.scaling.type", scaling)
        writer.add_rope_scaling_factor(4.0)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    for name, weight in model.named_parameters():
        writer.add_tensor(_name(name), _stored(name, weight.detach(), config).numpy())
    for name in extra:
        writer.add_tensor(name, torch.zeros(4).numpy())
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_PARTS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _name(name: str) -> str:
    name = name.replace("model.layers", "blk")
    for theirs, mine in _PARTS.items():
        name = name.replace(theirs, mine)
    return name


def _stored(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp keeps the two halves of each head's queries and keys interleaved."""
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if part in name:
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
            return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
    return weight
