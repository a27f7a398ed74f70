"""The single changes of a line that `mutants.py` makes: found in the syntax tree, written into the text.

Only code inside functions is changed, on nodes that begin and end on one line, so every other character of the file
stays. Annotations, decorators, default values, messages of `raise` and f-strings are left alone.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

COMPARE = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "amin": "amax"}
NAMES |= {"amax": "amin", "argmin": "argmax", "argmax": "argmin", "zeros": "ones", "ones": "zeros", "mul_": "div_"}
NAMES |= {"div_": "mul_", "add_": "sub_", "sub_": "add_", "minimum": "maximum", "maximum": "minimum"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Place = tuple[int, int, int, str, str]


@dataclass(frozen=True)
class Change:
    """One change: bytes `start` to `end` of `line` (from 1) of a file become `after`."""

    function: str
    line: int
    start: int
    end: int
    operator: str
    before: str
    after: str
    key: str = ""  # names the change by what it says, not by its file, so that moved code keeps it

    def apply(self, source: str) -> str:
        """The whole text with this change in it."""
        lines = source.encode().split(b"\n")
        text = lines[self.line - 1]
        lines[self.line - 1] = text[: self.start] + self.after.encode() + text[self.end :]
        return b"\n".join(lines).decode()


class Finder:
    """Walks a file and collects the changes of the code inside its functions."""

    def __init__(self, source: str) -> None:
        self.lines = source.encode().split(b"\n")
        self.found: list[Change] = []
        self._visit(ast.parse(source), ())

    def _visit(self, node: ast.AST, path: tuple[str, ...], *, inside: bool = False) -> None:
        if isinstance(node, ast.JoinedStr):  # before Python 3.12 the places inside an f-string are not to be trusted
            return
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            for child in node.body:
                self._visit(child, (*path, node.name), inside=inside or isinstance(node, FUNCTIONS))
            return
        if inside:
            for line, start, end, operator, after in self._changes(node):
                before = self.lines[line - 1][start:end].decode()
                if before and before != after:
                    self.found.append(Change(".".join(path), line, start, end, operator, before, after))
        if isinstance(node, ast.Raise):
            return
        for name, child in ast.iter_fields(node):
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST) and name != "annotation":
                    self._visit(part, path, inside=inside)

    def _text(self, node: Any) -> str:
        return self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def _between(self, a: Any, b: Any, signs: tuple[str, str], operator: str) -> Iterator[Place]:
        """The change of the sign that stands between two operands, where it is on the line of both."""
        if a.end_lineno == b.lineno:
            at = self.lines[b.lineno - 1][a.end_col_offset : b.col_offset].find(signs[0].encode())
            if at >= 0:
                start = a.end_col_offset + at
                yield b.lineno, start, start + len(signs[0]), operator, signs[1]

    def _changes(self, node: Any) -> Iterator[Place]:
        """All changes of this one node: line, first byte, last byte, operator, new text."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self._between(node.left, node.comparators[0], COMPARE[type(node.ops[0])], "compare")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            if not any(isinstance(getattr(side, "value", None), str) for side in (node.left, node.right)):
                yield from self._between(node.left, node.right, ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            yield from self._between(node.target, node.value, ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.BoolOp):
            signs = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self._between(node.values[0], node.values[1], signs, "and/or")
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and node.test.lineno == node.test.end_lineno:
            test = node.test
            yield test.lineno, test.col_offset, test.end_col_offset, "negate", f"(not ({self._text(test)}))"
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            first, second = node.args[:2]
            if first.lineno == second.end_lineno and ast.Starred not in (type(first), type(second)):
                between = self.lines[first.lineno - 1][first.end_col_offset : second.col_offset].decode()
                swapped = f"{self._text(second)}{between}{self._text(first)}"
                yield first.lineno, first.col_offset, second.end_col_offset, "arguments", swapped
        if getattr(node, "lineno", None) is None or node.lineno != node.end_lineno:
            return
        whole = node.lineno, node.col_offset, node.end_col_offset
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            yield *whole, "sign", f"({self._text(node.operand)})"
        elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            value = node.value
            other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
            yield *whole, "constant", repr(other)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            word = node.id if isinstance(node, ast.Name) else node.attr
            if word in NAMES:
                yield node.lineno, node.end_col_offset - len(word), node.end_col_offset, "name", NAMES[word]
        elif isinstance(node, ast.Return) and node.value is not None:
            yield *whole, "return", "return None"
        elif isinstance(node, (ast.Break, ast.Continue)):
            yield *whole, "loop", "continue" if isinstance(node, ast.Break) else "break"
        elif isinstance(node, (ast.Raise, ast.AugAssign)) or self._stores(node):
            yield *whole, "delete", "pass"

    @staticmethod
    def _stores(node: ast.AST) -> bool:
        """A call for its effect, or an assignment into an object. Without a plain name the next line would fail."""
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Call)
        return isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))


def changes_of(source: str) -> list[Change]:
    """All changes of a file, with keys that stay when the function moves to another file."""
    finder = Finder(source)
    seen: Counter[str] = Counter()
    keyed = []
    for c in sorted(finder.found, key=lambda c: (c.line, c.start, c.operator, c.after)):
        line = finder.lines[c.line - 1].decode()
        indent = len(line) - len(line.lstrip())
        says = f"{c.function}|{line.strip()}|{c.start - indent}|{c.operator}|{c.after}"
        key = hashlib.sha256(f"{says}|{seen[says]}".encode()).hexdigest()[:16]
        seen[says] += 1
        keyed.append(replace(c, key=key))
    return keyed
