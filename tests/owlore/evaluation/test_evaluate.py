"""`owlore eval` as a user meets it: results, exit codes, going on after an interruption, adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import makers
import pytest
from click.testing import CliRunner
from eval_samples import write_data

from htsr import console
from htsr.errors import HtsrError
from owlore.cli import cli
from owlore.evaluation import evaluate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of two blocks and data for it."""
    home = tmp_path_factory.mktemp("eval")
    write_data(home / "data")
    makers.save_tiny(home / "model", blocks=2)
    return home


def answered(place: Path, *arguments: str, model: str = "model") -> dict[str, Any]:
    common = ["eval", str(place / model), "--data-dir", str(place / "data"), "--json", "--quiet"]
    done = CliRunner().invoke(cli, [*common, *arguments], catch_exceptions=False)
    return json.loads(done.stdout)


def test_the_json_result_holds_what_the_contract_says(place: Path) -> None:
    result = answered(place, "--tasks", "arc_easy,boolq,mmlu_anatomy,perplexity,aqua", "--limit", "2")
    assert set(result["tasks"]) == {"arc_easy", "boolq", "mmlu_anatomy", "perplexity", "aqua"}
    for name in ("arc_easy", "boolq", "mmlu_anatomy", "aqua"):
        one = result["tasks"][name]
        assert 0 <= one["acc"] <= 1
        assert one["acc_stderr"] >= 0
        assert one["n"] == 2
        assert len(one["data"]["sha256"]) == 64
    assert result["tasks"]["mmlu_anatomy"]["shots"] == 5
    assert result["protocol"] == "likelihood"
    assert "shots" in result
    assert result["versions"]["lm_eval"]
    assert "not comparable" in result["tasks"]["boolq"]["note"]


def test_both_protocols_ask_for_numbers(place: Path) -> None:
    by_likelihood = answered(place, "--tasks", "svamp")
    generated = answered(place, "--tasks", "svamp,arc_easy", "--protocol", "generate", "--limit", "2")
    assert set(by_likelihood["tasks"]["svamp"]) >= {"acc", "acc_strict", "n"}
    assert generated["template"] == "compat"
    assert generated["tasks"]["arc_easy"]["n"] == 2


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--tasks", "arc_esay"], 2, "did you mean arc_easy?"),
    (["--tasks", "piqa", "--protocol", "likelyhood"], 2, "did you mean likelihood?"),
    (["--tasks", "gsm8k"], 5, "gsm8k/test.jsonl"),
    (["--tasks", "mt_bench"], 5, "question.jsonl"),
    (["--tasks", "mt_bench", "--judge-url", "http://127.0.0.1:9/v1"], 2, "expected both"),
    (["--tasks", "hellaswag", "--data-dir", "BAD"], 4, "row 1 is not one of hellaswag"),
    (["--tasks", "mtbench"], 2, "did you mean mt_bench?"),
])  # fmt: skip
def test_a_failure_ends_with_its_code_and_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: list[str], code: int, message: str,
) -> None:  # fmt: skip
    (tmp_path / "BAD").mkdir()
    (tmp_path / "BAD" / "hellaswag.json").write_text('[{"instruction": "What?", "answer": "ending1"}]')
    monkeypatch.chdir(tmp_path)
    given = [] if "--data-dir" in arguments else ["--data-dir", str(place / "data")]
    with pytest.raises(SystemExit) as ended:
        console.run(cli, ["eval", str(place / "model"), *given, *arguments, "--quiet"])
    shown = capfd.readouterr()
    assert (ended.value.code, shown.out) == (code, ""), shown.err
    (line,) = shown.err.splitlines()
    assert message in line


def test_finished_tasks_are_found_again_and_others_are_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from owlore.evaluation import harness

    model, tokenizer = makers.tiny_llama(seed=3), makers.byte_tokenizer(64)
    done: list[str] = []
    real = harness.run_tasks

    def counted(scorer: Any, asked: Any, *rest: Any) -> Any:
        done.extend(asked)
        if done == ["arc_easy", "piqa"]:
            raise KeyboardInterrupt
        return real(scorer, asked, *rest)

    monkeypatch.setattr(harness, "run_tasks", counted)
    settings: dict[str, Any] = {"data_dir": place / "data", "store": tmp_path, "identity": "weights"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, ["arc_easy", "piqa"], **settings)
    first = evaluate(model, tokenizer, ["arc_easy", "piqa"], **settings)
    assert done == ["arc_easy", "piqa", "piqa"], "what was finished is not done again"
    assert evaluate(model, tokenizer, ["arc_easy", "piqa"], **settings)["tasks"] == first["tasks"]
    assert len(done) == 3
    evaluate(model, tokenizer, ["arc_easy"], **{**settings, "identity": "other weights"})
    evaluate(model, tokenizer, ["arc_easy"], **settings, limit=1)
    assert done[3:] == ["arc_easy", "arc_easy"]


def test_without_the_harness_the_error_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(HtsrError, match=r"pip install 'htsr-owlore\[eval\]'"):
        evaluate(makers.tiny_llama(), makers.byte_tokenizer(64), ["arc_easy"], data_dir=place / "data")


def test_an_adapter_is_measured_on_its_base(place: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with console.quiet_libraries():  # PEFT asks transformers by a name that it is about to drop
        base = AutoModelForCausalLM.from_pretrained(place / "model")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    adapted.save_pretrained(place / "adapter")
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(place / "model")
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = adapted.merge_and_unload()
    tokenizer = makers.byte_tokenizer(64)
    expected = evaluate(merged, tokenizer, ["perplexity"], data_dir=place / "data")["tasks"]["perplexity"]
    plain = answered(place, "--tasks", "perplexity")["tasks"]["perplexity"]
    found = answered(place, "--tasks", "perplexity", model="adapter")
    assert found["tasks"]["perplexity"]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert found["tasks"]["perplexity"]["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-2)


@pytest.mark.parametrize("method", ["lora", "smt", "dota", "qdota", "owlore"])
def test_a_run_directory_gives_what_its_model_in_memory_gives(method: str, place: Path, tmp_path: Path) -> None:
    import owlore

    rows = [{"prompt": "the sea is", "completion": "wet and wide"}, {"prompt": "a hat is", "completion": "worn"}]
    run = owlore.train(str(place / "model"), rows, method=method, steps=1, batch=2, lr=0.1, out=str(tmp_path / "run"),
                       **({"table": "uniform"} if method == "owlore" else {}))  # fmt: skip
    in_memory = evaluate(run.model, run.tokenizer, ["perplexity"], data_dir=place / "data")["tasks"]["perplexity"]
    common = ["eval", str(tmp_path / "run"), "--data-dir", str(place / "data"), "--tasks", "perplexity", "--json"]
    done = CliRunner().invoke(cli, [*common, "--quiet"], catch_exceptions=False)
    found = json.loads(done.stdout)["tasks"]["perplexity"]
    assert found["perplexity"] == pytest.approx(in_memory["perplexity"], rel=1e-6)


def test_a_run_directory_is_measured_by_its_model(place: Path) -> None:
    run = place / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: x\n")
    (run / "model").symlink_to(place / "model", target_is_directory=True)
    assert answered(place, "--tasks", "piqa", model="run")["tasks"] == answered(place, "--tasks", "piqa")["tasks"]


def test_results_and_rows_are_written_where_asked(place: Path, tmp_path: Path) -> None:
    shown = answered(place, "--tasks", "piqa", "--out", str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["acc"] for row in written["tasks"]["piqa"]["rows"]] == [0.0, 1.0, 1.0] or written["tasks"]["piqa"][
        "n"
    ] == 3
    assert "rows" not in shown["tasks"]["piqa"]
    assert written["tasks"]["piqa"]["acc"] == shown["tasks"]["piqa"]["acc"]
