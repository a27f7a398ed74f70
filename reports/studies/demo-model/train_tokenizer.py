"""A byte-level BPE tokenizer of 1,024 pieces, learnt from the training text alone.

    python train_tokenizer.py build/demo-model

Byte level: every text can be encoded and comes back unchanged, also what the King James text never uses.
Writes `build/demo-model/tokenizer/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1024
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2
MAX_LENGTH = 512


def learn(text: str) -> PreTrainedTokenizerFast:
    """No token is added to a text by itself: who wants <s> in front or </s> behind says so."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False, **SPECIAL
    )


def main(work: Path) -> None:
    text = (work / "train.txt").read_text(encoding="utf-8")
    tokenizer = learn(text)
    tokenizer.save_pretrained(work / "tokenizer")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    print(f"{len(tokenizer)} pieces; {len(text):,} characters -> {len(ids):,} tokens, {len(text) / len(ids):.3f} each")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo-model"))
