"""Generating text with a model: greedy by default, or sampled with a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from htsr.errors import BadInput, UsageError
from owlore.data.examples import alpaca_prompt
from owlore.data.templates import plain_dialogue
from owlore.data.tokenise import leading_tokens


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    form: str = "plain",
) -> str:
    """The model's continuation of a prompt, up to its end-of-sequence token; it is the same for the same seed.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        max_new_tokens: Largest number of new tokens.
        temperature: Temperature of sampling; 0 is greedy.
        seed: Seed of sampling.
        form: "plain" continues the prompt itself; "alpaca" puts it into the Alpaca prompt and "chat" into the
            tokenizer's chat template (without one, into the Alpaca prompt), both as in training.

    Raises:
        BadInput: The prompt has no token, or is as long as the model's context or longer.
        UsageError: The form is unknown.
    """
    ids = prompt_ids(prompt, tokenizer, form)
    return continue_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, what="--prompt"
    )


def continue_ids(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_k: int = 0,
    what: str = "the prompt",
) -> str:
    """The model's continuation of a list of tokens, as text.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompt.
        max_new_tokens: Largest number of new tokens.
        temperature: Temperature of sampling; 0 is greedy.
        seed: Seed of sampling.
        top_k: Number of most probable tokens to sample from; 0 samples from all.
        what: Name of the prompt in error messages.

    Raises:
        BadInput: There is no token, or the prompt is as long as the model's context or longer.
    """
    import torch

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise BadInput(f"{what} has no token; expected some text")
    if context is not None and len(ids) >= context:
        raise BadInput(f"{what} has {len(ids)} tokens, and the model reads {context}; shorten it")
    length = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    inputs = torch.tensor([ids], device=model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    )
    ends = ending_tokens(model, tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=length,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
                **sampling,
            )
    finally:
        model.train(training)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def prompt_ids(prompt: str, tokenizer: Any, form: str) -> list[int]:
    """Token ids of the prompt, as the training data begin.

    Raises:
        UsageError: The form is unknown.
    """
    render: dict[str, Callable[[], str]] = {
        "plain": lambda: prompt,
        "alpaca": lambda: alpaca_prompt(prompt),
        "chat": lambda: _chat(prompt, tokenizer),
    }
    if form not in render:
        raise UsageError(f"form got {form!r}, expected one of {', '.join(render)}")
    text = render[form]()
    leading = [] if form == "chat" and tokenizer.chat_template else leading_tokens(tokenizer)
    return leading + tokenizer(text, add_special_tokens=False)["input_ids"]


def ending_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, which the training data have, and those of the generation config."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    tokens = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None})


def _chat(prompt: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return plain_dialogue((("user", prompt), ("assistant", ""))).pieces[0].text
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
