"""The program that the others begin from: one process, no pipeline.

python benchmarks/from_whole_model/unsplit.py
"""

import torch
from whole_model import MICROBATCHES, RATE, STEPS, compare, loss_of, make_batch, make_model

model = make_model()
optimizer = torch.optim.SGD(model.parameters(), RATE)
means = []
for step in range(STEPS):
    tokens = make_batch(step)
    losses = [loss_of(model(part).logits, part) for part in tokens.tensor_split(MICROBATCHES)]
    torch.stack(losses).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    means.append(torch.stack(losses).mean().detach())
compare(means, model.named_parameters())
