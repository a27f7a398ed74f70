"""Examples to pieces of text: what the model reads, what it is trained to say, where an answer ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from htsr.errors import BadInput
from owlore.data.examples import ALPACA_INTRODUCTION, INSTRUCTION, RESPONSE, Example

TEXT_PIECE = 1 << 15  # characters of a long text given to the tokenizer at once
Turns = tuple[tuple[str, str], ...]


class Piece(NamedTuple):
    """A stretch of text that is tokenised on its own."""

    text: str
    trained: bool = False
    ends: bool = False  # an end-of-sequence token follows, trained as this piece is


@dataclass(frozen=True, slots=True)
class Row:
    """The pieces of one row of tokens."""

    pieces: tuple[Piece, ...]
    special: bool = True  # the tokenizer's own leading tokens (<s>) are added; a chat template writes them itself
    windows: bool = False  # longer than seq_len: several rows instead of one that is cut


def rows_of(example: Example, tokenizer: Any, number: int = 0) -> list[Row]:
    """The row of an example; several when a chat template hides earlier turns (see `chat_rows`).

    Raises: BadInput when the chat template refuses the dialogue; `number` names the row then.
    """
    if example.text is not None:
        return [text_row(example.text)]
    if example.messages is None:
        return [Row((Piece(example.prompt or ""), answer(example.answer or "")))]
    if not getattr(tokenizer, "chat_template", None):
        return [plain_dialogue(example.messages)]
    from jinja2.exceptions import TemplateError

    try:
        return chat_rows(example.messages, tokenizer)
    except (TemplateError, TypeError) as error:
        raise BadInput(
            f"row {number}: the tokenizer's chat template refuses its messages "
            f"({', '.join(role for role, _ in example.messages)}): {error}"
        ) from error


def answer(text: str) -> Piece:
    """A trained piece that ends the sequence; an empty answer trains nothing, not even the end."""
    said = bool(text.strip())
    return Piece(text, trained=said, ends=said)


def text_row(text: str) -> Row:
    """A plain text: every token is trained. Long ones are tokenised in stretches that end with a line."""
    if not text.strip():
        return Row((Piece(text),))
    pieces = [Piece(part, trained=True) for part in _stretches(text)]
    pieces[-1] = pieces[-1]._replace(ends=True)
    return Row(tuple(pieces), windows=True)


def _stretches(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > TEXT_PIECE:
        stop = text.rfind("\n", start, start + TEXT_PIECE) + 1 or start + TEXT_PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def plain_dialogue(messages: Turns) -> Row:
    """A dialogue for a tokenizer without a chat template, in the words of the Alpaca prompt.

    One question and its answer give exactly what an Alpaca row gives; a system message replaces the introduction.
    """
    opening = ALPACA_INTRODUCTION
    turns = list(messages)
    if turns and turns[0][0] == "system":
        opening = turns.pop(0)[1] or opening
    pieces, heard = [], opening
    for role, text in turns:
        if role == "assistant":
            pieces += [Piece(heard + RESPONSE), answer(text)]
            heard = ""
        else:
            heard += (INSTRUCTION if role == "user" else f"\n\n### {role.capitalize()}:\n") + text
    return Row(tuple(pieces) or (Piece(heard),))


def chat_rows(messages: Turns, tokenizer: Any) -> list[Row]:
    """A dialogue by the tokenizer's chat template, with the assistant's turns trained.

    The template is rendered up to each assistant turn with the prompt for generation (what a user's request looks
    like) and after it; the difference is the turn, its end-of-turn token included. Some templates rewrite earlier
    turns once later ones follow (they drop the reasoning): then each assistant turn becomes a row of its own, which
    is what the model will see when it answers that turn.
    """
    spoken = [k for k, (role, _) in enumerate(messages) if role == "assistant"]
    if not spoken:
        return [Row((Piece(_render(tokenizer, messages, False)),), special=False)]
    turns = [_assistant_turn(messages, k, tokenizer) for k in spoken]
    full = turns[-1][1]
    if any(not full.startswith(upto) for _, upto in turns):
        return [
            Row((Piece(upto[:start]), *_turn_pieces(upto[start:], messages[k][1], tokenizer, last=True)), special=False)
            for k, (start, upto) in zip(spoken, turns, strict=True)
        ]
    pieces: list[Piece] = []
    done = 0
    for k, (start, upto) in zip(spoken, turns, strict=True):
        pieces.append(Piece(full[done:start]))
        pieces += _turn_pieces(full[start : len(upto)], messages[k][1], tokenizer, last=k == spoken[-1])
        done = len(upto)
    return [Row(tuple(pieces), special=False)]


def _assistant_turn(messages: Turns, k: int, tokenizer: Any) -> tuple[int, str]:
    """Where turn k begins in the text rendered up to and with it, and that text."""
    upto = _render(tokenizer, messages[: k + 1], False)
    if k == 0:
        start, has_header = 0, False
    else:
        before = _render(tokenizer, messages[:k], True)
        start = _common(before, upto)
        has_header = before != _render(tokenizer, messages[:k], False)
    if not has_header:  # the template names the speaker inside the turn: the name is not the answer
        at = upto.find(messages[k][1].strip(), start)
        if at > start and upto[start:at].strip():
            start = at
    return start, upto


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _turn_pieces(turn: str, content: str, tokenizer: Any, *, last: bool) -> list[Piece]:
    """The trained part of a turn and the white space that only separates it from the next one."""
    if not content.strip():
        return [Piece(turn)]
    said = turn.rstrip()
    if said.endswith(tuple(special_tokens(tokenizer))):
        return [Piece(said, trained=True), Piece(turn[len(said) :])]
    return [Piece(turn, trained=True, ends=last)]


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of all tokens that mark structure; one of them at the end of a turn is its end-of-turn token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def _render(tokenizer: Any, messages: Turns, prompt: bool) -> str:
    dialogue = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=prompt)
