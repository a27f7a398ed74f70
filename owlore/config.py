"""The configuration of a training run: one frozen record, from which the command line is generated.

Each field carries its parser and its help, so a default, a limit and a choice exist once. Values come from the
defaults, a YAML file and the caller, later ones winning. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from htsr.errors import NotFound, UsageError, nearest
from owlore.choices import DRAWS, DTYPES, FROZEN, GROUPS, METHODS, ON_SWITCH, SCHEDULES, STATE_BITS
from owlore.options import (
    Parser,
    choice,
    flag,
    integer,
    names,
    number,
    off_or_number,
    one_of_integers,
    pairs,
    share_or_path,
    text,
    true_or_path,
    word_or,
)

MAX_FILE_BYTES = 1_000_000


def option(default: Any, parser: Parser, help: str, **metadata: Any) -> Any:
    """A field of `TrainConfig` with its parser and help.

    Args:
        default: the value where none is given.
        parser: checks a value and makes a typed one.
        help: text of `owlore train --help`.
        **metadata: `method=True` for a setting that only some methods accept; `call=True` for one that belongs to a
            call and not to the run, so that it is neither saved nor compared; `argument=True` for a positional one.
    """
    return field(
        default=default, compare=not metadata.get("call"), metadata={"parser": parser, "help": help, **metadata}
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of `owlore train`. Build it with `build()`; values are parsed and checked here in any case.

    Attributes:
        given: names of the settings that the caller gave; refused when the method does not accept them.
        fixed: names of the settings that a method's defaults must not replace: those given, and all of a file.

    Raises:
        UsageError: a value is wrong, or two settings exclude each other.
    """

    model: str | None = option(None, text(), "Hugging Face id, directory, .gguf file, or demo.", argument=True)
    data: str | None = option(
        None, text("PATH|NAME"), "Alpaca, chat, prompt/completion, text, csv, parquet; a data set name; demo-data."
    )
    table: str = option(
        "auto", text("auto|uniform|FILE"), "Layer table; auto scans the model where the method wants it.", method=True
    )
    method: str = option("owlore", choice(*METHODS), "How to train; see `owlore methods`.")
    out: str | None = option(None, text("DIR"), "Run directory. [default: runs/<model>-<method>-<n>]")
    steps: int | None = option(None, integer(1), "Optimizer steps, instead of --epochs.")
    epochs: float | None = option(None, number(0, above=True), "Passes over the data. [default: 1]")
    batch: int = option(4, integer(1), "Sequences of a micro-batch.")
    accum: int = option(1, integer(1), "Micro-batches of a step.")
    seq_len: int = option(512, integer(2), "Tokens of a row at most; longer ones are cut.")
    group_by_length: bool = option(False, flag(), "Put rows of similar length into a batch: less padding.")
    packing: bool = option(False, flag(), "Put several rows, kept apart, into a sequence of at most --seq-len tokens.")
    lr: float = option(3e-4, number(0, above=True), "Peak learning rate.")
    schedule: str = option("linear", choice(*SCHEDULES), "Learning rate after the warm-up.")
    warmup: int = option(0, integer(0), "Steps in which the learning rate rises from 0.")
    weight_decay: float = option(0.0, number(0), "Decoupled weight decay, on matrices only.")
    clip: float | None = option(1.0, off_or_number(), "Limit of the gradient norm; 0 is none.")
    active: int | None = option(None, integer(1), "Blocks a period. [default: the table's, 5]", method=True)
    every: int = option(50, integer(1), "Steps of a period, after which blocks are drawn anew.", method=True)
    rank: int | str = option(128, word_or(("full",), integer(1)), "Rank of the projected gradients.", method=True)
    refresh: int | str = option(
        "per-activation", word_or(("per-activation",), integer(1)), "Steps between new projections.", method=True
    )
    project_side: str = option(
        "smaller", choice("smaller", "larger"), "Projected side of a matrix; the paper's is the smaller.", method=True
    )
    scale: float = option(1.0, number(0, above=True), "Factor on projected updates.", method=True)
    draw: str = option("exact", choice(*DRAWS), "How blocks are drawn.", method=True)
    floor: float | None = option(
        None, number(0, below=1), "Least inclusion probability of a block. [default: the table's, 0]", method=True
    )
    on_switch: str = option(
        "drop", choice(*ON_SWITCH), "State of blocks that leave: freed, or kept (on the host).", method=True
    )
    always_on: tuple[str, ...] = option(
        (), names(*GROUPS), "Parameters outside the blocks that always train.", method=True
    )
    project_always_on: bool = option(False, flag(), "Project the gradients of always-on matrices too.", method=True)
    set: Mapping[str, Any] | None = option(None, pairs(), "An option of the method's own; see `owlore methods NAME`.")
    preset: str | None = option(None, choice("paper"), "The settings of the method's paper where none are given.")
    residency: str = option(
        "device",
        choice("device", "host"),
        "Where frozen blocks are kept; from the host they are copied when needed.",
    )
    resident_share: float = option(
        0.0, number(0, below=1), "With --residency host: share of the blocks, from the top, that stays on the device."
    )
    frozen: str = option("bf16", choice(*FROZEN), "Format of frozen blocks; bf16 is their own, the others are lossy.")
    offload_activations: bool = option(False, flag(), "Keep what checkpointing keeps in host memory.")
    weights: str = option(
        "auto", choice("auto", "bf16", "bf16-sr", "fp32"), "Precision of trained weights; auto has fp32 masters."
    )
    state_bits: int = option(32, one_of_integers(*STATE_BITS), "Bits of each optimizer moment.")
    checkpointing: str = option("auto", choice("auto", "on", "off"), "Recompute activations in backward.")
    eval_data: str | float | None = option(None, share_or_path(), "Held-out data, or the share of --data to hold out.")
    eval_every: int | None = option(None, integer(1), "Steps between evaluations. [default: before and after]")
    save_every: int | None = option(None, integer(1), "Steps between checkpoints. [default: the last step]")
    keep: int = option(2, integer(1), "Checkpoints to keep.")
    keep_best: bool = option(
        False, flag(), "Keep the checkpoint of the best evaluation too, and export that as model/."
    )
    resume: bool | str = option(False, true_or_path(), "Go on from the newest checkpoint of --out or DIR.", call=True)
    seed: int = option(0, integer(0), "Seed of draws, data order and dropout.")
    device: str = option(
        "auto", text("auto|cpu|cuda[:N]", r"auto|cpu|cuda(:\d+)?", "auto, cpu or cuda[:N]"), "Where to train."
    )
    dtype: str = option("auto", choice("auto", *DTYPES), "Dtype of the loaded weights; auto is the checkpoint's.")
    attn: str = option("sdpa", choice("sdpa", "eager", "flash_attention_2"), "Attention implementation.")
    compile: bool = option(False, flag(), "Compile each block with torch.compile; the first steps take minutes.")
    log_to: tuple[str, ...] = option((), names("tensorboard", "wandb"), "Send the metrics there too; wandb offline.")
    json: bool = option(False, flag(), "Print one JSON object instead of text.", call=True)
    quiet: bool = option(False, flag(), "Nothing on stderr but an error.", call=True)
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    fixed: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, spec in SETTINGS.items():
            value = getattr(self, name)
            if value != spec.default or value is None:
                object.__setattr__(self, name, _parse(name, value))
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"got --steps {self.steps} and --epochs {self.epochs:g}, expected one of them")
        if self.steps is not None and self.warmup > self.steps:
            raise UsageError(f"--warmup got {self.warmup}, expected at most the {self.steps} steps; lower it")
        if self.packing and self.group_by_length:
            raise UsageError("got --packing and --group-by-length, expected one of them: packed sequences are full")
        if self.eval_every is not None and self.eval_data is None:
            raise UsageError("--eval-every was given without --eval-data; name a file or a share to hold out")
        if self.keep_best and self.eval_every is None:
            raise UsageError("--keep-best was given without --eval-every; say how often to evaluate, and on what data")
        changed = {name for name, spec in SETTINGS.items() if getattr(self, name) != spec.default}
        object.__setattr__(self, "given", self.given or frozenset(changed))
        object.__setattr__(self, "fixed", self.fixed | self.given)

    @classmethod
    def build(
        cls, given: Mapping[str, Any] | None = None, file: Mapping[str, Any] | str | Path | None = None
    ) -> TrainConfig:
        """Make the configuration: what the caller gave, then what a file says, then the defaults.

        Without steps and epochs it is one epoch; the caller's steps replace a file's epochs, and the other way round.

        Args:
            given: settings by name, as the caller gave them.
            file: a YAML file, or its contents.

        Raises:
            NotFound: there is no such file.
            UsageError: a name or a value is wrong, or two settings exclude each other.
        """
        asked = {known_name(name): value for name, value in (given or {}).items()}
        content = load_yaml(file) if isinstance(file, str | Path) else file or {}
        filed = {known_name(name): value for name, value in content.items()}
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if asked.get(one) is not None and other not in asked:
                filed.pop(other, None)
        values = filed | asked
        if values.get("steps") is None and values.get("epochs") is None:
            values["epochs"] = 1.0
        parsed = {name: _parse(name, value) for name, value in filed.items()}
        changed = {name for name, value in parsed.items() if value != SETTINGS[name].default}
        return cls(**values, given=frozenset(asked) | changed, fixed=frozenset(asked) | frozenset(filed))

    def with_defaults(
        self, defaults: Mapping[str, Any], method_options: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """Fill in a method's defaults (or its paper's settings) wherever nothing was given.

        Args:
            defaults: settings by name.
            method_options: all of the method's own options, spelled out; they replace `set`.
        """
        values = {name: value for name, value in defaults.items() if name not in self.fixed}
        if method_options is not None:
            values["set"] = method_options
        filled = replace(self, **values)
        for name in ("given", "fixed"):  # the user did not give the defaults
            object.__setattr__(filled, name, getattr(self, name))
        return filled

    def to_dict(self) -> dict[str, Any]:
        """Every setting of the run by name, as plain values; what belongs to one call is left out."""
        plain = {name: getattr(self, name) for name, spec in SETTINGS.items() if not spec.metadata.get("call")}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def to_yaml(self) -> str:
        """The text of config.yaml; `load_yaml` and `build` give the same configuration back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


SETTINGS = {f.name: f for f in fields(TrainConfig) if f.metadata}


def flag_name(name: str) -> str:
    """How a setting is written on the command line."""
    return name.upper() if SETTINGS[name].metadata.get("argument") else "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value as it is typed on the command line: lists with commas, numbers without zeros at the end."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_typed(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed on the command line; True is a bare flag."""
    return " ".join(
        flag_name(name) if value is True else f"{flag_name(name)} {shown(value)}" for name, value in settings.items()
    )


def known_name(name: Any) -> str:
    """The field that a key names (seq-len and seq_len alike).

    Args:
        name: the key.

    Raises:
        UsageError: the key is unknown; the message names the nearest known one.
    """
    plain = str(name).replace("-", "_")
    if plain not in SETTINGS:
        raise UsageError(f"unknown configuration key {str(name)!r}{nearest(plain, SETTINGS)}")
    return plain


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file by field name; at most 1 MB, safe types only.

    Args:
        path: the file.

    Raises:
        NotFound: there is no such file.
        UsageError: it is too large, no YAML or no mapping, or has an unknown key.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise NotFound(f"--config {path}: no such file; give a YAML file, as config.yaml of a run")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size:,} bytes; expected a configuration of at most 1 MB")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UsageError(f"{path}: holds {type(content).__name__}; expected keys with values")
    return {known_name(name): value for name, value in (content or {}).items()}


def find_config(name: str) -> Path:
    """The file that --config names: a path, or a packaged recipe by its name.

    Args:
        name: the path, or the name of the recipe.

    Raises:
        NotFound: it is neither; the message names the recipes.
    """
    path = Path(name).expanduser()
    recipes = Path(str(files("owlore"))) / "recipes"
    packaged = recipes / f"{name}.yaml"
    if path.is_file():
        return path
    if packaged.parent == recipes and packaged.is_file():
        return packaged
    known = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise NotFound(f"--config {name}: no such file; give a YAML file, or one of the recipes {known}")


def refuse_unaccepted(config: TrainConfig, accepted: Collection[str]) -> None:
    """Refuse settings that the user gave and that only other methods accept.

    Args:
        config: the configuration.
        accepted: names of the settings that the method accepts beside those that all methods share.

    Raises:
        UsageError: such a setting was given.
    """
    refused = [
        name
        for name, setting in SETTINGS.items()
        if setting.metadata.get("method") and name in config.given and name not in accepted
    ]
    if refused:
        known = ", ".join(flag_name(name) for name in SETTINGS if name in accepted) or "the common ones"
        raise UsageError(
            f"{flag_name(refused[0])} is not read by the method {config.method} (its options: {known}, and with --set "
            f"those of `owlore methods {config.method}`); leave it out"
        )


def _parse(name: str, value: Any) -> Any:
    spec = SETTINGS[name]
    if value is None and spec.default is None:
        return None
    try:
        return spec.metadata["parser"](value)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{flag_name(name)} got {value!r}, expected {error}") from error
