"""A language model for lm-evaluation-harness that reads each shared prefix once.

Requests are token sequences, and most share a prefix: the choices of a question share the question, the questions of a
subject its examples. The sequences of a forward pass form a tree of tokens, and an attention mask lets each token
attend only to its ancestors, so that one forward pass gives every sequence's likelihood, without padding. A model that
does not support such a mask gets padded batches; a test on the model decides, not a list of models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

Tokens = tuple[int, ...]
Score = tuple[float, bool]
DEFAULT_LENGTH = 2048  # positions of a model whose configuration does not have their number
WINDOW = 2048  # tokens of a window of running text; the full length of a modern model would need gigabytes of logits
TOLERANCE = {torch.float32: 1e-4}  # of the mean log-likelihood per token; 5e-2 for 16-bit weights


@dataclass
class Tree:
    """Sequences of tokens as a tree in which each shared prefix appears once.

    Attributes:
        tokens: Token of each node.
        parents: Parent of each node, -1 for a root; a parent comes before its children.
        depths: Position of each node in its sequences.
        paths: Nodes of each sequence.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def new_nodes(self, sequence: Sequence[int]) -> int:
        """Number of nodes that a sequence would add."""
        parent, shared = -1, 0
        for token in sequence:
            child = self._children.get((parent, token))
            if child is None:
                break
            parent, shared = child, shared + 1
        return len(sequence) - shared

    def add(self, sequence: Sequence[int]) -> None:
        """Add a sequence."""
        parent, path = -1, []
        for depth, token in enumerate(sequence):
            child = self._children.get((parent, token))
            if child is None:
                child = len(self.tokens)
                self._children[parent, token] = child
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            path.append(child)
            parent = child
        self.paths.append(path)

    def attended(self) -> np.ndarray:
        """[N, N] bool: row i is true at node i and its ancestors."""
        mask = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask


class Scorer(TemplateLM):
    """A loaded model with the harness's interface.

    Args:
        model: A causal language model of transformers; it is set to evaluation mode.
        tokenizer: Its tokenizer.
        budget: Nodes of a tree, or padded tokens of a batch, in one forward pass; a longer sequence is scored alone.
        max_length: Largest number of tokens of a sequence; None takes the model's.
        advance: Called with the number of requests that are done.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        budget: int = 1024,
        max_length: int | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.budget, self.advance = budget, advance
        text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        positions = getattr(text, "max_position_embeddings", None) or DEFAULT_LENGTH
        self.max_length = min(int(positions), max_length or int(positions))
        window = getattr(text, "sliding_window", None)
        self.sliding = int(window) if window and getattr(text, "use_sliding_window", True) else None
        self.rolling = min(self.max_length, WINDOW)
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.keeps = "logits_to_keep" in inspect.signature(core.forward).parameters
        self.takes_trees = self._takes_trees()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id or 0)

    @property
    def prefix_token_id(self) -> int:
        beginning = self.tokenizer.bos_token_id
        return self.eot_token_id if beginning is None else int(beginning)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token):
            given = {"add_special_tokens": False}
        return list(self.tokenizer(string, **given)["input_ids"])

    # -- likelihoods --------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Score]:
        """(sum of log-probabilities, whether all tokens are greedy) of each continuation; contexts are cut on the left.

        Args:
            requests: (strings, context tokens, continuation tokens) of each request.
        """
        pairs = []
        for _, context, continuation in requests:
            kept = (*context, *continuation)[-(self.max_length + 1) :]
            pairs.append((tuple(kept[:-1]), tuple(kept[-len(continuation) :])))
        scores: list[Score] = [(0.0, False)] * len(pairs)
        for numbers in self._packs([pair[0] for pair in pairs]):
            for number, score in zip(numbers, self._score([pairs[i] for i in numbers]), strict=True):
                scores[number] = score
            self.advance(len(numbers))
        return scores

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of full texts in windows of `rolling` tokens; every token is predicted once."""
        del disable_tqdm
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.rolling,
                context_len=1,
            )  # fmt: skip
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            advance, self.advance = self.advance, lambda done: None
            try:
                sums.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            finally:
                self.advance = advance
            self.advance(1)
        return sums

    def _packs(self, sequences: Sequence[Tokens]) -> Iterator[list[int]]:
        """Indexes of sequences that are scored together within the budget."""
        if not self.takes_trees:
            yield from self._batches(sequences)
            return
        pack: list[int] = []
        tree = Tree()
        for number in sorted(
            range(len(sequences)), key=lambda i: sequences[i]
        ):  # puts shared prefixes next to each other
            if pack and len(tree.tokens) + tree.new_nodes(sequences[number]) > self.budget:
                yield pack
                pack, tree = [], Tree()
            tree.add(sequences[number])
            pack.append(number)
        if pack:
            yield pack

    def _batches(self, sequences: Sequence[Tokens]) -> Iterator[list[int]]:
        """Indexes of sequences for padded batches, the longest first, since it determines a batch's size."""
        batch: list[int] = []
        for number in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
            if batch and (len(batch) + 1) * len(sequences[batch[0]]) > self.budget:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        """Scores of (input tokens without the last of the continuation, continuation tokens)."""
        longest = max(len(read) for read, _ in pairs)
        if self.takes_trees and (self.sliding is None or longest <= self.sliding):
            return self._score_tree(pairs)
        return self._score_padded(pairs)

    @torch.inference_mode()
    def _score_tree(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        tree = Tree()
        for read, _ in pairs:
            tree.add(read)
        wanted = [path[len(path) - len(target) :] for path, (_, target) in zip(tree.paths, pairs, strict=True)]
        nodes = sorted({node for path in wanted for node in path})
        row = {node: i for i, node in enumerate(nodes)}
        logits = self._tree_logits(tree, nodes)
        return [
            _likelihood(logits[[row[node] for node in path]], target)
            for path, (_, target) in zip(wanted, pairs, strict=True)
        ]

    def _tree_logits(self, tree: Tree, nodes: list[int]) -> Tensor:
        """[len(nodes), V] fp32 logits after these nodes."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        blocked = torch.from_numpy(~tree.attended()).to(self.device)
        mask = torch.zeros(blocked.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(blocked, torch.finfo(dtype).min)
        keep = torch.tensor(nodes, device=self.device)
        output = self.model(
            input_ids=torch.tensor([tree.tokens], device=self.device),
            position_ids=torch.tensor([tree.depths], device=self.device),
            attention_mask=mask[None, None],
            use_cache=False,
            **({"logits_to_keep": keep} if self.keeps else {}),
        )
        return (output.logits[0] if self.keeps else output.logits[0, keep]).float()

    @torch.inference_mode()
    def _score_padded(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
        longest = max(len(read) for read, _ in pairs)
        ids = torch.full((len(pairs), longest), self.eot_token_id, device=self.device)
        seen = torch.zeros_like(ids)
        for i, (read, _) in enumerate(pairs):
            ids[i, : len(read)] = torch.tensor(read, device=self.device)
            seen[i, : len(read)] = 1
        logits = self.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        return [
            _likelihood(logits[i, len(read) - len(target) : len(read)].float(), target)
            for i, (read, target) in enumerate(pairs)
        ]

    def _takes_trees(self) -> bool:
        """Whether the score of a sequence in a tree is its score alone, and independent of the other branches.

        The test is a prefix with two branches: the first branch must have the score that it has alone, and the same
        score with another second branch.
        """
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        prefix = tuple(i * 7 % 23 % vocabulary for i in range(6))
        branch, other, third = (tuple((i * k + 3) % 29 % vocabulary for i in range(4)) for k in (5, 11, 13))
        pairs = [((*prefix, *tokens[:-1]), tokens) for tokens in (branch, other, third)]
        dtype = next(self.model.parameters()).dtype
        tolerance = TOLERANCE.get(dtype, 5e-2) * len(branch)
        try:
            both, again = self._score_tree(pairs[:2]), self._score_tree([pairs[0], pairs[2]])
            alone = [self._score_padded([pair])[0] for pair in pairs[:2]]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # the model does not accept such a mask, or positions
        near = all(abs(a[0] - b[0]) <= tolerance * max(1.0, abs(b[0])) for a, b in zip(both, alone, strict=True))
        return near and abs(both[0][0] - again[0][0]) <= tolerance

    # -- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The model's continuation of each prompt up to the first stop; a batch has prompts of similar length."""
        del disable_tqdm
        texts = [""] * len(requests)
        prompts = [tuple(self.tok_encode(request.args[0])) for request in requests]
        settings = dict(requests[0].args[1]) if requests else {}
        beams, length = int(settings.get("num_beams", 1)), int(settings["max_gen_toks"])
        room = self.max_length - length
        budget, self.budget = self.budget, max(1, self.budget // beams)
        try:
            batches = list(self._batches([prompt[-room:] for prompt in prompts]))
        finally:
            self.budget = budget
        for numbers in batches:
            stops = () if beams > 1 else tuple(requests[numbers[0]].args[1].get("until", ()))
            written = self._generate([prompts[i][-room:] for i in numbers], beams, length, stops)
            for number, text in zip(numbers, written, strict=True):
                texts[number] = _until(text, requests[number].args[1].get("until", ()))
            self.advance(len(numbers))
        return texts

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Tokens], beams: int, length: int, stops: Sequence[str]) -> list[str]:
        """Continuations of prompts without sampling, padded on the left with a mask."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = self.eot_token_id if pad is None else int(pad)
        ids = torch.full((len(prompts), longest), pad, device=self.device)
        seen = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
            seen[i, longest - len(prompt) :] = 1
        output = self.model.generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=length, num_beams=beams, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad, eos_token_id=self.tokenizer.eos_token_id,
            **({"stop_strings": list(stops), "tokenizer": self.tokenizer} if stops else {}),
        )  # fmt: skip
        return self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def _likelihood(logits: Tensor, tokens: Tokens) -> Score:
    """The sum of the tokens' log-probabilities, each from its row of logits, and whether each is the most probable."""
    targets = torch.tensor(tokens, device=logits.device)
    chosen = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, 1)
    return float(chosen.double().sum()), bool((logits.argmax(1) == targets).all())


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops; an empty stop is ignored."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
