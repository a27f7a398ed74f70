"""The house stands as designed: import arrows point downwards, importing is inert, command lines start at once."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("htsr", "owlore") for path in (ROOT / package).rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, *, everywhere=True):
    """Full names of what a module imports; with everywhere=False only what runs when it is imported."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name}


def edges(path):
    """The modules of both packages that a module imports, lazily too; what only type checkers read is left out."""
    known = {name_of(p) for p in MODULES}
    tree = ast.parse(path.read_text())
    typing = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.If)
              and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)}  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        for name in names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]:
            found |= {next((n for n in (name, name.rpartition(".")[0]) if n in known), name)} & known
    return found - {name_of(path)}


def uses(path, *prefixes, **options):
    return {n for n in imports_of(path, **options) if any(n == p or n.startswith(p + ".") for p in prefixes)}


def in_package(prefix):
    return [path for path in MODULES if name_of(path) == prefix or name_of(path).startswith(prefix + ".")]


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 40
    assert uses(ROOT / "owlore/blocks.py", "htsr.model.blocks")


def test_no_module_imports_itself_by_way_of_others():
    arrows, finished = {name_of(path): edges(path) for path in MODULES}, set()

    def walk(name, trail):
        assert name not in trail, "import circle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for target in sorted(arrows[name]):
                walk(target, [*trail, name])
            finished.add(name)

    for name in arrows:
        walk(name, [])


@pytest.mark.parametrize("path", in_package("htsr"), ids=name_of)
def test_htsr_knows_nothing_of_owlore(path):
    assert not uses(path, "owlore")


@pytest.mark.parametrize("path", in_package("htsr.numerics") + in_package("owlore.kernels"), ids=name_of)
def test_numerics_and_kernels_do_no_io_models_plots_or_configuration(path):
    assert not uses(path, "transformers", "matplotlib", "click", "pandas", "htsr.config", "owlore.config", "htsr.model")


NUMBERS = [
    *in_package("htsr.model"),
    *(ROOT / "htsr" / f"{n}.py" for n in ("probability", "matrix_row", "nulls", "cache")),
]


@pytest.mark.parametrize("path", NUMBERS, ids=name_of)
def test_numbers_know_nothing_of_how_they_are_shown(path):
    shown = ("report", "plots", "comparison_plots", "render", "store", "scan_data", "layer_table", "result", "cli")
    assert not uses(path, "matplotlib", "jinja2", *(f"htsr.{name}" for name in shown))


def test_only_the_layers_are_parsed_in_one_place():
    readers = [f"htsr.model.{name}" for name in ("names", "blocks", "layers")]
    importers = {name_of(path) for path in in_package("owlore") if uses(path, *readers)}
    assert importers == {"owlore.blocks"}


def test_only_sampling_turns_scores_into_draws():
    assert {name_of(p) for p in in_package("owlore") if uses(p, "htsr.probability")} == {"owlore.sampling"}


STRATEGY_FILES = [p for p in in_package("owlore.strategies") if p.stem not in ("__init__", "base", "adapter")]


@pytest.mark.parametrize("path", STRATEGY_FILES, ids=name_of)
def test_a_strategy_imports_no_other_and_not_the_engine(path):
    others = {f"owlore.strategies.{p.stem}" for p in STRATEGY_FILES if p != path}
    assert not uses(path, "owlore.training", *others)


@pytest.mark.parametrize("path", in_package("owlore.optim") + in_package("owlore.kernels"), ids=name_of)
def test_optimizer_and_kernels_know_neither_strategies_nor_the_loop(path):
    assert not uses(path, "owlore.strategies", "owlore.training", "owlore.config", "owlore.data")


def test_no_method_is_named_in_the_engine():
    from owlore.choices import METHODS

    engine = ("training", "activations", "residency", "io", "models", "plan", "run", "optim")
    for path in [path for package in engine for path in in_package(f"owlore.{package}")]:
        words = [node.value for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
        named = {method for method in METHODS if method not in ("full", "owlore") and method in words}
        assert not named, f"{path}: {named}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_one_module_may_talk_to_other_ranks(path):
    assert name_of(path) == "owlore.training.distributed" or not uses(path, "torch.distributed")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_global_random_state_and_no_code_from_text(path):
    source = path.read_text()
    tree = ast.parse(source)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "pickle.load", "pickle.loads", "np.random.seed", "np.random.rand", "print"}


@pytest.mark.parametrize("package", ["htsr", "owlore", "htsr.cli", "owlore.cli", "owlore.config"])
def test_importing_loads_nothing_heavy_and_prints_nothing(package):
    heavy = "{'torch', 'transformers', 'pandas', 'matplotlib', 'weightwatcher', 'scipy'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""


# The packages of owlore from the top down; one imports only those of its own line and below.
LAYERS = [
    ("cli", "__main__", "demo", "compare", "merge", "render"),
    ("hf", "run", "evaluation", "generate"),
    ("plan", "training"),
    ("models", "io", "activations", "settings", "layer_table", "strategies", "residency", "plots"),
    ("optim", "adapters", "data", "injection", "config"),
    ("kernels", "sampling", "blocks", "options", "choices", "patches"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def owlore_part(name):
    return name.split(".")[1] if name.startswith("owlore.") else None


@pytest.mark.parametrize("path", in_package("owlore"), ids=name_of)
def test_arrows_between_the_packages_of_owlore_point_down(path):
    own = owlore_part(name_of(path))
    if own is None:  # owlore/__init__.py imports what users ask it for
        return
    assert own in LEVEL, f"{own} has no place among the packages; give it one"
    upwards = {n for n in edges(path) if (part := owlore_part(n)) not in (None, own) and LEVEL[part] < LEVEL[own]}
    assert not upwards


def test_the_planner_does_not_import_the_engine_nor_the_engine_the_configuration():
    for path in in_package("owlore.plan"):
        assert not uses(path, "owlore.training", "owlore.run")
    for path in in_package("owlore.training"):
        assert not uses(path, "owlore.config", "owlore.settings", "owlore.plan", "owlore.run")


MAY_CALL_BACKWARD = {
    "owlore.training.step", "owlore.training.streamed_step", "owlore.adapters.selection", "owlore.kernels.mpo",
}  # fmt: skip


def calls_backward(path):
    called = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return any(
        isinstance(f, ast.Attribute)
        and (f.attr == "backward" or (f.attr == "grad" and ast.unparse(f.value).endswith("autograd")))
        for f in called
    )


def test_gradients_are_asked_for_in_four_places():
    assert {name_of(path) for path in MODULES if calls_backward(path)} == MAY_CALL_BACKWARD


def test_choices_of_options_are_those_that_are_implemented():
    """`owlore.choices` imports no torch, so that the command line can name them; here each is held against its code."""
    from owlore import choices
    from owlore.adapters import dota_config, smt_config
    from owlore.kernels.block_scores import CRITERIA
    from owlore.models.loading import DTYPES
    from owlore.optim.update_rules import AdamWMoments
    from owlore.residency.formats import FORMATS
    from owlore.sampling import DRAWS
    from owlore.strategies import STRATEGIES
    from owlore.training.schedule import learning_rate

    assert tuple(STRATEGIES) == choices.METHODS
    assert tuple(DRAWS) == choices.DRAWS
    assert tuple(FORMATS) == choices.FROZEN
    assert tuple(DTYPES) == choices.DTYPES
    assert set(smt_config.SELECTIONS) == set(choices.SMT_SELECTIONS)
    assert set(smt_config.ALLOTMENTS) == set(choices.SMT_ALLOTMENTS)
    assert set(CRITERIA) == set(choices.SMT_CRITERIA)
    assert tuple(dota_config.INITS) == choices.DOTA_INITS
    assert tuple(dota_config.RESIDUALS) == choices.DOTA_RESIDUALS
    rates = {s: learning_rate(5, peak=1.0, steps=9, schedule=s, warmup=0) for s in choices.SCHEDULES}
    assert len(set(rates.values())) == len(rates)
    for bits in choices.STATE_BITS:
        AdamWMoments((2, 3), bits=bits, device=torch.device("cpu"))


def public_callables():
    """(name, parameters, docstring) of all that users import, but for methods that override another library's."""
    for module in map(importlib.import_module, ("htsr", "owlore", "owlore.hf", "owlore.adapters", "owlore.sampling")):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", [name for name in own if not name.startswith("_")]):
            thing, full = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isfunction(thing) or inspect.isclass(thing):
                error = inspect.isclass(thing) and issubclass(thing, BaseException)
                yield full, () if error else parameters_of(thing), thing.__doc__ or ""
            for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                function = getattr(function, "__func__", function)
                theirs = [base for base in thing.__mro__ if not base.__module__.startswith(("htsr", "owlore"))]
                if method.startswith("_") or any(hasattr(base, method) for base in theirs):
                    continue
                if inspect.isfunction(function):
                    yield f"{full}.{method}", parameters_of(function), inspect.getdoc(getattr(thing, method)) or ""


def parameters_of(thing):
    """Names that a caller gives, without `*args`, `**kwargs`, private ones and fields of another library's class."""
    found = inspect.signature(thing).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    bases = [base for base in getattr(thing, "__mro__", ()) if not base.__module__.startswith(("htsr", "owlore"))]
    known = {"self", "cls"}.union(*(getattr(base, "__dataclass_fields__", ()) for base in bases))
    return [p.name for p in found if p.kind not in variable and p.name not in known and p.name[0] != "_"]


PUBLIC = sorted({(name, *parameters, text) for name, parameters, text in public_callables()})


@pytest.mark.parametrize("entry", PUBLIC, ids=lambda entry: entry[0])
def test_a_docstring_names_every_parameter_of_what_users_import(entry):
    name, *parameters, text = entry
    missing = [p for p in parameters if not re.search(rf"(?m)^\s*(\w+, )*{p}(, \w+)*( \([^)]*\))?:", text)]
    assert text and not missing, f"{name}: {', '.join(missing) or 'no docstring'}"
