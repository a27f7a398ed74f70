"""Every option that a method has for itself changes what it does; every paper's preset can be resolved."""

import pytest
from makers import save_tiny

import owlore
from owlore.choices import METHODS
from owlore.config import TrainConfig
from owlore.settings import resolve
from owlore.strategies import STRATEGIES

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]
LOW_RANK = [
    {"residual": "fira"}, {"scaling": "apollo"}, {"scaling": "apollo-mini"}, {"moments": "keep"},
    ({"residual": "fira", "limit": 1.0}, {"residual": "fira", "limit": 9.0}),
]  # fmt: skip
# Per method: what to set instead of the defaults, or two settings to hold against each other.
CHANGES = {
    "owlore": LOW_RANK,
    "galore": LOW_RANK,
    "grass": [{"temperature": 0.05}, {"smoothing": 1.0, "temperature": 0.05},
              ({"forget": 0.9, "temperature": 0.02}, {"forget": 0.0, "temperature": 0.02})],
    "lora": [{"r": 4}, {"alpha": 4}, {"dropout": 0.5}, {"target_modules": "q_proj,v_proj"}, {"init": "gaussian"},
             {"init": "pissa"}],
    "dora": [{"r": 4}, {"alpha": 4}, {"dropout": 0.5}, {"target_modules": "q_proj"}, {"init": "gaussian"}],
    "smt": [{"density": 0.05}, {"block_size": 4}, {"selection": "diagonal"}, {"selection": "random"},
            {"selection": "magnitude"}, {"criterion": "abs_of_mean"}, {"allotment": "per_matrix"},
            ({"warmup_batches": 1}, {"warmup_batches": 4}), {"target_modules": "down_proj"}, {"beta2": 0.5}],
    "dota": [{"num_cores": 2}, {"bond": 2}, {"density": 0.01}, {"init": "random"}, {"target_modules": "q_proj"},
             ({"residual": "explicit"}, {"residual": "explicit", "init": "random"})],
    "qdota": [{"num_cores": 2}, {"bond": 2}, {"density": 0.01}, {"init": "random"}, {"target_modules": "q_proj"},
              {"alternations": 2}],
}  # fmt: skip


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Losses of a short run of a method with these options of its own, made once."""
    place = tmp_path_factory.mktemp("own")
    model = save_tiny(place / "model", blocks=3, width=64)
    made = {}

    def get(method, own):
        key = (method, *sorted(own.items()))
        if key not in made:
            reads = STRATEGIES[method].accepted_options
            settings = {"every": 4 if "rank" in reads else 2, "active": 1} if "every" in reads else {}
            settings |= {"rank": 8} if "rank" in reads else {}
            settings |= {"refresh": 2} if method in ("galore", "owlore") else {}
            settings |= {"table": "uniform"} if "table" in reads else {}
            steps = 9 if method == "grass" else 4
            out = place / str(len(made))
            run = owlore.train(model, ROWS, method=method, steps=steps, lr=1e-2, set=own, out=out, eval_data=0.3,
                               schedule="constant", **settings)  # fmt: skip
            made[key] = [row["loss"] for row in run.rows]
        return made[key]

    return get


def cases():
    return [
        pytest.param(method, change, id=f"{method}-{change}") for method, all_ in CHANGES.items() for change in all_
    ]


def test_every_own_option_has_a_case():
    for method, strategy in STRATEGIES.items():
        pairs = [change if isinstance(change, tuple) else (change,) for change in CHANGES.get(method, [])]
        named = {key for pair in pairs for one in pair for key in one}
        # residual: implicit and explicit are one function (the next test), so that option is seen with another one.
        assert named == set(strategy.method_options), method


@pytest.mark.parametrize(("method", "change"), cases())
def test_an_own_option_changes_the_run(losses, method, change):
    first, second = change if isinstance(change, tuple) else ({}, change)
    assert losses(method, first) != losses(method, second)


def test_implicit_and_explicit_residual_are_one_function(losses):
    assert losses("dota", {"residual": "explicit"}) == pytest.approx(losses("dota", {}), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_preset_can_be_resolved_and_says_all_own_options(method):
    config, strategy = resolve(TrainConfig.build({"method": method, "preset": "paper", "epochs": 1}))
    assert set(config.set or {}) == set(strategy.method_options)
    for name, value in strategy.preset.items():
        assert name == "set" or getattr(config, name) == value
    for key, value in strategy.preset.get("set", {}).items():
        assert config.set[key] == value
