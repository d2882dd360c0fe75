"""What a Hugging Face model is fed where nobody says it: tokens, images or sound of the sizes its config tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

_MOST_BYTES = 1 << 32
"""Of inputs that are made as an example."""
_POSITIONS_PER_LABEL = 4
"""Of sound that is written down: a label needs one position, or two where the one before is the same."""
_CHOICES = 2
"""Of each question to a model for multiple choice."""


def default_inputs(model: nn.Module, batch_size: int = 2, sequence_length: int = 128) -> dict[str, Tensor]:
    """Keyword arguments that train a Hugging Face model: token ids, images or mel spectrograms of its own size, sound,
    and labels.

    Raises ValueError, saying what to pass, where the model does not tell what it wants, and for a batch of over 4 GiB.
    """
    of = _Model(model, batch_size, sequence_length)
    if of.config is None or of.main not in of.wanted:
        raise of.ask("the model does not say what its inputs look like")
    makers = {"input_ids": _text, "pixel_values": _images, "input_features": _speech, "input_values": _sound}
    for main, make in makers.items():
        if of.main == main and (inputs := make(of)) is not None:
            return inputs
    raise of.ask(f"what a {of.kind} takes as {of.main} is not known")


def position_limits(told: Callable[[str], Any]) -> dict[str, int]:
    """How many positions a model has, by what its config calls them; `told` gives a config's value, or None.

    T5 and its kin have relative ones alone: their `n_positions` says what they were trained with.
    """
    relative = told("relative_attention_num_buckets") is not None
    names = ("max_position_embeddings", "max_target_positions", *(() if relative else ("n_positions",)))
    return {name: n for name in names if isinstance(n := told(name), int)}


@dataclass(frozen=True)
class _Model:
    """What a model tells of its inputs, and how much of them is wanted."""

    model: nn.Module
    batch: int
    length: int

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", None)

    @property
    def main(self) -> str | None:
        return getattr(self.model, "main_input_name", None)

    @cached_property
    def wanted(self) -> list[str]:
        """The arguments of its forward."""
        return list(inspect.signature(self.model.forward).parameters)

    def length_in(self, config: Any) -> int:
        """Tokens per sample: as many as wanted, or as a config has positions."""
        limits = position_limits(lambda name: getattr(config, name, None))
        return min([self.length, *(n for n in limits.values() if n > 0)])

    def ids(self, vocabulary: int, *shape: int) -> Tensor:
        """Tokens; the first few of a vocabulary may be special ones."""
        self._check_size(8 * prod(shape))
        random = torch.Generator().manual_seed(0)
        return torch.randint(min(4, vocabulary - 1), vocabulary, (self.batch, *shape), generator=random)

    def floats(self, *shape: int) -> Tensor:
        """Random numbers in the dtype of the parameters."""
        self._check_size(4 * prod(shape))
        made = torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(0))
        return made.to(next((p.dtype for p in self.model.parameters() if p.is_floating_point()), made.dtype))

    def classes(self) -> Tensor:
        return torch.zeros(self.batch, dtype=torch.long)

    def _check_size(self, sample_bytes: int) -> None:
        whole_bytes = self.batch * sample_bytes
        if whole_bytes > _MOST_BYTES:
            raise ValueError(
                f"a batch of {self.batch:,} is {whole_bytes / (1 << 30):,.0f} GiB of inputs, and examples are made on "
                f"this host: at most {_MOST_BYTES // sample_bytes:,} of {sample_bytes:,} bytes will do"
            )

    def ask(self, why: str) -> ValueError:
        return ValueError(
            f"example_inputs: {why}. Pass what one data-parallel rank feeds {self.kind}: a tuple of positional or a "
            "mapping of keyword arguments, such as {'input_ids': ids, 'labels': ids}; its forward takes "
            f"{', '.join(self.wanted)}. On the command line a function gives them with the model: file.py:function"
        )


def _text(of: _Model) -> dict[str, Tensor] | None:
    text = of.config.get_text_config() if hasattr(of.config, "get_text_config") else of.config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    if vocabulary < 1:
        raise ValueError(f"the config of the {of.kind} has a vocab_size of {vocabulary}; at least 1 is wanted")
    length = of.length_in(text)
    shape = (_CHOICES, length) if of.kind.endswith("ForMultipleChoice") else (length,)
    ids = of.ids(vocabulary, *shape)
    return {"input_ids": ids, **_beside(of, ids)}


def _beside(of: _Model, ids: Tensor) -> Mapping[str, Tensor]:
    """What goes with tokens: labels, or else what else forward cannot do without."""
    if "start_positions" in of.wanted and "end_positions" in of.wanted:
        return {"start_positions": of.classes(), "end_positions": of.classes()}
    if "labels" not in of.wanted:
        if "pixel_values" in of.wanted:
            raise of.ask(f"a {of.kind} reads images too, and which go with which text is not known")
        return {"decoder_input_ids": ids.clone()} if "decoder_input_ids" in of.wanted else {}
    if of.kind.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        return {"labels": of.classes()}
    if of.kind.endswith("ForTokenClassification"):
        return {"labels": torch.zeros_like(ids)}
    if of.kind.endswith(("LM", "LMHeadModel", "ForConditionalGeneration", "ForPreTraining")):
        return {"labels": ids.clone()}
    raise of.ask(f"the labels of a {of.kind} are not known")


def _images(of: _Model) -> dict[str, Tensor] | None:
    vision = getattr(of.config, "vision_config", of.config)
    size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if not (isinstance(height, int) and isinstance(width, int)) or "input_ids" in of.wanted:
        return None
    if "labels" not in of.wanted:
        return {"pixel_values": of.floats(channels, height, width)}
    if not of.kind.endswith("ForImageClassification"):
        raise of.ask(f"the labels of a {of.kind} are not known")
    return {"pixel_values": of.floats(channels, height, width), "labels": of.classes()}


def _speech(of: _Model) -> dict[str, Tensor] | None:
    """Whisper and its kin: mel spectrograms of the length that the encoder has positions for, halved by its stem."""
    bins, frames = (getattr(of.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(frames, int) or not of.kind.endswith("ForConditionalGeneration"):
        return None
    labels = of.ids(of.config.vocab_size, of.length_in(of.config))
    return {"input_features": of.floats(bins, 2 * frames), "labels": labels}


def _sound(of: _Model) -> dict[str, Tensor] | None:
    """wav2vec2 and its kin: samples of which convolutions make one position more than wanted, at most."""
    strides, vocabulary = (getattr(of.config, name, None) for name in ("conv_stride", "vocab_size"))
    if not isinstance(strides, (list, tuple)) or not isinstance(vocabulary, int):
        return None
    samples = of.floats(prod(strides) * (of.length + 1))
    if of.kind.endswith("ForSequenceClassification"):
        return {"input_values": samples, "labels": of.classes()}
    if not of.kind.endswith("ForCTC"):
        return None
    return {"input_values": samples, "labels": of.ids(vocabulary, max(1, of.length // _POSITIONS_PER_LABEL))}
