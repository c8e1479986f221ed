# SPDX-License-Identifier: Apache-2.0
"""Whatever a model calls its cache, it is given under that name and found under any."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.errors import UnsupportedModel
from headinfer.hf.cache_name import (
    NAMES,
    cache_argument,
    cache_given,
    cache_name,
    cache_returned,
    names_for,
)


class Stub(nn.Module):
    @property
    def base_model(self) -> nn.Module:
        return self


class Old(Stub):
    def forward(self, input_ids: Any, past_key_values: Any = None, cache: Any = None) -> None:
        """A model whose `cache` is something else."""


class New(Stub):
    def forward(self, input_ids: Any, cache: Any = None) -> None:
        """A model of transformers 5.24 or later."""


class Neither(Stub):
    def forward(self, input_ids: Any) -> None:
        """A model without a cache."""


class Head(Stub):
    def __init__(self) -> None:
        super().__init__()
        self.inner = New()

    @property
    def base_model(self) -> nn.Module:
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """A model that hands on what it is given."""


@pytest.mark.parametrize(
    ("model", "name"), [(Old(), "past_key_values"), (New(), "cache"), (Head(), "cache")]
)
def test_the_name_is_that_of_the_forward_pass(model: Any, name: str) -> None:
    assert cache_name(model) == name
    assert cache_argument(model, 7) == {name: 7}


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Neither takes no cache"):
        cache_name(Neither())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_under_either_name(name: str) -> None:
    assert cache_given({"use_cache": True, name: 7}) == 7
    assert cache_given(dict.fromkeys(NAMES) | {name: 7}) == 7
    assert cache_given({"use_cache": True}) is None


def test_a_model_with_the_old_name_may_mean_something_else_by_the_new() -> None:
    assert cache_given({"cache": 7}, "past_key_values") is None
    assert names_for("cache") == NAMES


def test_an_attached_model_takes_every_name_it_may_and_warns_of_none(
    llama: PreTrainedModel, ids: Any
) -> None:
    found = []
    with headinfer.attach(llama) as run, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names_for(cache_name(llama)):
            output = llama(ids(20), **{name: DynamicCache(config=llama.config)})
            assert cache_returned(output) is run.cache
            assert run.cache is not None
            assert run.cache.get_seq_length() == 20
            found.append(output.logits)
    assert all(torch.equal(logits, found[0]) for logits in found)
