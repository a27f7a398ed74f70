"""The only reader of parameter names: which block a tensor belongs to and which role it plays there.

A block is found by structure: the integer in a name is a block's number, the longest family of such names is the
stack of blocks. Roles have one name across architectures and file formats, so that (block, role) is the key by which
a weight in a file and the module that applies it meet.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from htsr.errors import BadInput
from htsr.model.parts import Part, expert_gate_up, flat_shape, gate_up_parts, kernel_parts, qkv_parts, run, too_small
from htsr.model.parts import why_not as why_no_spectrum

if TYPE_CHECKING:
    from torch import nn

    from htsr.model.source import Source, TensorInfo

# (pattern at the end of a name, canonical role); the first that matches wins
_ROLES = [
    (re.compile(rf"(?:^|[._])(?:{pattern})$", re.IGNORECASE), role)
    for pattern, role in [
        (r"qkv_proj|query_key_value|c_attn|wqkv|attn_qkv|attention\.qkv|attn\.qkv|attn\.in_proj", "qkv"),
        (r"in_proj_weight", "qkv"),
        (r"gate_up_proj|gate_up|moe\.input_linear", "gate_up"),
        (r"moe\.output_linear", "down"),
        (r"q_proj|query|q_lin|attn_q|wq|attention\.q|q", "q"),
        (r"k_proj|key|k_lin|attn_k|wk|attention\.k|k", "k"),
        (r"v_proj|value|v_lin|attn_v|wv|attention\.v|v", "v"),
        (r"o_proj|out_proj|out_lin|attn_output|attn_o|attn\.c_proj|self_attn\.dense|attention\.dense", "o"),
        (r"attention\.output\.dense|attention\.wo|attention\.o|attn\.proj|attn\.o|attn\.wo", "o"),
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
    """A matrix of a model. `reason` is empty when its spectrum can be read, else it says why it cannot.

    tensor: the name in the file; of a matrix inside a tensor with what it is in brackets, as in `experts.up[3]`.
    rows, cols: the shape seen as a matrix; transposed: stored as (inputs, outputs), as Conv1D does.
    part: where the matrix lies inside its tensor, None when it is all of it.
    part_of: `tensor` of the fused matrix that it is also counted in, else empty.
    pool: the matrices whose eigenvalues are pooled, of a convolution's kernel.
    """

    tensor: str
    block: int | None
    role: str
    rows: int
    cols: int
    dtype: str
    reason: str
    transposed: bool = False
    part: Part | None = None
    part_of: str = ""
    pool: tuple[Part, ...] = ()

    @property
    def stored(self) -> str:
        """The name of the tensor in the source."""
        return self.part.tensor if self.part is not None else self.tensor


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a module in order (encoder before decoder) and the module path of each."""

    prefix: str
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]


def views(source: Source) -> list[LayerView]:
    """One view of every tensor: embeddings first, then block after block, then what follows the blocks.

    A stack of experts has a view for each expert's matrices instead. A fused q, k and v (or gate and up) has its own
    view, and one for each of its parts where the configuration tells where they lie.
    """
    places = locate_blocks([t.name for t in source.tensors], numbered=source.numbered)
    tail_roles = _distinct_roles([(t.name, *places[t.name]) for t in source.tensors if len(t.shape) in (2, 4)])
    roles = {n: tail_roles.get(n, role_of(rest)) for n, (_, rest) in places.items()}
    roles.update(_plain_gguf_roles(source.tensors, roles))
    transposed = _stored_transposed(source.tensors)
    stacks = {(places[t.name][0], roles[t.name]): t.shape for t in source.tensors if len(t.shape) == 3}
    result: list[LayerView] = []
    for tensor in source.tensors:
        block, rest = places[tensor.name]
        whole = _view(tensor, block, roles[tensor.name], tensor.name in transposed)
        if whole.reason:
            result.append(whole)
        elif len(tensor.shape) == 3:
            result += _experts(whole, rest, tensor.shape, stacks.get((block, "down")), source.config)
        elif len(tensor.shape) == 4:
            result.append(replace(whole, pool=tuple(kernel_parts(tensor.name, tensor.shape))))
        else:
            result += [whole, *_fused_parts(whole, source.config)]
    return sorted(result, key=_order)


def num_blocks(source: Source) -> int:
    """How many blocks the tensors of a source make up."""
    _, number = _stacks(_families(t.name for t in source.tensors), numbered=source.numbered)
    return max(number.values()) + 1 if number else 0


def locate_blocks(names: Iterable[str], *, numbered: bool = False) -> dict[str, tuple[int | None, str]]:
    """name -> (block or None, the rest of the name inside the block).

    The outermost integer of a path numbers its family; the family with the most numbers holds the blocks, and an
    encoder's and a decoder's families both do, encoder first. Blocks are counted 0, 1, 2 in the order of the integers,
    or, if `numbered`, by the integers themselves.
    """
    split = {name: _split_at_integer(name) for name in names}
    stacks, number = _stacks(_families(split), numbered=numbered)
    return {
        name: (number[place[0], place[1]], place[2]) if place is not None and place[0] in stacks else (None, name)
        for name, place in split.items()
    }


def _families(names: Iterable[str]) -> list[tuple[str, int]]:
    """(prefix, integer) of every name that holds an integer."""
    return [place[:2] for place in map(_split_at_integer, names) if place is not None]


def _stacks(places: Iterable[tuple[str, int]], *, numbered: bool) -> tuple[list[str], dict[tuple[str, int], int]]:
    """The prefixes that number blocks, and (prefix, integer) -> block."""
    families: dict[str, set[int]] = defaultdict(set)
    members: Counter[str] = Counter()
    for prefix, integer in places:
        families[prefix].add(integer)
        members[prefix] += 1
    stacks = _choose_stacks(families, members)
    number: dict[tuple[str, int], int] = {}
    first = 0
    for prefix in stacks:
        integers = range(max(families[prefix]) + 1) if numbered else sorted(families[prefix])
        number |= {(prefix, n): first + i for i, n in enumerate(integers)}
        first += len(integers)
    return stacks, number


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
    rows, cols = flat_shape(tensor.shape)
    leaf = tensor.name.rpartition(".")[2]
    return LayerView(
        tensor=tensor.name,
        block=block,
        role=role,
        rows=rows,
        cols=cols,
        dtype=tensor.dtype,
        reason=why_no_spectrum(tensor, convolution="conv" in tensor.name, bias=leaf.endswith("bias")),
        transposed=transposed,
    )


def _experts(
    whole: LayerView, rest: str, shape: tuple[int, ...], down: tuple[int, ...] | None, config: Mapping[str, Any] | None
) -> Iterator[LayerView]:
    """The matrices of a stack (experts, rows, cols): one an expert, or gate and up of each where they are fused."""
    _, height, width = shape
    base = role_of(rest)
    shares = expert_gate_up(shape, down, model_type(config)) if base.endswith("gate_up") else {}
    for index in range(shape[0]):
        role = expert_role(rest, index)
        for share, (rows, cols) in (shares or {"": (run(0, height), run(0, width))}).items():
            rows = replace(rows, start=rows.start + index * height)
            yield replace(
                whole,
                tensor=f"{whole.tensor}[{index}]" + (f"[{share}]" if share else ""),
                role=role.removesuffix("gate_up") + share if share else role,
                rows=rows.size,
                cols=cols.size,
                part=Part(tensor=whole.tensor, rows=rows, cols=cols),
                reason=too_small(rows.size, cols.size),
            )


def expert_role(path: str, index: int) -> str:
    """The role of one matrix of a stack from the stack's name inside its block: that of a name of the expert's own."""
    own = re.sub(r"(^|\.)experts(?=\.)", rf"\1experts.{index}", path, count=1)
    if own != path:
        return role_of(own)
    role = role_of(path)
    return f"experts.{index}.{role}" if role in ("gate", "up", "down", "gate_up", "fc1", "fc2") else f"{role}.{index}"


def model_type(config: Mapping[str, Any] | None) -> str:
    """`model_type` of a configuration, of its text model where it has several."""
    text = (config or {}).get("text_config")
    return str((text if isinstance(text, dict) else config or {}).get("model_type", ""))


def _fused_parts(whole: LayerView, config: Mapping[str, Any] | None) -> Iterator[LayerView]:
    """q, k and v, or gate and up, of a fused matrix; nothing for any other and where they lie uncertainly."""
    axis = 1 if whole.transposed else 0
    outputs, inputs = (whole.rows, whole.cols) if axis == 0 else (whole.cols, whole.rows)
    if whole.role.endswith("qkv"):
        thirds = whole.tensor.endswith("in_proj_weight") and outputs == 3 * inputs  # nn.MultiheadAttention
        heads = {"model_type": "mpt", "num_attention_heads": 1, "hidden_size": inputs} if thirds else config
        along = qkv_parts(outputs, heads, concatenated="attn_qkv" in whole.tensor)
        across = run(0, inputs)
        shares = {n: (chosen, across) if axis == 0 else (across, chosen) for n, chosen in along.items()}
        stem = whole.role.removesuffix("qkv")
    elif whole.role.endswith("gate_up"):
        shares = gate_up_parts(whole.rows, whole.cols, axis, interleaved=False)
        stem = whole.role.removesuffix("gate_up")
    else:
        return
    for share, (rows, cols) in shares.items():
        yield replace(
            whole,
            tensor=f"{whole.tensor}[{share}]",
            role=stem + share,
            rows=rows.size,
            cols=cols.size,
            part=Part(tensor=whole.tensor, rows=rows, cols=cols),
            part_of=whole.tensor,
            reason=too_small(rows.size, cols.size),
        )


def _order(view: LayerView) -> tuple[Any, ...]:
    group = 1 if view.block is not None else (0 if "embeddings" in view.role else 2)
    return group, view.block or 0, view.stored


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
