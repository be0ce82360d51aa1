"""torch.distributed.pipelining with a split by hand: the model's forward is written again for a part of its layers.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/torch_by_hand.py

Run with torch 2.13.0 and transformers 5.23.0: ``pip install torch==2.13.0 transformers==5.23.0 numpy``. An embedding
that is the head, too, is left to the program: with --tied its two copies go apart.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers.masking_utils import create_causal_mask
from whole_model import MICROBATCHES, RATE, STEPS, compare, loss_of, make_batch, make_model


class Part(nn.Module):
    """Some of a Llama's layers, under its names."""

    def __init__(self, whole, rank, ranks):
        super().__init__()
        self.model = whole.model
        layers = whole.model.layers
        self.first, self.last, share = rank == 0, rank == ranks - 1, len(layers) // ranks
        self.model.layers = nn.ModuleDict({str(i): layers[i] for i in range(rank * share, (rank + 1) * share)})
        if not self.first:
            self.model.embed_tokens = None
        if self.last:
            self.lm_head = whole.lm_head
        else:
            self.model.norm = None

    def forward(self, hidden):
        model = self.model
        if self.first:
            hidden = model.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        mask = create_causal_mask(model.config, hidden, None, past_key_values=None, position_ids=positions)
        rotary = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers.values():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return self.lm_head(model.norm(hidden)) if self.last else hidden


dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = Part(make_model(), rank, ranks)
stage = PipelineStage(model, rank, ranks, torch.device("cpu"))
schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=loss_of)
optimizer = torch.optim.SGD(model.parameters(), RATE)
means = []
for step in range(STEPS):
    tokens = make_batch(step)
    losses = []
    if rank == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=tokens, losses=losses)
    optimizer.step()
    optimizer.zero_grad()
    if losses:
        means.append(torch.stack(losses).mean().detach())
compare(means, model.named_parameters())
dist.destroy_process_group()
