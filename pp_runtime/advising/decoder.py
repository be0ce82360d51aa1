"""A decoder of a given shape, of which only sizes and work are asked: what the command line advises for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pp_runtime.advising.tally import DeviceSpeed
from pp_runtime.advising.unit_row import Sample, UnitRow
from pp_runtime.advising.units import Unit, count_units
from pp_runtime.errors import PipelineUsageError


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Of a decoder as Llama's: normalised by RMS, rotary positions, grouped queries, a gated feed-forward part."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    tied: bool = False
    """Whether the head is the embedding."""
    recompute: bool = False
    """Whether layers keep their input alone and run again in the backward."""
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise PipelineUsageError(
                f"{self.heads} heads must divide the hidden size {self.hidden}, and {self.kv_heads} heads of keys and "
                f"values those {self.heads}"
            )

    def units(
        self, batch: int, sequence: int, microbatches: Iterable[int], device: DeviceSpeed
    ) -> dict[int, list[Unit]]:
        """The units for each number of microbatches that a batch of so many sequences is cut into."""
        samples = {}
        for count in microbatches:
            if count > batch:
                raise PipelineUsageError(f"{batch} sequences do not make {count} microbatches")
            tokens = torch.empty(-(-batch // count), sequence, dtype=torch.long, device="meta")
            samples[count] = Sample((tokens,), {}, tokens)
        with torch.device("meta"):
            model = _Decoder(self, min(self.layers, 2)).to(self.dtype)
        row = UnitRow(model, next(iter(samples.values())), "layers", _loss)
        return {count: _with_layers(count_units(row, sample, device), self.layers) for count, sample in samples.items()}


def _with_layers(row: list[Unit], layers: int) -> list[Unit]:
    """The first layer, the second as often as it takes, what comes after."""
    *first, last = row
    alike = [
        replace(first[-1], parameters={(number, key): sizes for key, sizes in first[-1].parameters.items()})
        for number in range(layers - len(first))
    ]
    return [*first, *alike, last]


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2).float(), target.flatten())


class _Decoder(nn.Module):
    def __init__(self, shape: DecoderShape, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self._angles = shape.hidden // shape.heads

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        turns = hidden.new_empty(2, tokens.shape[1], self._angles)
        for layer in self.layers:
            hidden = layer(hidden, turns)
        return self.head(self.norm(hidden))


class _Layer(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        size = shape.hidden // shape.heads
        self._recompute, self._head = shape.recompute, size
        wides = (shape.hidden, shape.kv_heads * size, shape.kv_heads * size)
        self.attention_norm, self.norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.query, self.key, self.value = (nn.Linear(shape.hidden, wide, bias=False) for wide in wides)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.feed_forward, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        if self._recompute:
            return checkpoint(self._run, x, turns, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, turns)

    def _run(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self._attended(self.attention_norm(x), turns)
        normed = self.norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))

    def _attended(self, x: Tensor, turns: Tensor) -> Tensor:
        query, key, value = (
            each(x).unflatten(-1, (-1, self._head)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        query, key = (_turned(each, *turns) for each in (query, key))
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(found.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cosines + torch.cat((-other, one), -1) * sines
