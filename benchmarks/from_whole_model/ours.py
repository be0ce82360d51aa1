"""pp_runtime: ``build_pipeline`` on the whole model.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/ours.py

In the environment that ``make build`` made, with transformers.
"""

import torch
import torch.distributed as dist
from whole_model import MICROBATCHES, RATE, STEPS, compare, loss_of, make_batch, make_model

from pp_runtime import build_pipeline

dist.init_process_group("gloo")
model = make_model()
pipeline = build_pipeline(
    model,
    "1F1B",
    microbatches=MICROBATCHES,
    loss_fn=lambda output, target: loss_of(output.logits, target),
    example=(make_batch(0),),
)
optimizer = torch.optim.SGD(pipeline.parameters(), RATE)
means = []
for step in range(STEPS):
    tokens = make_batch(step)
    losses = []
    pipeline.step(tokens, target=tokens, losses=losses)
    optimizer.step()
    optimizer.zero_grad()
    if losses:
        means.append(torch.stack(losses).mean())
compare(means, pipeline.named_parameters())
dist.destroy_process_group()
