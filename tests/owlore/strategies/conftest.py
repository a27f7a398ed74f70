"""Runs of these tests draw no plots: that takes longer than their few steps, and other tests look at plots."""

import pytest


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr("owlore.run.lifecycle.save_plots", lambda run: None)
