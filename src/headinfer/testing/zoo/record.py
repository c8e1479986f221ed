# SPDX-License-Identifier: Apache-2.0
"""What one entry of the model zoo is and how its tiny random-weight model is built.

An entry names a transformers model type, the few configuration values that make it tiny, and what must be
true of it: how many of its layers keep their keys and values head by head, and which columns of the matrix
transformers itself cannot run. transformers and torch are imported only when a model is built.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE = 99
TINY: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTJ_SIZES: Mapping[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "rotary_dim": 4,
}
"""What GPT-J and its descendants call the sizes of `TINY`."""
BIAS_NOISE = 0.1


class Kind(enum.Enum):
    """How a model is called: what goes in besides the tokens under test."""

    CAUSAL_LM = "causal-lm"
    ENCODER_DECODER = "encoder-decoder"
    SPEECH = "speech encoder-decoder"
    MULTIMODAL = "multimodal, text only"


class TokenTypes(enum.Enum):
    """What `token_type_ids` say about the first tokens of the prompt, for models that read them."""

    NONE = enum.auto()
    IMAGE_BLOCK = enum.auto()
    PREFIX = enum.auto()


class Column(enum.Enum):
    """One way of running a model whose result must equal that of the resident cache."""

    ONE_SHOT = "one-shot"
    CHUNKED = "chunked + decode"
    PADDED = "left-padded batch"
    GREEDY = "greedy"
    GREEDY_CHUNKED = "greedy after chunks"
    BEAMS = "3 beams"


class ModelAbsent(LookupError):
    """The installed transformers has no such model type or class."""


class Flaw(NamedTuple):
    """What transformers itself gets wrong, and the version that no longer does, if any."""

    reason: str
    fixed_in: str = ""

    def __bool__(self) -> bool:
        """The installed transformers has it."""
        return not _installed(self.fixed_in)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tiny model and what is expected of it."""

    name: str
    model_class: str
    head_wise: int
    layers: int
    config: Mapping[str, Any]
    model_type: str
    kind: Kind = Kind.CAUSAL_LM
    since: str = ""
    unchunkable: Flaw | None = None
    skips: Mapping[Column, Flaw] = field(default_factory=dict)
    token_types: TokenTypes = TokenTypes.NONE

    @property
    def has_encoder(self) -> bool:
        """The tokens under test go to the decoder of an encoder-decoder."""
        return self.kind in (Kind.ENCODER_DECODER, Kind.SPEECH)

    def columns(self) -> tuple[Column, ...]:
        """The columns that the installed transformers can run."""
        return tuple(column for column in Column if not self.skips.get(column))

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A seeded model in evaluation mode, fp32, with the attention implementation `eager`.

        Raises:
            ModelAbsent: the installed transformers does not have this model, or not in working order.
        """
        if self.since and not _installed(self.since):
            raise ModelAbsent(f"{self.name} works from transformers {self.since} on")
        return build_model(self.model_type, self.model_class, self.config, seed)


@dataclass(frozen=True, slots=True)
class Refused:
    """A tiny model that the streaming path must refuse, and why; from transformers `until` on it is
    one of the zoo's entries."""

    name: str
    model_class: str
    reason: str
    materializes: bool
    config: Mapping[str, Any]
    model_type: str
    until: str = ""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """As `Entry.build`."""
        if _installed(self.until):
            raise ModelAbsent(f"{self.name} streams from transformers {self.until} on")
        return build_model(self.model_type, self.model_class, self.config, seed)


def entry(
    name: str,
    model_class: str,
    head_wise: int,
    layers: int = 2,
    *,
    model_type: str = "",
    kind: Kind = Kind.CAUSAL_LM,
    since: str = "",
    unchunkable: Flaw | None = None,
    skips: Mapping[Column, Flaw] | None = None,
    token_types: TokenTypes = TokenTypes.NONE,
    tiny: Mapping[str, Any] = TINY,
    **config: Any,
) -> Entry:
    """An entry whose configuration is `tiny` with `config` on top."""
    merged = {**tiny, "num_hidden_layers": layers, **config} if tiny is TINY else {**tiny, **config}
    return Entry(
        name,
        model_class,
        head_wise,
        layers,
        merged,
        model_type or name,
        kind,
        since,
        unchunkable,
        skips or {},
        token_types,
    )


def refused(
    name: str,
    model_class: str,
    reason: str,
    *,
    materializes: bool,
    model_type: str = "",
    until: str = "",
    **config: Any,
) -> Refused:
    """A refused model whose configuration is `TINY` with `config` on top."""
    merged = {**TINY, **config}
    return Refused(name, model_class, reason, materializes, merged, model_type or name, until)


def build_model(
    model_type: str, model_class: str, config: Mapping[str, Any], seed: int
) -> PreTrainedModel:
    """A seeded model in evaluation mode, fp32, with `eager` attention and noise on every vector.

    Vectors (biases, norms, sinks) start as constants in most models; without noise a lost bias would
    change nothing.

    Raises:
        ModelAbsent: the installed transformers does not have this model.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING or not hasattr(transformers, model_class):
        raise ModelAbsent(
            f"transformers {transformers.__version__} has no {model_type} / {model_class}"
        )
    built = CONFIG_MAPPING[model_type](**copy.deepcopy(dict(config)))
    torch.manual_seed(seed)
    # `_from_config` is what every `AutoModel...from_config` calls; some of these classes have no Auto entry.
    model: PreTrainedModel = getattr(transformers, model_class)._from_config(
        built, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=BIAS_NOISE)
    generation = model.generation_config
    if generation is not None:
        # Without an end token every run yields the same number of tokens.
        generation.eos_token_id = None
        generation.pad_token_id = 0
    return model.float().eval()


def _installed(version: str) -> bool:
    """The installed transformers is at least `version`; never for an empty one."""
    import transformers

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2]]

    return bool(version) and numbers(transformers.__version__) >= numbers(version)
