"""Converting examples to pieces of text: those that are only read, those that are trained, and where an answer ends."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from htsr.errors import BadInput
from owlore.data.examples import ALPACA_INTRODUCTION, INSTRUCTION, RESPONSE, Example

TEXT_PIECE = 1 << 15  # characters of a long text given to the tokenizer at once
Turns = tuple[tuple[str, str], ...]


class Piece(NamedTuple):
    """A piece of text that is tokenised separately.

    Attributes:
        text: The text.
        trained: Whether its tokens are targets.
        ends: Whether an end-of-sequence token follows, which is trained if the piece is.
    """

    text: str
    trained: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The pieces of one row of tokens.

    Attributes:
        pieces: The pieces in order.
        special: Whether the tokenizer's leading tokens (<s>) are added; the text of a chat template already has them.
        windows: Whether a row longer than seq_len becomes several rows instead of being cut.
    """

    pieces: tuple[Piece, ...]
    special: bool = True
    windows: bool = False


def rows_of(example: Example, tokenizer: Any, number: int = 0) -> list[Row]:
    """The row of an example, or several if a chat template drops earlier turns (see `chat_rows`).

    Args:
        example: The example.
        tokenizer: The tokenizer, for its chat template and special tokens.
        number: Number of the row in error messages.

    Raises:
        BadInput: The chat template refuses the dialogue.
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
    """A trained piece that ends the sequence; an empty answer is not trained and has no end-of-sequence token."""
    filled = bool(text.strip())
    return Piece(text, trained=filled, ends=filled)


def text_row(text: str) -> Row:
    """A plain text, all of whose tokens are trained; a long one is tokenised in pieces that end with a line."""
    if not text.strip():
        return Row((Piece(text),))
    pieces = [Piece(part, trained=True) for part in _parts(text)]
    pieces[-1] = pieces[-1]._replace(ends=True)
    return Row(tuple(pieces), windows=True)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > TEXT_PIECE:
        stop = text.rfind("\n", start, start + TEXT_PIECE) + 1 or start + TEXT_PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def plain_dialogue(messages: Turns) -> Row:
    """A dialogue for a tokenizer without a chat template, in the format of the Alpaca prompt.

    One question and its answer give the same pieces as an Alpaca row; a system message replaces the introduction.
    """
    opening = ALPACA_INTRODUCTION
    turns = list(messages)
    if turns and turns[0][0] == "system":
        opening = turns.pop(0)[1] or opening
    pieces, prompt = [], opening
    for role, text in turns:
        if role == "assistant":
            pieces += [Piece(prompt + RESPONSE), answer(text)]
            prompt = ""
        else:
            prompt += (INSTRUCTION if role == "user" else f"\n\n### {role.capitalize()}:\n") + text
    return Row(tuple(pieces) or (Piece(prompt),))


def chat_rows(messages: Turns, tokenizer: Any) -> list[Row]:
    """A dialogue in the tokenizer's chat template, with the assistant's turns trained.

    The template is rendered up to each assistant turn with the generation prompt, and again with the turn; the
    difference is the turn with its end-of-turn token. Some templates rewrite earlier turns when later ones follow (they
    drop the reasoning). Then each assistant turn becomes a row, with the text that the model reads when it answers.
    """
    answered = [k for k, (role, _) in enumerate(messages) if role == "assistant"]
    if not answered:
        return [Row((Piece(_render(tokenizer, messages, False)),), special=False)]
    turns = [_assistant_turn(messages, k, tokenizer) for k in answered]
    full = turns[-1][1]
    if any(not full.startswith(upto) for _, upto in turns):
        return [
            Row((Piece(upto[:start]), *_turn_pieces(upto[start:], messages[k][1], tokenizer, last=True)), special=False)
            for k, (start, upto) in zip(answered, turns, strict=True)
        ]
    pieces: list[Piece] = []
    done = 0
    for k, (start, upto) in zip(answered, turns, strict=True):
        pieces.append(Piece(full[done:start]))
        pieces += _turn_pieces(full[start : len(upto)], messages[k][1], tokenizer, last=k == answered[-1])
        done = len(upto)
    return [Row(tuple(pieces), special=False)]


def _assistant_turn(messages: Turns, k: int, tokenizer: Any) -> tuple[int, str]:
    """The position of turn k in the text rendered up to and with that turn, and this text."""
    upto = _render(tokenizer, messages[: k + 1], False)
    if k == 0:
        start, has_header = 0, False
    else:
        before = _render(tokenizer, messages[:k], True)
        start = len(os.path.commonprefix([before, upto]))  # noqa: RUF071 - by characters, they are no paths
        has_header = before != _render(tokenizer, messages[:k], False)
    if not has_header:  # the template writes the role inside the turn, where it is not part of the answer
        at = upto.find(messages[k][1].strip(), start)
        if at > start and upto[start:at].strip():
            start = at
    return start, upto


def _turn_pieces(turn: str, content: str, tokenizer: Any, *, last: bool) -> list[Piece]:
    """The trained part of a turn, and the white space between it and the next one."""
    if not content.strip():
        return [Piece(turn)]
    text = turn.rstrip()
    if text.endswith(tuple(special_tokens(tokenizer))):
        return [Piece(text, trained=True), Piece(turn[len(text) :])]
    return [Piece(turn, trained=True, ends=last)]


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts of all special tokens; one at the end of a turn is its end-of-turn token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


def _render(tokenizer: Any, messages: Turns, prompt: bool) -> str:
    dialogue = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=prompt)
