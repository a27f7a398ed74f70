"""Text from a model: greedy by default, sampled with a seed of its own."""

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
    """What the model writes after `prompt`, up to its end-of-sequence token; the same for the same seed.

    form: `plain` continues the prompt as it is; `alpaca` puts it into the Alpaca prompt and `chat` into the
    tokenizer's chat template (without one, into the Alpaca prompt), both as in training. temperature: 0 is greedy.

    Raises: BadInput for a prompt without tokens, or one that leaves the model no room for an answer.
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
    """What the model writes after these tokens; `what` names them in an error. top_k: 0 samples from all tokens.

    Raises: BadInput when there is no token, or no room for an answer.
    """
    import torch

    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise BadInput(f"{what} has no token; expected some text")
    if room is not None and len(ids) >= room:
        raise BadInput(f"{what} has {len(ids)} tokens, and the model reads {room}; shorten it")
    length = max_new_tokens if room is None else min(max_new_tokens, room - len(ids))
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
    """Token ids of the prompt, exactly as the training data would begin."""
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
    """Every token that ends an answer: the tokenizer's, which training appended, and those the model declares."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    own = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def _chat(prompt: str, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return plain_dialogue((("user", prompt), ("assistant", ""))).pieces[0].text
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
