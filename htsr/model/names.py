"""The only reader of parameter names: which block a tensor belongs to and which role it plays there.

A block is found by structure: the integer in a name is a block's number, the longest family of such names is the
stack of blocks. Roles have one name across architectures and file formats, so that (block, role) is the key by which
a weight in a file and the module that applies it meet.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from htsr.model.fused import text_config

if TYPE_CHECKING:
    from htsr.model.source import TensorInfo

Split = tuple[str, int, str]  # what is before the outermost integer of a name, that integer, what is after it

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
        (r"embed_tokens|wte|word_embeddings|token_embd|embed_in|tok_embeddings", "embeddings"),
        (r"shared|embeddings|embedding", "embeddings"),
    ]
]
_NORM = re.compile(r"(norm|(^|[._])ln)", re.IGNORECASE)
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_SHARED = re.compile(r"shared_experts?\.|_shexp")
_CROSS = re.compile(r"cross_?att|encdecattention|encoder_attn", re.IGNORECASE)
_WRAPPERS = re.compile(r"(?<![^.])(?:base_layer|_orig_mod|module)\.")
_ENCODER, _DECODER = (re.compile(rf"(?<![A-Za-z])(?:{side}oder|{side})(?![A-Za-z])") for side in ("enc", "dec"))


def locate_blocks(names: Iterable[str], *, numbered: bool = False) -> dict[str, tuple[int | None, str]]:
    """Find the block that each tensor belongs to.

    The outermost integer of a name numbers its family. The family with the most numbers holds the blocks; an encoder's
    and a decoder's families both do, encoder first.

    Args:
        names: names of all tensors.
        numbered: blocks are numbered by the integers themselves, instead of 0, 1, 2 in their order.

    Returns:
        name -> block (None outside the blocks) and the rest of the name inside the block.
    """
    split = {name: _split_at_integer(name) for name in names}
    stacks, number = _stacks(split.values(), numbered=numbered)
    return {
        name: (number[parts[0], parts[1]], parts[2]) if parts is not None and parts[0] in stacks else (None, name)
        for name, parts in split.items()
    }


def count_blocks(names: Iterable[str], *, numbered: bool = False) -> int:
    """How many blocks the names make up."""
    _, number = _stacks(map(_split_at_integer, names), numbered=numbered)
    return max(number.values()) + 1 if number else 0


def _stacks(names: Iterable[Split | None], *, numbered: bool) -> tuple[list[str], dict[tuple[str, int], int]]:
    """The prefixes that number blocks, and (prefix, integer) -> block, of names as `_split_at_integer` splits them."""
    families: dict[str, set[int]] = defaultdict(set)
    members: Counter[str] = Counter()
    for prefix, integer, _ in filter(None, names):
        families[prefix].add(integer)
        members[prefix] += 1
    stacks = choose_stacks(families, members)
    number: dict[tuple[str, int], int] = {}
    first = 0
    for prefix in stacks:
        integers = range(max(families[prefix]) + 1) if numbered else sorted(families[prefix])
        number |= {(prefix, n): first + i for i, n in enumerate(integers)}
        first += len(integers)
    return stacks, number


def _split_at_integer(name: str) -> Split | None:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal() and part.isascii() and len(part) < 10:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


def choose_stacks(families: Mapping[str, set[int]], members: Mapping[str, int]) -> list[str]:
    """The prefixes whose integers number the blocks, encoder first; empty when no name holds an integer."""
    if not families:
        return []
    longest = max(families, key=lambda p: (len(families[p]), members[p]))
    if _ENCODER.search(longest):
        encoder, decoder = longest, _ENCODER.sub(lambda word: word.group().replace("enc", "dec"), longest)
    else:
        encoder, decoder = _DECODER.sub(lambda word: word.group().replace("dec", "enc"), longest), longest
    return [p for p in dict.fromkeys((encoder, decoder)) if p in families]


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


def expert_role(path: str, index: int) -> str:
    """The role of one matrix of a stack from the stack's name inside its block, as if each expert had a tensor."""
    numbered_path = re.sub(r"(^|\.)experts(?=\.)", rf"\1experts.{index}", path, count=1)
    if numbered_path != path:
        return role_of(numbered_path)
    role = role_of(path)
    return f"experts.{index}.{role}" if role in ("gate", "up", "down", "gate_up", "fc1", "fc2") else f"{role}.{index}"


def distinct_roles(locations: list[tuple[str, int | None, str]]) -> dict[str, str]:
    """Roles of matrices, with the path inside the block instead where two of one block would share a role."""
    count = Counter((block, role_of(rest)) for _, block, rest in locations)
    roles = {}
    for name, block, rest in locations:
        role = role_of(rest)
        roles[name] = rest.removesuffix(".weight") if block is not None and count[block, role] > 1 else role
    return roles


def plain_gguf_roles(tensors: Iterable[TensorInfo], roles: Mapping[str, str]) -> dict[str, str]:
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


def stored_transposed(tensors: Iterable[TensorInfo]) -> set[str]:
    """Names of GPT-2's Conv1D weights, stored (inputs, outputs): there the MLP's first map is wider than tall."""
    matrices = {t.name: t.shape for t in tensors if len(t.shape) == 2}
    wide = any(n.endswith("c_fc.weight") and s[0] < s[1] for n, s in matrices.items())
    conv = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
    return {n for n in matrices if wide and conv.search(n)}


def tied_copies(tensors: Iterable[TensorInfo], config: Mapping[str, Any] | None) -> set[str]:
    """Heads that a file stores although the configuration ties them to the embeddings (loading ignores them)."""
    if not any(each.get("tie_word_embeddings") for each in (config or {}, text_config(config))):
        return set()
    outside = [t for t in tensors if len(t.shape) == 2 and _split_at_integer(t.name) is None]
    embeddings = {(t.shape, t.dtype) for t in outside if role_of(t.name) == "embeddings"}
    return {t.name for t in outside if role_of(t.name) == "head" and (t.shape, t.dtype) in embeddings}
