"""NeMo Automodel: ``AutoPipeline``, which cuts transformers models by the names of their modules.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/nemo_automodel_pipeline.py

Run with nemo-automodel 0.7.0, torch 2.13.0 and transformers 5.18.0, which it demands. Its requirements bring CUDA; for
the CPU: ``pip install torch==2.13.0 transformers==5.18.0 datasets torchdata einops triton torchao pyyaml numpy`` and
``pip install --no-deps nemo-automodel==0.7.0``.
"""

import torch
import torch.distributed as dist
from nemo_automodel.components.distributed.pipelining import AutoPipeline
from whole_model import MICROBATCHES, RATE, ROWS, STEPS, compare, loss_of, make_batch, make_model

dist.init_process_group("gloo")
pipeline = AutoPipeline(
    world_mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",)),
    pp_schedule="1f1b",
    pp_microbatch_size=ROWS // MICROBATCHES,
    pp_batch_size=ROWS,
    device=torch.device("cpu"),
    scale_grads_in_schedule=True,
).build(make_model(), loss_fn=loss_of)
(model,) = pipeline.parts
optimizer = torch.optim.SGD(model.parameters(), RATE)
means = []
for step in range(STEPS):
    tokens = make_batch(step)
    last = pipeline.info.has_last_stage
    losses = []
    pipeline.step(tokens, target=tokens if last else None, losses=losses if last else None)
    optimizer.step()
    optimizer.zero_grad()
    if losses:
        means.append(torch.stack(losses).mean().detach())
compare(means, model.named_parameters())
dist.destroy_process_group()
