"""Where blocks, heads, MLPs and queries live in each architecture: one row a family, and the hooks that reach them.

Everything the engine changes or reads inside a model goes through `Sites.hooked`; it owns every hook and removes it on
the way out, also after an exception. Layers are 0-based blocks. A hook sees and returns plain tensors [B, T, D].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UnsupportedModel, UsageError
from harness.plan import PARTS, Site


@dataclass(frozen=True)
class Family:
    """Names of the modules, relative to the base model and to a block."""

    base: str
    blocks: str
    final_norm: str
    output_projection: str
    """Its input is the concatenated head outputs."""
    mlp: str
    queries: str
    """The last module before rotary embedding that yields queries: q_proj, a query norm, or a fused projection."""
    heads_first: bool = False
    """Whether that query norm sees [B, H, T, head_dim]; else [B, T, H, head_dim]."""
    attention_norm: str = ""
    """The norm between the attention's output and the residual stream, where the family has one."""
    mlp_norm: str = ""
    """Likewise behind the MLP."""
    norm_offset: float = 0.0
    """What its RMS norms add to their weights."""


_LLAMA = Family("model", "layers", "norm", "self_attn.o_proj", "mlp", "self_attn.q_proj")

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Family("model", "layers", "norm", "self_attn.o_proj", "mlp", "self_attn.q_norm"),
    "gemma3_text": Family(
        "model",
        "layers",
        "norm",
        "self_attn.o_proj",
        "mlp",
        "self_attn.q_norm",
        heads_first=True,
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        norm_offset=1.0,
    ),
    "gpt2": Family("transformer", "h", "ln_f", "attn.c_proj", "mlp", "attn.c_attn"),
}
"""By `config.model_type`. To add a family: one row here, and its name in tests/test_engine.py's list of families."""


def family_of(model_type: str | None) -> Family:
    """The row of an architecture. Raises UnsupportedModel where there is none."""
    if model_type is None or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"architecture {model_type!r} is not supported; supported: {', '.join(FAMILIES)}. "
            "To add it, write its row in harness/sites.py"
        )
    return FAMILIES[model_type]


def check_config(config: Any) -> None:
    """Raises UnsupportedModel where a row's logits would depend on its neighbours, or would not be the model's own."""
    family_of(config.model_type)
    ropes = config.to_dict().get("rope_parameters") or {}
    for rope in (ropes, *ropes.values()):
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
        if kind is not None and kind not in _ROPES:
            why = (
                "a row would be computed with other frequencies beside a longer one"
                if kind == "longrope"
                else "unknown"
            )
            raise UnsupportedModel(
                f"rope_type {kind!r} is not supported: {why}; give a model of another rope_type ({', '.join(_ROPES)})"
            )
    asked = [name for name in _NOT_COMPUTED if getattr(config, name, None)]
    if asked:
        raise UnsupportedModel(
            f"{asked[0]}={getattr(config, asked[0])!r} of config.json is not supported: sdpa or the engine's head would leave it out"
        )


_ROPES = ("default", "dynamic", "linear", "llama3", "proportional", "yarn")
"""Whose frequencies are the same for every length up to the context (`dynamic` changes them behind it)."""
_NOT_COMPUTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


def widen_norms(model: nn.Module) -> None:
    """Makes the RMS norms of a float64 model compute in float64.

    transformers' own round to float32 whatever the dtype: two passes whose sums differ in the last of 53 bits come out 1e-7
    apart, and nothing could be said about exactness.
    """
    config: Any = model.config
    offset = family_of(config.model_type).norm_offset
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = _wide(type(module), offset)  # type: ignore[arg-type]


@cache
def _wide(kind: type[nn.Module], offset: float) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        epsilon = getattr(self, "variance_epsilon", None) or self.eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (offset + self.weight)

    return type(f"Wide{kind.__name__}", (kind,), {"forward": forward})


Transform = Callable[[Tensor], Tensor | None]
"""A tensor at a site in; its replacement out, or None to leave it."""


class Sites:
    """The places of one loaded model."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        check_config(config)
        family = self.family = family_of(config.model_type)
        self.model = model
        self.base: nn.Module = model.get_submodule(family.base)
        self.blocks: nn.ModuleList = self.base.get_submodule(family.blocks)  # type: ignore[assignment]
        self.final_norm = self.base.get_submodule(family.final_norm)
        self.layers = len(self.blocks)
        self.tied = bool(config.tie_word_embeddings)
        """Whether the LM head is the embedding matrix."""
        self.width: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.width // self.heads

    def check(self, site: Site) -> Site:
        """The site itself; UsageError where the model has no such block or part."""
        if not isinstance(site.layer, Integral) or not 0 <= site.layer < self.layers:
            raise UsageError(f"block {site.layer} does not exist; this model has blocks 0 to {self.layers - 1}")
        if site.part not in PARTS:
            raise UsageError(f"part {site.part!r} does not exist; parts: {', '.join(PARTS)}")
        return site

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a block: the parent of its output projection."""
        name = self.family.output_projection.rpartition(".")[0]
        return self.blocks[self.check(Site(layer, "pattern")).layer].get_submodule(name)

    def parameter(self, site: Site) -> Tensor:
        """A tensor whose device and dtype are those of the site's activations: a weight of the block that is not quantised."""
        block = self.blocks[site.layer]
        weight = next(w for w in block.parameters() if w.is_floating_point() and w.element_size() > 1)
        if weight.device.type != "meta":
            return weight
        # accelerate keeps this block's weights elsewhere, and brings each to this device while it is used
        hooks: Iterator[Any] = (getattr(module, "_hf_hook", None) for module in block.modules())
        devices = (hook.execution_device for hook in hooks if hook is not None)
        return torch.empty(0, dtype=weight.dtype, device=next(device for device in devices if device is not None))

    @contextlib.contextmanager
    def hooked(self, transforms: Mapping[Site, Sequence[Transform]]) -> Iterator[None]:
        """Within the context every forward pass runs the transforms of each site, in order."""
        handles: list[Any] = []
        try:
            for site, functions in transforms.items():
                handles.append(self._install(self.check(site), functions))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def attended(self, layer: int, heads: Tensor) -> Iterator[None]:
        """Within the context the block's attention is not computed: `heads` [B, T, H * head_dim] enters its output projection."""
        projection = self.blocks[layer].get_submodule(self.family.output_projection)
        with computing([(self.attention(layer), lambda *_, **__: (projection(heads), None))]):
            yield

    @contextlib.contextmanager
    def skipped_mlp(self, layer: int) -> Iterator[None]:
        """Within the context the block's MLP gives back its input."""
        with computing([(self.blocks[layer].get_submodule(self.family.mlp), lambda x: x)]):
            yield

    @contextlib.contextmanager
    def hooked_modules(self, transforms: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
        """Within the context the output of each named module becomes f(input, output). For adapters."""
        handles: list[Any] = []
        try:
            for name, function in transforms.items():
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(lambda _, args, out, f=function: f(args[0], out)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _install(self, site: Site, functions: Sequence[Transform]) -> Any:
        block = self.blocks[site.layer]
        family = self.family

        def run(x: Tensor) -> Tensor:
            for function in functions:
                changed = function(x)
                x = x if changed is None else changed
            return x

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (run(args[0]), *args[1:])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                return (run(output[0]), *output[1:])
            return run(output)

        def after_queries(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            size = self.heads * self.head_dim
            if output.dim() == 4:  # a query norm works on single heads
                heads_first = family.heads_first
                by_token = output.transpose(1, 2) if heads_first else output
                changed = run(by_token.flatten(2)).view_as(by_token)
                return changed.transpose(1, 2) if heads_first else changed
            if output.shape[-1] == size:
                return run(output)
            return torch.cat([run(output[..., :size]), output[..., size:]], dim=-1)  # fused q, k, v

        match site.part:
            case "block_in":
                return block.register_forward_pre_hook(before)
            case "block_out":
                return block.register_forward_hook(after)
            case "heads_out":
                return block.get_submodule(family.output_projection).register_forward_pre_hook(before)
            case "attn_out":
                written = family.attention_norm or family.output_projection
                return block.get_submodule(written).register_forward_hook(after)
            case "mlp_out":
                return block.get_submodule(family.mlp_norm or family.mlp).register_forward_hook(after)
            case "queries":
                return block.get_submodule(family.queries).register_forward_hook(after_queries)
            case _:
                raise UsageError("attention patterns are read only; use harness.engine.capture")


@contextlib.contextmanager
def computing(replaced: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the context each module computes its function instead of its own forward; their hooks run as ever."""
    before = [module.__dict__.get("forward") for module, _ in replaced]  # where a device map has put its own in front
    try:
        for module, function in replaced:
            module.forward = function
        yield
    finally:
        for (module, _), own in zip(replaced, before, strict=True):
            if own is not None:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)
