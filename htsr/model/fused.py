"""Where q, k and v, or gate and up, lie in a fused projection: by the configuration and the shapes, never by guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from htsr.model.parts import Runs, run

CONCATENATED = ("phi3", "phi4_multimodal", "gpt2", "mpt", "modernbert", "dbrx", "decision_transformer")  # q | k | v
INPUTS_FIRST = {"gpt_oss": True, "llama4": False, "llama4_text": False}  # experts (in, out): whether interleaved
BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")  # q k v of head 0, q k v of head 1, ...


def text_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The configuration of the text model where `config` has several, else `config` itself; empty for None."""
    nested = (config or {}).get("text_config")
    return nested if isinstance(nested, dict) else config or {}


def model_type(config: Mapping[str, Any] | None) -> str:
    """`model_type` of a configuration, of its text model where it has several."""
    return str(text_config(config).get("model_type", ""))


def qkv_parts(outputs: int, config: Mapping[str, Any] | None, *, concatenated: bool) -> dict[str, Runs]:
    """Find q, k and v among the outputs of a fused projection.

    Args:
        outputs: number of outputs of the projection.
        config: the model's configuration.
        concatenated: the file format itself stores q, k and v one after the other, whatever the model did.

    Returns:
        "q", "k", "v" -> positions of their outputs; empty unless the configuration makes them certain.
    """
    text = {**(config or {}), **text_config(config)}
    kind = str(text.get("model_type"))
    heads, size = _heads(text)
    if not heads or not size:
        return {}
    groups = _groups(text, kind, heads)
    if outputs != (heads + 2 * groups) * size:
        return {}
    falcon_groups = kind == "falcon" and bool(text.get("new_decoder_architecture"))
    shared = bool(text.get("multi_query")) and kind in ("falcon", "gpt_bigcode") and not falcon_groups
    if concatenated or kind in CONCATENATED or shared:
        q, kv = heads * size, groups * size
        return {"q": run(0, q), "k": run(q, kv), "v": run(q + kv, kv)}
    if kind in BY_HEAD or kind in ("falcon", "gpt_bigcode"):
        queries, every = heads // groups * size, (heads // groups + 2) * size
        widths = {"q": (0, queries), "k": (queries, size), "v": (queries + size, size)}
        return {name: Runs(start=s, width=w, stride=every, count=groups) for name, (s, w) in widths.items()}
    return {}


def _heads(text: Mapping[str, Any]) -> tuple[int, int]:
    """The number of heads and their size, 0 where the configuration does not say."""
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    return heads, _number(text, "head_dim") or (hidden // heads if heads else 0)


def _groups(text: Mapping[str, Any], kind: str, heads: int) -> int:
    """The number of key and value heads."""
    if kind == "gpt_bigcode" or (kind == "falcon" and not text.get("new_decoder_architecture")):
        return 1 if text.get("multi_query") else heads
    nested = text.get("attn_config")
    inner = _number(nested, "kv_n_heads") if isinstance(nested, Mapping) else 0
    return inner or _number(text, "num_key_value_heads", "num_kv_heads") or heads


def _number(text: Mapping[str, Any], *names: str) -> int:
    found = next((text[name] for name in names if type(text.get(name)) is int and text[name] > 0), 0)
    return int(found)


def gate_up_parts(rows: int, cols: int, axis: int, *, interleaved: bool) -> dict[str, tuple[Runs, Runs]]:
    """Find gate and up in a fused matrix.

    Args:
        rows: number of rows of the matrix.
        cols: number of columns.
        axis: 0 when the outputs are the rows, 1 when they are the columns.
        interleaved: gate and up take turns instead of lying one after the other.

    Returns:
        "gate", "up" -> their rows and columns; empty for an odd number of outputs.
    """
    outputs = (rows, cols)[axis]
    if outputs % 2:
        return {}
    half = outputs // 2
    halves = {
        "gate": Runs(start=0, width=1, stride=2, count=half) if interleaved else run(0, half),
        "up": Runs(start=1, width=1, stride=2, count=half) if interleaved else run(half, half),
    }
    across = run(0, (rows, cols)[1 - axis])
    return {name: (chosen, across) if axis == 0 else (across, chosen) for name, chosen in halves.items()}


def expert_gate_up(gate_up: tuple[int, ...], down: tuple[int, ...] | None, kind: str) -> dict[str, tuple[Runs, Runs]]:
    """Find gate and up in the fused matrix of an expert.

    Stored (out, in), gate comes first in every model. Stored (in, out), which the shape of `down` gives away (its
    inputs are half of the outputs of gate and up), the order depends on the model type.

    Args:
        gate_up: shape (experts, rows, cols) of the stack of fused matrices.
        down: shape of the stack that follows them; None when there is none.
        kind: the model type.

    Returns:
        "gate", "up" -> their rows and columns in one expert's matrix; empty where the order is not known.
    """
    _, rows, cols = gate_up
    if down is None or len(down) != 3 or not (cols == 2 * down[1] and rows == down[2]):
        return gate_up_parts(rows, cols, 0, interleaved=False)
    if kind in INPUTS_FIRST:
        return gate_up_parts(rows, cols, 1, interleaved=INPUTS_FIRST[kind])
    return {}
