"""torch.distributed.pipelining with its tracer, ``pipeline()``, which takes the model as it is.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/torch_traced.py

Run with torch 2.13.0 and transformers 5.23.0: ``pip install torch==2.13.0 transformers==5.23.0 numpy``. With
--tied the two copies of the embedding go apart; the number of rows in a microbatch is the example's.
"""

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline
from whole_model import MICROBATCHES, RATE, STEPS, compare, loss_of, make_batch, make_model

dist.init_process_group("gloo")
rank = dist.get_rank()
example = make_batch(0).tensor_split(MICROBATCHES)[0]
with torch.no_grad():  # else the rotary table, which the model makes under no_grad, is a graph that is cut wrong
    traced = pipeline(make_model(), (example,), split_spec={"model.layers.2": SplitPoint.BEGINNING})
stage = traced.build_stage(rank, torch.device("cpu"))
model = stage.submod
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
