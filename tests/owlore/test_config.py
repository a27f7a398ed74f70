"""The configuration: parsed once, refused with the cure, written and read back unchanged."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from htsr.errors import NotFound, UsageError
from owlore.choices import METHODS
from owlore.config import SETTINGS, TrainConfig, find_config, flag_name, load_yaml, refuse_unaccepted

ODD: dict[str, Any] = {
    "model": "org/name",
    "data": "rows.jsonl",
    "method": "galore",
    "steps": 7,
    "lr": 1e-5,
    "clip": None,
    "rank": "full",
    "refresh": 20,
    "always_on": ("norm", "head"),
    "checkpointing": "on",
    "eval_data": 0.25,
    "eval_every": 3,
    "weight_decay": 0.1,
}


def test_defaults_are_those_of_the_contract() -> None:
    config = TrainConfig.build()
    expected = {
        "table": "auto", "method": "owlore", "batch": 4, "accum": 1, "seq_len": 512, "lr": 3e-4, "schedule": "linear",
        "weight_decay": 0.0, "clip": 1.0, "every": 50, "rank": 128, "refresh": "per-activation", "scale": 1.0,
        "draw": "exact", "floor": None, "on_switch": "drop", "always_on": (), "weights": "auto", "seed": 0,
        "checkpointing": "auto", "device": "auto", "dtype": "auto", "attn": "sdpa", "epochs": 1.0, "steps": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("values", [{}, ODD, {"epochs": 0.5}], ids=["defaults", "odd", "epochs"])
def test_a_saved_configuration_gives_the_same_back(tmp_path: Path, values: dict[str, Any]) -> None:
    config = TrainConfig.build(values)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = TrainConfig.build(file=path)
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_a_saved_configuration_is_complete_and_safe() -> None:
    saved = yaml.safe_load(TrainConfig.build(ODD).to_yaml())
    assert set(saved) == {name for name, spec in SETTINGS.items() if not spec.metadata.get("call")}
    assert set(SETTINGS) - set(saved) == {"resume", "json", "quiet"}


def test_text_yaml_and_python_values_mean_the_same() -> None:
    text = {"lr": "3e-5", "rank": "64", "always_on": "head,embeddings", "clip": "0", "floor": "0.1", "eval_data": "0.1"}
    python = {"lr": 3e-5, "rank": 64, "always_on": ["embeddings", "head"], "clip": None, "floor": 0.1, "eval_data": 0.1}
    file = yaml.safe_load("lr: 3e-5\nrank: 64\nalways_on: [head, embeddings]\nclip: 0\nfloor: .1\neval-data: 0.1\n")
    assert TrainConfig.build(text) == TrainConfig.build(python) == TrainConfig.build(file=file)


def test_yamls_on_and_none_are_words() -> None:
    file = yaml.safe_load("checkpointing: on\nalways-on: none\nrank: full\n")
    config = TrainConfig.build(file=file)
    assert (config.checkpointing, config.always_on, config.rank) == ("on", (), "full")


def test_the_caller_wins_over_the_file_and_the_file_over_the_defaults() -> None:
    config = TrainConfig.build({"lr": 1e-3}, {"lr": 1e-4, "batch": 9})
    assert (config.lr, config.batch, config.accum) == (1e-3, 9, 1)


def test_the_callers_steps_replace_a_files_epochs() -> None:
    config = TrainConfig.build({"steps": 5}, {"epochs": 2})
    assert (config.steps, config.epochs) == (5, None)
    config = TrainConfig.build({"epochs": 2}, {"steps": 5})
    assert (config.steps, config.epochs) == (None, 2.0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"steps": 5, "epochs": 1}, r"--steps 5 and --epochs 1, expected one"),
    "batch": ({"batch": 0}, r"--batch got 0, expected a whole number >= 1"),
    "half": ({"batch": 1.5}, r"--batch got 1.5, expected a whole number"),
    "method": ({"method": "owlor"}, r"--method got 'owlor', expected one of .*; did you mean owlore\?"),
    "rank": ({"rank": "ful"}, r"--rank got 'ful', expected full or a whole number >= 1"),
    "rank 0": ({"rank": 0}, r"--rank got 0"),
    "rank none": ({"rank": None}, r"--rank got None"),
    "floor": ({"floor": 1.0}, r"--floor got 1.0, expected a number >= 0 and < 1"),
    "always_on": ({"always_on": "norm,haed"}, r"--always-on .*embeddings, norm, head; did you mean head\?"),
    "lr": ({"lr": float("nan")}, r"--lr got nan, expected a number > 0"),
    "text lr": ({"lr": "fast"}, r"--lr got 'fast'"),
    "bool": ({"batch": True}, r"--batch got True"),
    "share": ({"eval_data": 1.5}, r"--eval-data got 1.5, expected a share between 0 and 1, or a path"),
    "eval": ({"eval_every": 5}, r"--eval-every was given without --eval-data"),
    "best": ({"keep_best": True, "eval_data": 0.1}, r"--keep-best was given without --eval-every"),
    "packing": ({"packing": True, "group_by_length": True}, r"--packing and --group-by-length, expected one"),
    "warmup": ({"steps": 5, "warmup": 6}, r"--warmup got 6, expected at most the 5 steps"),
    "device": ({"device": "gpu"}, r"--device got 'gpu', expected auto, cpu or cuda"),
    "seed": ({"seed": -1}, r"--seed got -1"),
    "key": ({"lerning_rate": 1}, r"unknown configuration key 'lerning_rate'"),
    "near": ({"epoch": 1}, r"unknown configuration key 'epoch'; did you mean epochs\?"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("way", ["caller", "file"])
def test_wrong_values_are_usage_errors_with_the_cure(name: str, way: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(UsageError, match=message) as caught:
        TrainConfig.build(values) if way == "caller" else TrainConfig.build(file=values)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_every_setting_is_refused_outside_its_values_and_has_help() -> None:
    for name, spec in SETTINGS.items():
        assert spec.metadata["help"].endswith((".", "]")), name
        with pytest.raises(UsageError, match=flag_name(name)):
            TrainConfig.build({name: ["no pair"] if name == "set" else {"not": "a value"}})


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(NotFound):
        load_yaml(path)
    for content in (
        "- a\n- b\n",
        "a: [",
        "!!python/object/apply:os.getcwd []",
        "# " + "x" * 1_000_001,
        "mehtod: owlore\n",
    ):
        path.write_text(content)
        with pytest.raises(UsageError):
            load_yaml(path)
    path.write_text("")
    assert load_yaml(path) == {}


def test_an_option_that_the_method_does_not_read_is_refused() -> None:
    config = TrainConfig.build({"method": "lisa", "rank": 128, "lr": 1e-3})
    assert config.given == {"method", "rank", "lr"}  # 128 is the default, and was asked for all the same
    with pytest.raises(UsageError, match=r"--rank is not read by the method lisa \(its options: --active, --every,"):
        refuse_unaccepted(config, {"every", "active"})
    refuse_unaccepted(config, {"rank"})
    refuse_unaccepted(TrainConfig.build({"method": "lisa", "lr": 1e-3, "batch": 2}), ())  # every method reads these


def test_a_file_that_spells_out_defaults_asks_for_nothing() -> None:
    config = TrainConfig.build(file=TrainConfig.build({"method": "full"}).to_dict())
    refuse_unaccepted(config, ())
    config = TrainConfig.build(file={"method": "full", "rank": 8})
    with pytest.raises(UsageError, match="--rank"):
        refuse_unaccepted(config, ())


def test_a_methods_defaults_fill_in_what_was_not_given() -> None:
    config = TrainConfig.build({"every": 7}, {"rank": 128}).with_defaults({"every": 20, "rank": 16, "active": 2})
    assert (config.every, config.rank, config.active) == (7, 128, 2)
    assert config.given == {"every"}
    assert TrainConfig().with_defaults({"active": 2}).given == frozenset()


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_the_names_of_the_methods_are_those_of_the_strategies() -> None:
    from owlore.strategies import STRATEGIES

    assert tuple(STRATEGIES) == METHODS
    for strategy in STRATEGIES.values():
        for values in (strategy.defaults, strategy.preset):
            assert TrainConfig().with_defaults(values)
        assert strategy.accepted_options <= set(SETTINGS)


RECIPES = sorted((Path(str(files("owlore"))) / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_read_every_option_they_set(recipe: Path) -> None:
    from owlore.strategies import STRATEGIES

    config = TrainConfig.build({"model": "m", "data": "d"}, recipe)
    refuse_unaccepted(config, STRATEGIES[config.method].accepted_options)
    assert find_config(recipe.stem) == recipe
    assert find_config(str(recipe)) == recipe


def test_there_are_recipes_and_an_unknown_one_names_them() -> None:
    assert {"demo", "commonsense-135m", "7b-one-gpu"} <= {path.stem for path in RECIPES}
    with pytest.raises(NotFound, match="commonsense-135m"):
        find_config("nope")
    with pytest.raises(NotFound):
        find_config("../recipes/demo")
