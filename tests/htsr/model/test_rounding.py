"""bfloat16 for the calibration text: chosen only where it is fast and every block's outliers were seen to stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import makers
import numpy as np
import pytest
import torch

from htsr.model import calibration, rounding
from htsr.model.calibration import calibrate
from htsr.model.open import open_source
from htsr.model.outlier_pooling import Outliers
from htsr.model.rounding import judge, relative_change
from htsr.numerics import bf16


def lods(*values: float) -> list[Outliers]:
    return [Outliers(lod=value, lod_weight=0.0) for value in values]


def verdict(exact: list[Outliers], rounded: list[Outliers], size: int = 1_000_000) -> rounding.Rounding:
    return judge((size, a, b) for a, b in zip(exact, rounded, strict=True))


def test_what_hardly_moves_is_safe() -> None:
    found = verdict(lods(1.0, 0.5), lods(1.002, 0.5))
    assert found.dtype == torch.bfloat16
    assert found.record()["dtype"] == "bfloat16"
    assert "0.13%" in found.why  # 0.5 / 1.502 against 0.5 / 1.5


@pytest.mark.parametrize(
    ("rounded", "says"),
    [
        ((1.0, 0.506), "block 1 moves by 1.20%"),
        ((1.0, float("nan")), "block 1"),
        ((1.009, 0.498), "share of the table"),
    ],
)
def test_what_moves_further_is_not_and_the_block_is_named(rounded: tuple[float, float], says: str) -> None:
    found = verdict(lods(1.0, 0.5), lods(*rounded))
    assert found.dtype == torch.float32
    assert says in found.why


def test_a_handful_of_outliers_is_no_ground_to_judge_on() -> None:
    assert verdict(lods(1.0), lods(1.0), size=40_000).dtype == torch.bfloat16
    few = verdict(lods(1.0), lods(1.0), size=10_000)
    assert few.dtype == torch.float32
    assert "100 outliers" in few.why


def test_the_first_block_that_moves_ends_the_probe() -> None:
    def blocks() -> Iterator[tuple[int, Outliers, Outliers]]:
        yield 10_000_000, *lods(1.0, 2.0)
        raise AssertionError("went on")

    assert judge(blocks()).dtype == torch.float32


def test_relative_change_has_its_limits() -> None:
    assert [relative_change(a, b) for a, b in [(0, 0), (2, 1), (0, 1)]] == [0.0, 0.5, float("inf")]
    assert np.isnan(relative_change(float("nan"), 1.0))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the rain in spain stays mainly in the plain, and so it goes on. " * 40)
    return path


def run(text: Path, *, width: int, exact: bool = False, samples: int = 12) -> calibration.Calibration:
    model = makers.tiny_llama(blocks=3, width=width, hidden=2 * width)
    with torch.no_grad():  # outliers enough to count
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1 + 3 * torch.rand(parameter.shape[1], generator=makers.generator(1)) ** 6)
    source, tokenizer = open_source(model), makers.byte_tokenizer()
    return calibrate(source, text, tau=2.0, samples=samples, seq_len=24, tokenizer=tokenizer, exact=exact)


@pytest.mark.parametrize("width", [32, 128])
def test_with_bf16_units_the_text_runs_in_bf16_where_that_is_safe_and_the_lods_agree(
    width: int, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = run(text, width=width, exact=True)
    assert exact.rounding.record() == {"dtype": "float32", "why": "it was asked for"}
    monkeypatch.setattr(calibration, "has_bf16_units", lambda device: True)
    monkeypatch.setattr(rounding, "FEWEST", 10)
    monkeypatch.setattr(rounding, "MOST_SHARE", 0.01)  # so small a block has few to count
    found = run(text, width=width)
    assert found.rounding.dtype == torch.bfloat16, found.rounding.why
    assert any(found.blocks[i].halves != exact.blocks[i].halves for i in range(3))  # it really was another run
    for index, block in exact.blocks.items():
        assert found.blocks[index].lod == pytest.approx(block.lod, rel=0.01)
        assert found.blocks[index].lod_weight == block.lod_weight


def test_without_units_or_with_little_text_it_stays_in_fp32_and_says_why(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "has_bf16_units", lambda device: False)
    assert run(text, width=32).rounding.why == "cpu has no bfloat16 units"
    monkeypatch.setattr(calibration, "has_bf16_units", lambda device: True)
    assert "4 windows" in run(text, width=32, samples=4).rounding.why


def test_units_are_what_linux_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(bf16, "Path", lambda _: info)
    monkeypatch.setattr(rounding, "cpu_flags", bf16.cpu_flags.__wrapped__)
    for flags, expected in [("fpu avx512_bf16 sse", True), ("amx_bf16", True), ("avx512f avx_bf16x", False)]:
        info.write_text(f"flags : {flags}\n")
        assert rounding.has_bf16_units(torch.device("cpu")) is expected
    assert not rounding.has_bf16_units(torch.device("meta"))
