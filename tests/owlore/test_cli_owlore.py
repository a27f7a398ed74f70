"""The command line of owlore as a user meets it: help, exit codes, one error line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import makers
import pytest
from click.testing import CliRunner

from htsr import console
from owlore.choices import METHODS
from owlore.cli import cli
from owlore.config import SETTINGS, TrainConfig, flag_name
from owlore.render import run_text


def owlore(*arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from owlore.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["methods", "-h"]])
def test_help_is_quick_and_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from owlore.cli import main; main()"
    )
    times = []
    for _ in range(3):
        started = _processor_seconds()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        times.append(_processor_seconds() - started)
    assert done.stderr.strip() == "HEAVY []"
    assert done.stdout.startswith("Usage:")
    assert min(times) < 0.3  # the contract's, of the processor: other work hardly disturbs it


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_setting_is_an_option_with_its_help() -> None:
    text = CliRunner().invoke(cli, ["train", "--help"], terminal_width=200).output
    for name, spec in SETTINGS.items():
        assert flag_name(name) in text, name
        if not spec.metadata.get("argument"):
            assert " ".join(spec.metadata["help"].split()) in " ".join(text.split()), name


def captured(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> TrainConfig:
    """The configuration that `owlore train ARGUMENTS` hands on."""
    import owlore.run.api as engine

    seen: list[TrainConfig] = []

    def stop(config: TrainConfig) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_from_config", stop)
    CliRunner().invoke(cli, ["train", *arguments])
    return seen[0]


def test_the_command_line_reaches_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = captured(
        monkeypatch, "demo", "--data", "demo-data", "--steps", "3", "--rank", "full", "--always-on", "norm,head",
        "--lr", "1e-3", "--eval-data", "0.1", "--out", "x", "--quiet", "--resume",
    )  # fmt: skip
    expected = {"model": "demo", "data": "demo-data", "steps": 3, "rank": "full", "always_on": ("norm", "head"),
                "lr": 1e-3, "eval_data": 0.1, "out": "x", "quiet": True, "resume": True}  # fmt: skip
    assert config == TrainConfig.build(expected)
    assert (config.quiet, config.resume, config.json) == (True, True, False)
    assert config.given == set(expected)


def test_resume_takes_a_directory_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["demo", "--data", "demo-data"]
    assert captured(monkeypatch, *common).resume is False
    assert captured(monkeypatch, *common, "--resume", "runs/a").resume == "runs/a"
    assert captured(monkeypatch, *common, "--resume", "--seed", "4").resume is True


def test_the_command_line_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: demo\ndata: demo-data\nlr: 1e-2\nbatch: 7\n")
    config = captured(monkeypatch, "--config", str(tmp_path / "c.yaml"), "--lr", "1e-4")
    assert (config.model, config.lr, config.batch) == ("demo", 1e-4, 7)
    assert captured(monkeypatch, "--config", "demo").data == "demo-data"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "demo", "--dta", "x"], 2, "no such option --dta; did you mean --data?"),
        (["train", "demo", "--data", "demo-data", "--rank", "x"], 2, "--rank got 'x', expected full or a whole number"),
        (["train", "demo"], 2, "--data is missing"),
        (["train", "--data", "demo-data"], 2, "MODEL is missing"),
        (["train", "demo", "--data", "demo-data", "--config", "KEY"], 2, "'lerning_rate'"),
        (["train", "demo", "--data", "demo-data", "--config", "none.yaml"], 5, "no such file"),
        (["trian"], 2, "did you mean train?"),
        (["methods", "owlor"], 2, "did you mean owlore?"),
        (["generate", "demo"], 2, "--prompt"),
    ],
)
def test_wrong_usage_ends_with_one_line_and_its_code(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "KEY").write_text("lerning_rate: 1\n")
    done = owlore(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["KEY"], "a failed start leaves nothing behind"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "missing.jsonl"], 5, "missing.jsonl"),
        (["--data", "EMPTY"], 4, "none of the 1 rows has a trained token"),
        (["--data", "COLUMNS"], 4, "got the columns foo"),
        (["--data", "ROWS", "--method", "full", "--rank", "4"], 2, "--rank is not read by the method full"),
    ],
)
def test_bad_data_end_with_their_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    makers.save_tiny(tmp_path / "model", blocks=2)
    (tmp_path / "EMPTY").write_text('{"prompt": "a", "completion": ""}\n')
    (tmp_path / "COLUMNS").write_text('{"foo": "a"}\n')
    (tmp_path / "ROWS").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()  # saving the model draws a bar
    with pytest.raises(SystemExit) as ended:
        console.run(cli, ["train", "model", *options, "--steps", "1", "--quiet"])
    shown = capfd.readouterr()
    assert ended.value.code == code, shown.err
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1, shown.err
    line = shown.err
    assert message in line
    assert not (tmp_path / "runs").exists()


def test_methods_are_listed_and_described() -> None:
    listed = CliRunner().invoke(cli, ["methods"]).output
    assert [line.split()[0] for line in listed.splitlines() if not line.startswith(" ")] == list(METHODS)
    described = CliRunner().invoke(cli, ["methods", "galore"]).output
    assert "--refresh" in described
    assert "[default: 200]" in described
    assert "--active" not in described
    facts = json.loads(CliRunner().invoke(cli, ["methods", "lisa", "--json"]).output)
    assert facts["lisa"]["options"]["table"] == "uniform"


def test_generation_is_greedy_by_default_and_seeded_otherwise(tmp_path: Path) -> None:
    place = str(makers.save_tiny(tmp_path / "model", blocks=2))

    def write(*options: str) -> str:
        done = CliRunner().invoke(cli, ["generate", place, "--prompt", "the", "--max-new-tokens", "12", *options])
        assert done.exit_code == 0, done.output
        return done.output

    assert write() == write("--seed", "3")
    assert write("--temperature", "2", "--seed", "1") == write("--temperature", "2", "--seed", "1")
    assert write("--temperature", "2", "--seed", "1") != write("--temperature", "2", "--seed", "2")
    assert json.loads(write("--json"))["text"] == write().removesuffix("\n")


def test_generation_equals_the_argmax_of_the_logits() -> None:
    import torch

    from owlore.generate import generate

    model, tokenizer = makers.tiny_llama(), makers.byte_tokenizer()
    ids = tokenizer("the s")["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[5:], skip_special_tokens=True)
    assert generate(model, tokenizer, "the s", max_new_tokens=8) == expected


def test_prompts_are_put_as_in_training() -> None:
    from owlore.data.examples import Example, alpaca_prompt
    from owlore.data.tokenise import encode
    from owlore.generate import prompt_ids

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    for spaced in (False, True):
        tokenizer = makers.bpe_tokenizer(spaced=spaced)
        rows = {
            "plain": Example(prompt="the sky", answer=" is"),
            "alpaca": Example(prompt=alpaca_prompt("the sky"), answer="is"),
            "chat": Example(messages=(("user", "the sky"), ("assistant", "is"))),
        }
        for chat_template in (None, template + "{% if add_generation_prompt %}assistant: {% endif %}"):
            tokenizer.chat_template = chat_template
            for form, row in rows.items():
                ids, trained = encode([row], tokenizer, 512).row(0)
                assert prompt_ids("the sky", tokenizer, form) == ids[: int(trained.argmax())].tolist(), (form, spaced)


def test_the_result_names_what_changed_and_where_it_lies(tmp_path: Path) -> None:
    record = {"eval_loss_first": 2.0, "eval_loss_last": 1.5, "peak_bytes": 2_000_000_000, "tokens_per_s": 1234.0,
              "median_step_seconds": 0.25, "trainable": 0.125}  # fmt: skip
    text = run_text(tmp_path, record)
    for part in ("2.0000 -> 1.5000", "2.00 GB", "1,234 tokens/s", "12.50%", str(tmp_path / "model")):
        assert part in text
    assert "not measured" in run_text(tmp_path, {**record, "eval_loss_first": None})
    best = {"steps": 9, "exported_step": 4, "eval_best": {"step": 4, "loss": 1.25}}
    assert "the best evaluation: 1.2500 at step 4" in run_text(tmp_path, {**record, **best})


def test_a_run_goes_on_by_its_directory_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def here(*arguments: Any) -> tuple[int, str, str]:
        """In this process, which need not start; exit code and what was written."""
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            console.run(cli, [str(argument) for argument in arguments])
        return ended.value.code, *capfd.readouterr()

    model = makers.save_tiny(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": a, "completion": a * 3}) + "\n" for a in "abcdef"))
    run = tmp_path / "run"
    settings = ["--data", rows, "--table", "uniform", "--lr", "0.001", "--out", run]
    code, _, error = here("train", model, *settings, "--steps", 2)
    assert code == 0, error
    another = owlore("train", "--resume", run, "--steps", "4", "--json")  # a process that knows no more than the path
    ways = [(4, another.returncode, another.stdout, another.stderr)]
    ways += [(5, *here("train", "--resume", "--out", run, "--steps", 5, "--json"))]
    for steps, code, shown, error in ways:
        assert code == 0, error
        assert json.loads(shown)["steps"] == steps
        assert json.loads(shown)["config"]["lr"] == 0.001
    code, _, error = here("train", "--resume", tmp_path / "gone")
    assert (code, error.count("\n")) == (5, 1) and "no such run directory" in error
    (run / "run.json").unlink()
    shutil.rmtree(run / "model")
    for command in (["compare", run], ["generate", run, "--prompt", "a"]):
        code, _, error = here(*command)
        assert code == 4 and f"owlore train --resume {run}" in error


def test_a_plan_that_nothing_fits_is_out_of_memory(tmp_path: Path) -> None:
    model = makers.save_tiny(tmp_path / "model")
    done = owlore("plan", model, "--batch", "8", "--fit", "1MB", "--json")  # few alternatives to try
    assert done.returncode == 3 and "nothing fits" in done.stderr
    assert json.loads(done.stdout)["fit"]["fits"] is False
