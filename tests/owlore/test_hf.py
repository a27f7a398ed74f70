"""transformers' Trainer: our engine follows it, and it can follow our engine."""

import copy

import pytest
import torch
from makers import byte_tokenizer, save_tiny
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import owlore
from htsr.errors import UsageError
from owlore.data.batches import collate, step_rows
from owlore.data.prepare import prepare
from owlore.hf import bridge
from owlore.optim.update_spec import MasterPolicy, UpdateSpec, planned_state_bytes

ROWS = [{"prompt": f"say {w * n}: ", "completion": w * (n + 1)} for w in "abcdefgh" for n in (1, 2, 5)]


class Batches(IterableDataset):
    """The micro-batches of our own loop in their order, each an item."""

    def __init__(self, model, steps, accum=1):
        data = prepare(ROWS, AutoTokenizer.from_pretrained(model), seq_len=256, seed=0).train
        parts = [rows for step in range(steps)
                 for rows in step_rows(step + 1, batch=4, accum=accum, n=len(data), seed=0)]  # fmt: skip
        self.items = [collate(data, rows) for rows in parts]

    def __iter__(self):
        for item in self.items:
            yield {"input_ids": item.input_ids, "labels": item.labels}


def arguments(tmp_path, steps, **settings):
    return TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=steps, per_device_train_batch_size=1, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, lr_scheduler_type="linear", weight_decay=0.0,
        max_grad_norm=1.0, **{"save_strategy": "no", "optim": "adamw_torch", "learning_rate": 1e-3} | settings,
    )  # fmt: skip


def trainer_of(model, args, steps, place, accum=1, **more):
    return Trainer(model=model, args=args, train_dataset=Batches(place, steps, accum),
                   data_collator=lambda items: items[0], **more)  # fmt: skip


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train_losses(run):
    return run.history.query("split == 'train'")["loss"].tolist()


@pytest.mark.parametrize("accum", [1, 2])
def test_full_fine_tuning_follows_transformers_trainer_loss_for_loss(tmp_path, accum):
    place = save_tiny(tmp_path / "model", blocks=3)
    run = owlore.train(place, ROWS, method="full", steps=20, lr=1e-3, batch=4, accum=accum, out=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(place)
    trainer = trainer_of(model, arguments(tmp_path, 20, gradient_accumulation_steps=accum), 20, place, accum)
    trainer.train()
    assert len(losses_of(trainer)) == 20
    assert train_losses(run) == pytest.approx(losses_of(trainer), rel=1e-5)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "loss" in row]
    assert run.history.query("split == 'train'")["grad_norm"].tolist() == pytest.approx(norms, rel=1e-4)


SAMPLED = {"active": 1, "every": 3, "rank": 8}


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("method", ["owlore", "lisa"])
def test_trainer_with_the_bridge_follows_owlore_train(tmp_path, method, accum):
    place = save_tiny(tmp_path / "model", blocks=4)
    settings = {"method": method, "table": "uniform", **SAMPLED}
    if method == "lisa":
        del settings["rank"]
    run = owlore.train(place, ROWS, steps=10, lr=1e-3, batch=4, accum=accum, seed=0, out=tmp_path / "run", **settings)
    model = AutoModelForCausalLM.from_pretrained(place)
    args = arguments(tmp_path, 10, seed=0, gradient_accumulation_steps=accum)
    trainer = trainer_of(model, args, 10, place, accum, **bridge(model, args, **settings))
    trainer.train()
    assert train_losses(run) == pytest.approx(losses_of(trainer), rel=1e-5)
    # The two losses differ in their last bits, which turns the axes of a basis where singular values are close, and
    # Adam's first step is a sign: weights agree to a part of how far they went, norms of later
    # steps to 5e-4 (1.4e-4 seen on a CPU with AVX-512).
    norms = [row["owlore_grad_norm"] for row in trainer.state.log_history if "owlore_grad_norm" in row]
    ours = run.history.query("split == 'train'")["grad_norm"].tolist()
    assert ours[:6] == pytest.approx(norms[:6], rel=1e-4)
    assert ours == pytest.approx(norms, rel=5e-4)
    assert not any(p.requires_grad for p in model.parameters())
    start = AutoModelForCausalLM.from_pretrained(place).parameters()
    triples = list(zip(run.model.parameters(), model.parameters(), start, strict=True))
    apart, moved = (sum(float((t[0] - t[k]).detach().square().sum()) ** 0.5 for t in triples) for k in (1, 2))
    assert apart <= 0.05 * moved


def test_state_in_a_trainer_is_that_of_the_active_block_and_the_rest_keeps_its_bits(tmp_path):
    place = save_tiny(tmp_path / "model", blocks=4, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = arguments(tmp_path, 8, learning_rate=2e-2)
    pieces = bridge(model, args, table="uniform", active=1, every=1, rank=8)
    optimizer = pieces["optimizers"][0]
    held, drawn = [], set()
    step = optimizer.step

    def watched(closure=None):
        drawn.update(optimizer.rotation.active)
        held.append((optimizer.rotation.optimizer.held().total, optimizer.rotation.optimizer.parked_bytes()))
        return step(closure)

    optimizer.step = watched
    trainer_of(model, args, 8, place, **pieces).train()
    shapes = [tuple(p.shape) for p in model.model.layers[0].parameters()]
    planned = sum(planned_state_bytes(s, torch.bfloat16, UpdateSpec(rank=8), MasterPolicy.MASTER).total for s in shapes)
    # The first step's bases are found in `step`, after it was watched.
    assert held[1:] and all(total <= planned and parked == 0 for total, parked in held)
    assert 0 < len(drawn) < 4 and optimizer.rotation.optimizer.held().total == 0
    for name, p in model.named_parameters():
        changed = ".layers." in name and int(name.split(".")[2]) in drawn
        assert torch.equal(p, before[name]) != changed, name


def test_a_trainer_resumes_inside_a_period_bit_for_bit(tmp_path):
    place = save_tiny(tmp_path / "model", blocks=4)

    def train(resume, **settings):
        model = AutoModelForCausalLM.from_pretrained(place)
        args = arguments(tmp_path, 10, save_strategy="steps", save_steps=5, **settings)
        trainer = trainer_of(model, args, 10, place, **bridge(model, args, table="uniform", **SAMPLED))
        trainer.train(resume_from_checkpoint=resume)
        return losses_of(trainer), dict(model.named_parameters())

    losses, weights = train(None)
    again, resumed = train(str(tmp_path / "trainer/checkpoint-5"))
    assert again[-5:] == losses[-5:]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.parametrize(("settings", "arguments_", "match"), [
    ({"lr": 1e-3}, {}, "lr is not a setting of the bridge"),
    ({"method": "full", "rank": 4}, {}, "--rank is not read by the method full"),
    ({}, {"adam_beta2": 0.95}, "0.95"),
    ({"method": "lora"}, {}, "PEFT"),
])  # fmt: skip
def test_what_the_bridge_cannot_do_is_refused(tmp_path, settings, arguments_, match):
    from makers import tiny_llama

    with pytest.raises(UsageError, match=match):
        bridge(tiny_llama(), arguments(tmp_path, 2, **arguments_), **settings)


def test_a_table_is_scanned_when_none_is_given(tmp_path):
    from makers import tiny_llama

    pieces = bridge(tiny_llama(), arguments(tmp_path, 2), tokenizer=byte_tokenizer(), active=2, quiet=True)
    assert sum(pieces["optimizers"][0].rotation.strategy.config.inclusion) == pytest.approx(2)


def test_a_training_that_was_broken_off_leaves_nothing_that_listens_to_the_next_one(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    place = save_tiny(tmp_path / "model", blocks=3)
    model, args = AutoModelForCausalLM.from_pretrained(place), arguments(tmp_path, 4)
    given = bridge(model, args, table="uniform", quiet=True, **SAMPLED)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, args, 4, place, optimizers=given["optimizers"],
                   callbacks=[*given["callbacks"], Stop()]).train()  # fmt: skip
    copied = copy.deepcopy(model)
    trainers = [trainer_of(m, args, 4, place, **bridge(m, args, table="uniform", quiet=True, **SAMPLED))
                for m in (model, copied)]  # fmt: skip
    for trainer in trainers:
        trainer.train()
    assert losses_of(trainers[0]) == losses_of(trainers[1])
    given["optimizers"][0].finish()  # what a caller does who goes on without a bridge
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_twice_records_each_period_that_trained_something_once_a_training(tmp_path):
    place = save_tiny(tmp_path / "model", blocks=3)
    model, args = AutoModelForCausalLM.from_pretrained(place), arguments(tmp_path, 4)
    given = bridge(model, args, table="uniform", quiet=True, **SAMPLED)
    trainer = trainer_of(model, args, 4, place, **given)
    trainer.train()
    trainer.train()
    past = given["optimizers"][0].rotation.strategy.record.finished
    assert [(finished.period, finished.steps) for finished in past] == [(0, 3), (1, 1), (1, 2), (2, 2)]
    assert all(len(finished.blocks) == 1 for finished in past)
