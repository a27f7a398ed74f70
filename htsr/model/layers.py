"""The only reader of parameter names: which block a tensor belongs to and which role it plays there.

A block is found by structure: the integer in a name is a block's number, the longest family of such names is the
stack of blocks. Roles have one name across architectures and file formats, so that (block, role) is the key by which
a weight in a file and the module that applies it meet.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from htsr.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from htsr.model.source import Source, TensorInfo

MIN_SIDE = 8  # weightwatcher's own limit: fewer singular values make no spectrum

# (pattern at the end of a name, canonical role); the first that matches wins
_ROLES = [
    (re.compile(rf"(?:^|[._])(?:{pattern})$", re.IGNORECASE), role)
    for pattern, role in [
        (r"qkv_proj|query_key_value|c_attn|wqkv|attn_qkv|attention\.qkv|attn\.qkv|attn\.in_proj", "qkv"),
        (r"gate_up_proj|gate_up", "gate_up"),
        (r"q_proj|query|q_lin|attn_q|wq|attention\.q|q", "q"),
        (r"k_proj|key|k_lin|attn_k|wk|attention\.k|k", "k"),
        (r"v_proj|value|v_lin|attn_v|wv|attention\.v|v", "v"),
        (r"o_proj|out_proj|out_lin|attn_output|attn_o|attn\.c_proj|self_attn\.dense|attention\.dense", "o"),
        (r"attention\.output\.dense|attention\.wo|attention\.o|attn\.proj|attn\.o", "o"),
        (r"ffn_gate_inp|ffn_gate_inp_shexp|router\.classifier|router|shared_expert_gate|mlp\.gate|moe\.gate", "router"),
        (r"gate_proj|ffn_gate|ffn_gate_exps|ffn_gate_shexp|wi_0|w1", "gate"),
        (r"up_proj|ffn_up|ffn_up_exps|ffn_up_shexp|wi_1|w3", "up"),
        (r"down_proj|ffn_down|ffn_down_exps|ffn_down_shexp|wo|w2", "down"),
        (r"fc1|c_fc|fc_in|lin1|dense_h_to_4h|intermediate\.dense|wi", "fc1"),
        (r"fc2|fc_out|lin2|dense_4h_to_h|mlp\.c_proj|output\.dense", "fc2"),
        (r"pooler\.dense|pooler", "pooler"),
        (r"lm_head|embed_out|output|cls\.predictions\.decoder|score|classifier|qa_outputs", "head"),
        (r"embed_positions|wpe|position_embeddings|position_embd|position_embed", "position_embeddings"),
        (r"token_type_embeddings|token_types", "token_type_embeddings"),
        (
            r"embed_tokens|wte|word_embeddings|token_embd|embed_in|tok_embeddings|shared|embeddings|embedding",
            "embeddings",
        ),
    ]
]
_NORM = re.compile(r"(norm|(^|[._])ln)", re.IGNORECASE)
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_SHARED = re.compile(r"shared_experts?\.|_shexp")
_CROSS = re.compile(r"cross_?att|encdecattention|encoder_attn", re.IGNORECASE)
_WRAPPERS = re.compile(r"(?<![^.])(?:base_layer|_orig_mod|module)\.")
_ENCODER = re.compile(r"(?<![A-Za-z])(?:encoder|enc)(?![A-Za-z])")


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What a tensor is. `reason` is empty for a matrix whose spectrum can be read, else it says why it cannot.

    rows, cols: the stored shape seen as a matrix; transposed: stored as (inputs, outputs), as Conv1D does.
    """

    tensor: str
    block: int | None
    role: str
    rows: int
    cols: int
    dtype: str
    reason: str
    transposed: bool = False


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a module in order (encoder before decoder) and the module path of each."""

    prefix: str
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]


def views(source: Source) -> list[LayerView]:
    """One view of every tensor: embeddings first, then block after block, then what follows the blocks."""
    names = [t.name for t in source.tensors]
    places = locate_blocks(names)
    tail_roles = _distinct_roles([(t.name, *places[t.name]) for t in source.tensors if len(t.shape) == 2])
    roles = {n: tail_roles.get(n, role_of(places[n][1])) for n in names}
    roles.update(_plain_gguf_roles(source.tensors, roles))
    transposed = _stored_transposed(source.tensors)
    result = [_view(t, places[t.name][0], roles[t.name], t.name in transposed) for t in source.tensors]
    return sorted(result, key=_order)


def num_blocks(source: Source) -> int:
    """How many blocks the tensors of a source make up."""
    return len({block for block, _ in locate_blocks([t.name for t in source.tensors]).values() if block is not None})


def locate_blocks(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """name -> (block or None, the rest of the name inside the block).

    The outermost integer of a path numbers its family; the family with the most numbers holds the blocks, and an
    encoder's and a decoder's families both do, encoder first. Blocks are counted 0, 1, 2 in the order of the integers.
    """
    split = {name: _split_at_integer(name) for name in names}
    families: dict[str, set[int]] = defaultdict(set)
    members: Counter[str] = Counter()
    for place in split.values():
        if place is not None:
            families[place[0]].add(place[1])
            members[place[0]] += 1
    stacks = _choose_stacks(families, members)
    number = {key: i for i, key in enumerate((prefix, n) for prefix in stacks for n in sorted(families[prefix]))}
    return {
        name: (number[place[0], place[1]], place[2]) if place is not None and place[0] in stacks else (None, name)
        for name, place in split.items()
    }


def _split_at_integer(name: str) -> tuple[str, int, str] | None:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal() and part.isascii() and len(part) < 10:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


def _choose_stacks(families: Mapping[str, set[int]], members: Mapping[str, int]) -> list[str]:
    """The prefixes whose integers number the blocks, encoder first; empty when no name holds an integer."""
    if not families:
        return []
    longest = max(families, key=lambda p: (len(families[p]), members[p]))
    if _ENCODER.search(longest):
        encoder, decoder = longest, _swap_encoder(longest)
    else:
        encoder, decoder = _swap_decoder(longest), longest
    return [p for p in dict.fromkeys((encoder, decoder)) if p in families]


def _swap_encoder(prefix: str) -> str:
    return re.sub(_ENCODER, lambda m: "decoder" if m.group() == "encoder" else "dec", prefix)


def _swap_decoder(prefix: str) -> str:
    return re.sub(r"(?<![A-Za-z])dec(oder)?(?![A-Za-z])", lambda m: "encoder" if m.group(1) else "enc", prefix)


def role_of(name: str) -> str:
    """The canonical role of a parameter or module, from its name (inside its block, where it has one)."""
    path = _WRAPPERS.sub("", name)
    path, kind = re.subn(r"\.(weight|bias)$", "", path)[0], path.rpartition(".")[2]
    leaf = path.rpartition(".")[2]
    expert, shared, cross = _EXPERT.search(path), _SHARED.search(path), _CROSS.search(path)
    role = next((role for pattern, role in _ROLES if pattern.search(path)), None)
    if _NORM.search(leaf):
        role = "norm"
    role = role or (path if leaf.isdecimal() else leaf)
    if expert:
        role = f"experts.{expert.group(1)}.{role}"
    elif shared and role != "embeddings":
        role = f"shared.{role}"
    elif cross:
        role = f"cross_{role}"
    return f"{role}.bias" if kind == "bias" and path != name else role


def _distinct_roles(places: list[tuple[str, int | None, str]]) -> dict[str, str]:
    """Roles of matrices, with the path inside the block instead where two of one block would share a role."""
    count = Counter((block, role_of(rest)) for _, block, rest in places)
    roles = {}
    for name, block, rest in places:
        role = role_of(rest)
        roles[name] = rest.removesuffix(".weight") if block is not None and count[block, role] > 1 else role
    return roles


def _plain_gguf_roles(tensors: Iterable[TensorInfo], roles: Mapping[str, str]) -> dict[str, str]:
    """GGUF calls every first map of an MLP `ffn_up`: without a gate it is fc1, and twice as tall it is gate_up."""
    shapes = {t.name: t.shape for t in tensors}
    if "gate" in roles.values():
        return {}
    changed = {}
    for name, shape in shapes.items():
        down = name.replace("ffn_up", "ffn_down")
        if not name.endswith("ffn_up.weight") or down not in shapes or len(shape) != 2:
            continue
        fused = shape[0] == 2 * shapes[down][1]
        changed[name] = "gate_up" if fused else "fc1"
        changed[down] = "down" if fused else "fc2"
    return changed


def _stored_transposed(tensors: Iterable[TensorInfo]) -> set[str]:
    """Names of GPT-2's Conv1D weights, stored (inputs, outputs): there the MLP's first map is wider than tall."""
    matrices = {t.name: t.shape for t in tensors if len(t.shape) == 2}
    wide = any(n.endswith("c_fc.weight") and s[0] < s[1] for n, s in matrices.items())
    conv = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
    return {n for n in matrices if wide and conv.search(n)}


def _view(tensor: TensorInfo, block: int | None, role: str, transposed: bool) -> LayerView:
    shape = tensor.shape
    rows = shape[0] if shape else 1
    cols = tensor.numel // rows if rows else 0
    if len(shape) == 3:  # a stack of matrices
        rows, cols = shape[0] * shape[1], shape[2]
    return LayerView(
        tensor=tensor.name,
        block=block,
        role=role,
        rows=rows,
        cols=cols,
        dtype=tensor.dtype,
        reason=_why_not(tensor),
        transposed=transposed,
    )


def _why_not(tensor: TensorInfo) -> str:
    """Why a tensor has no spectrum here; empty when it has one."""
    shape = tensor.shape
    if len(shape) < 2:
        return f"{len(shape)}-D: not a matrix"
    if len(shape) > 2:
        kind = "a stack of matrices" if len(shape) == 3 else "a convolution"
        return f"{len(shape)}-D ({kind}): only matrices are analysed"
    if not tensor.readable:
        return f"stored as {tensor.dtype}: codes or integers, not the weights themselves"
    if min(shape) < MIN_SIDE:
        return f"only {min(shape)} singular values, at least {MIN_SIDE} make a spectrum"
    return ""


def _order(view: LayerView) -> tuple[Any, ...]:
    group = 1 if view.block is not None else (0 if "embeddings" in view.role else 2)
    return group, view.block or 0, view.tensor


def tied_copies(tensors: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> set[str]:
    """Heads that a file stores although the configuration ties them to the embeddings (loading ignores them)."""
    text = (config or {}).get("text_config")
    tied = (config or {}).get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))
    if not tied:
        return set()
    outside = [t for t in tensors if len(t.shape) == 2 and _split_at_integer(t.name) is None]
    embeddings = {(t.shape, t.dtype) for t in outside if role_of(t.name) == "embeddings"}
    return {t.name for t in outside if role_of(t.name) == "head" and (t.shape, t.dtype) in embeddings}


def find_blocks(model: nn.Module) -> BlockStack:
    """The blocks of a model by structure: the longest outermost ModuleList whose children are of one class.

    An encoder's and a decoder's lists are joined, encoder first. Raises BadInput when there is no such list.
    """
    lists = _outermost_lists(model, same_class=True) or _outermost_lists(model, same_class=False)
    if not lists:
        raise BadInput(f"got a {type(model).__name__} without a list of blocks, expected an nn.ModuleList of layers")
    indexes = {name: set(range(len(modules))) for name, modules in lists.items()}
    sizes = {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in lists.items()}
    stacks = _choose_stacks(indexes, sizes)
    names = tuple(f"{prefix}.{i}" if prefix else str(i) for prefix in stacks for i in range(len(lists[prefix])))
    return BlockStack(stacks[0], tuple(m for prefix in stacks for m in lists[prefix]), names)


def _outermost_lists(model: nn.Module, *, same_class: bool) -> dict[str, list[nn.Module]]:
    from torch import nn

    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        children = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        holds_weights = all(any(True for _ in child.parameters()) for child in children)
        if children and holds_weights and (not same_class or len({type(c) for c in children}) == 1):
            found[name] = children
    return found


def linear_maps(block: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """role -> (module with a 2-D weight, stored transposed) for every linear map inside a block."""
    maps = {}
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        is_lookup = hasattr(module, "num_embeddings")
        if name and getattr(weight, "ndim", 0) == 2 and not is_lookup:
            maps[name] = module
    roles = _distinct_roles([(name, 0, name) for name in maps])
    return {roles[name]: (module, _is_conv1d(module)) for name, module in maps.items()}


def _is_conv1d(module: Any) -> bool:
    """Whether the weight is stored (inputs, outputs): transformers' Conv1D says so by `nf`, its number of outputs."""
    outputs = getattr(module, "nf", None)
    return isinstance(outputs, int) and module.weight.shape[1] == outputs
