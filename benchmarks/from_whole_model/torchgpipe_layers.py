"""torchgpipe: the model written again as an ``nn.Sequential``, its parts on the devices of one process.

    python benchmarks/from_whole_model/torchgpipe_layers.py

Run with torchgpipe 0.0.7, torch 2.13.0 and transformers 5.23.0: ``pip install torch==2.13.0 transformers==5.23.0 numpy
setuptools wheel`` and ``pip install --no-build-isolation torchgpipe==0.0.7``.
"""

import torch
from torch import nn
from torchgpipe import GPipe
from transformers.masking_utils import create_causal_mask
from whole_model import MICROBATCHES, RATE, STEPS, compare, loss_of, make_batch, make_model


class Layer(nn.Module):
    """A layer that makes its own mask and rotary table: only hidden states go from layer to layer."""

    def __init__(self, layer, whole):
        super().__init__()
        self.layer = layer
        self.rotary, self.config = whole.model.rotary_emb, whole.config

    def forward(self, hidden):
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = create_causal_mask(self.config, hidden, None, past_key_values=None, position_ids=positions)
        rotary = self.rotary(hidden, position_ids=positions)
        return self.layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)


whole = make_model()
layers = [Layer(layer, whole) for layer in whole.model.layers]
sequential = nn.Sequential(whole.model.embed_tokens, *layers, whole.model.norm, whole.lm_head)
model = GPipe(sequential, balance=[3, 4], devices=["cpu", "cpu"], chunks=MICROBATCHES)
optimizer = torch.optim.SGD(model.parameters(), RATE)
means = []
for step in range(STEPS):
    tokens = make_batch(step)
    output = model(tokens)
    parts = zip(output.tensor_split(MICROBATCHES), tokens.tensor_split(MICROBATCHES), strict=True)
    losses = [loss_of(logits, part) for logits, part in parts]
    torch.stack(losses).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    means.append(torch.stack(losses).mean().detach())
compare(means, whole.named_parameters())
