"""Runs of these tests draw no plots: they take longer than a few steps of a tiny model, and other tests look at them."""

import pytest


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr("owlore.train.run.save_plots", lambda run: None)
