"""MT-Bench: FastChat's files in, FastChat's files out, judged by a server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import makers
import pytest
from click.testing import CliRunner

from htsr.errors import HtsrError, UsageError
from owlore.cli import cli
from owlore.evaluation.judge import Judge, judge_from
from owlore.evaluation.mt_bench import answer_all, fill, judge_all, rating, read_bench, scores

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["name a {hat}", "name it again"]},
    {"question_id": 111, "category": "math", "turns": ["1 and 1?", "and 1 more?"]},
]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    place = tmp_path / "data" / "mt_bench"
    place.mkdir(parents=True)
    prompts = [
        {"name": "single-v1", "system_prompt": "plain", "prompt_template": "Q {question} A {answer}"},
        {"name": "single-math-v1", "system_prompt": "maths",
         "prompt_template": "Q {question} R {ref_answer_1} A {answer}"},
        {"name": "single-v1-multi-turn", "system_prompt": "two",
         "prompt_template": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"},
        {"name": "single-math-v1-multi-turn", "system_prompt": "maths, two",
         "prompt_template": "R {ref_answer_1} R {ref_answer_2} Q {question_2} A {answer_2}"},
    ]  # fmt: skip
    reference = {"question_id": 111, "choices": [{"index": 0, "turns": ["two", "three"]}]}
    for name, lines in (("question", QUESTIONS), ("judge_prompts", prompts), ("reference_answer_gpt-4", [reference])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


class Server:
    """Counts requests; `failures` of them get HTTP 500 first."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failures = 0
        self.says = {"plain": "fine. Rating: [[7]]", "maths": "Rating: [[2.5]]", "two": "good [9]", "maths, two": "?"}


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code = 500 if state.failures > 0 else 200 if self.path == "/v1/chat/completions" else 404
            state.failures -= 1
            if code == 200:
                state.seen.append(body)
                state.keys.append(self.headers["Authorization"])
            said = state.says[body["messages"][0]["content"]]
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{http.server_address[1]}/v1"
    http.shutdown()
    http.server_close()
    thread.join()


def answers(bench: Path, path: Path) -> tuple[Any, list[dict[str, Any]]]:
    read = read_bench(bench)
    model, tokenizer = makers.tiny_llama(blocks=1), makers.byte_tokenizer(64)
    return read, answer_all(model, tokenizer, read.questions, model_id="m", path=path, max_new_tokens=5)


def test_answers_are_in_fastchats_format_and_go_on_where_they_stopped(bench: Path, tmp_path: Path) -> None:
    path = tmp_path / "model_answer" / "m.jsonl"
    _, made = answers(bench, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [81, 111]
    for line in lines:
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert len(line["choices"][0]["turns"]) == 2
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 40])  # killed while the second line was written
    _, again = answers(bench, path)
    assert [one["choices"] for one in again] == [one["choices"] for one in made]
    assert again[0]["tstamp"] == made[0]["tstamp"]
    assert len(path.read_text().splitlines()) == 2


def test_each_turn_is_judged_with_its_prompt_and_the_reference_where_one_belongs(
    bench: Path, tmp_path: Path, server: tuple[Server, str]
) -> None:
    state, url = server
    read, made = answers(bench, tmp_path / "a.jsonl")
    judged = judge_all(read, read.questions, made, Judge(url=url, model="j", key="k"), path=tmp_path / "j.jsonl")
    texts = [body["messages"][1]["content"] for body in state.seen]
    first, second = (one["choices"][0]["turns"] for one in made)
    assert texts == [
        f"Q name a {{hat}} A {first[0]}", f"Q name a {{hat}} A {first[0]} Q name it again A {first[1]}",
        f"Q 1 and 1? R two A {second[0]}", f"R two R three Q and 1 more? A {second[1]}",
    ]  # fmt: skip
    assert {(body["model"], body["temperature"]) for body in state.seen} == {("j", 0)}
    assert set(state.keys) == {"Bearer k"}
    assert [line["score"] for line in judged] == [7, 9, 2.5, -1]
    assert scores(read.questions, judged) == {
        "score": pytest.approx((7 + 9 + 2.5) / 3), "first_turn": 4.75, "second_turn": 9.0,
        "categories": {"writing": 8.0, "math": 2.5}, "judged": 3, "without_rating": 1,
    }  # fmt: skip
    judge_all(read, read.questions, made, Judge(url=url, model="j"), path=tmp_path / "j.jsonl")
    assert len(state.seen) == 4, "what was judged is not asked again"


def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_said(
    bench: Path, tmp_path: Path, server: tuple[Server, str]
) -> None:
    state, url = server
    state.failures = 2
    assert Judge(url=url, model="j", wait=0.0).ask("plain", "x") == "fine. Rating: [[7]]"
    state.failures = 99
    with pytest.raises(HtsrError, match="HTTP 500"):
        Judge(url=url, model="j", wait=0.0).ask("plain", "x")
    with pytest.raises(HtsrError, match="HTTP 404"):
        state.failures = 0
        Judge(url=url + "/no", model="j", wait=0.0).ask("plain", "x")
    with pytest.raises(UsageError, match="http"):
        Judge(url="file:///etc/passwd", model="j")


@pytest.mark.parametrize(("text", "value"), [
    ("Rating: [[5]]", 5), ("[[8.5]] or [3]", 8.5), ("[4]", 4), ("5", None), ("[[A]]", None), ("[[10]]", 10),
])  # fmt: skip
def test_ratings_are_read_as_fastchat_reads_them(text: str, value: float | None) -> None:
    assert rating(text) == value


def test_templates_are_filled_in_one_pass() -> None:
    assert fill("{question} {answer} {other}", {"question": "{answer}", "answer": "a"}) == "{answer} a {other}"


def test_the_key_comes_from_the_variable_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    judge = judge_from("https://example.org/v1", "m", "MY_KEY")
    assert judge is not None
    assert judge.key == "secret"
    assert "secret" not in repr(judge)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UsageError, match="MY_KEY"):
        judge_from("https://example.org/v1", "m", "MY_KEY")


def test_the_command_answers_says_what_is_missing_and_judges_when_told_where(
    bench: Path, tmp_path: Path, server: tuple[Server, str]
) -> None:
    _, url = server
    makers.save_tiny(tmp_path / "model", blocks=1)
    common = ["eval", str(tmp_path / "model"), "--tasks", "mt_bench", "--data-dir", str(bench), "--out",
              str(tmp_path / "out"), "--max-new-tokens", "5"]  # fmt: skip
    done = CliRunner().invoke(cli, common, catch_exceptions=False)
    assert "--judge-url" in done.stderr
    assert "2 dialogues answered, not judged" in done.stdout
    judged = CliRunner().invoke(cli, [*common, "--judge-url", url, "--judge-model", "j/1"], catch_exceptions=False)
    assert "first turn      4.75" in judged.stdout
    assert len(list((tmp_path / "out" / "mt_bench").rglob("*.jsonl"))) == 2
