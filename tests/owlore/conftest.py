"""Runs draw no plots unless a test asks for `pictures`: three plots take longer than the few steps of a tiny model."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def without_pictures():
    import owlore.run.lifecycle as api

    save_plots = api.save_plots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "save_plots", lambda run: None)
        yield save_plots


@pytest.fixture
def pictures(without_pictures, monkeypatch):
    monkeypatch.setattr("owlore.run.lifecycle.save_plots", without_pictures)
