"""What is measured: one record a row, and the order in which rows are taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from owlore.residency.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Row:
    """kind: agree, ours, peer or scan. wanted_gib: the issue's bound on the peak, where it has one."""

    name: str
    kind: str
    shape: str
    batch: int = 1
    accum: int = 1
    tokens: int = 512
    gamma: int = 5
    rank: int = 128
    placement: Placement = field(default_factory=Placement)
    always_on: tuple[str, ...] = ()
    peer: str = ""
    steps: int | None = None  # None: L / gamma periods
    wanted_gib: float | None = None


PEERS = ("lora-16", "lisa", "galore", "full")
GROUPS = ("embeddings", "norm", "head")
PLACEMENTS = {
    "device": Placement(),
    "device+int8": Placement(frozen="int8"),
    "device+nf4": Placement(frozen="nf4"),
    "host": Placement(residency="host"),
    "host+int8": Placement(residency="host", frozen="int8"),
    "host+nf4": Placement(residency="host", frozen="nf4"),
    "host+nf4+offload": Placement(residency="host", frozen="nf4", offload=True),
    "host+half": Placement(residency="host", resident_share=0.5),
}
WANTED = {"device": 17.0, "device+nf4": 8.5, "host": 6.3, "host+nf4+offload": 4.0}
# micro-batch, micro-batches, tokens; the rows of the wanted figures first
LOADS = {"16x512": (2, 8, 512), "1x512": (1, 1, 512), "4x2048": (1, 4, 2048)}


def gpu_rows() -> list[Row]:
    rows = [Row(name="agree", kind="agree", shape="llama-2-7b", gamma=2, accum=2)]
    for load, (batch, accum, tokens) in LOADS.items():
        for name, placement in PLACEMENTS.items():
            # Whole rows on the device, where memory does not ask for chunks and a wait for sums would cost some.
            whole = name == "device" and load == "16x512"
            rows.append(Row(name=f"7b {load} {name}", kind="ours", shape="llama-2-7b", placement=placement,
                            tokens=tokens, batch=16 if whole else batch, accum=1 if whole else accum,
                            wanted_gib=WANTED.get(name) if load == "16x512" else None))  # fmt: skip
    rows.append(Row(name="7b 16x512 host, 4 rows at once", kind="ours", shape="llama-2-7b", batch=4, accum=4,
                    placement=PLACEMENTS["host"]))  # fmt: skip
    rows.append(Row(name="7b 16x512 device, paper's set", kind="ours", shape="llama-2-7b", batch=16, always_on=GROUPS,
                    wanted_gib=19.0))  # fmt: skip
    for peer in PEERS:
        rows.append(Row(name=f"7b 16x512 {peer}", kind="peer", shape="llama-2-7b", batch=16, peer=peer, steps=12))
    rows.append(Row(name="8b 1x512 host+nf4, gamma 2", kind="ours", shape="llama-3-8b", gamma=2,
                    placement=PLACEMENTS["host+nf4"], wanted_gib=4.0))  # fmt: skip
    for shape, short in (("llama-3-8b", "8b"), ("mistral-7b", "mistral")):
        for name in ("device", "host", "host+nf4+offload"):
            rows.append(
                Row(
                    name=f"{short} 16x512 {name}",
                    kind="ours",
                    shape=shape,
                    batch=2,
                    accum=8,
                    placement=PLACEMENTS[name],
                )
            )
    rows.append(Row(name="70b 1x512 host+nf4, gamma 2", kind="ours", shape="llama-70b", gamma=2, steps=20,
                    placement=PLACEMENTS["host+nf4"], wanted_gib=12.0))  # fmt: skip
    rows.append(Row(name="scan 7b", kind="scan", shape="llama-2-7b"))
    rows.append(Row(name="scan a 70b block", kind="scan", shape="llama-70b", steps=1))
    return rows


def small_rows() -> list[Row]:
    """The same kinds of rows in a shape for a CPU."""
    common = {"shape": "small", "batch": 2, "accum": 2, "tokens": 24, "rank": 8, "steps": 4}
    rows = [Row(name="agree", kind="agree", **{**common, "steps": None})]
    rows += [
        Row(name=f"small {name}", kind="ours", placement=placement, **common) for name, placement in PLACEMENTS.items()
    ]
    rows.append(Row(name="small device, paper's set", kind="ours", always_on=GROUPS, **common))
    rows += [
        Row(name=f"small {peer}", kind="peer", peer=peer, **common) for peer in ("lora-16", "lisa", "galore", "full")
    ]
    return [*rows, Row(name="scan small", kind="scan", **{**common, "steps": None})]
