"""transformers' own pipeline: ``from_pretrained`` with ``pp_size``, which infers and generates.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/transformers_pp.py

Run with transformers 5.23.0 and torch 2.13.0: ``pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
numpy``. The last rank's logits have a gradient, which ends at that rank's first layer.
"""

import tempfile

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from whole_model import make_batch, make_model

dist.init_process_group("gloo")
rank = dist.get_rank()
whole, tokens = make_model().eval(), make_batch(0)
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
if rank == 0:
    whole.save_pretrained(folder[0])
dist.barrier()
model = type(whole).from_pretrained(folder[0], distributed_config=DistributedConfig(pp_size=2), dtype=torch.float32)
logits = model(tokens).logits
far = (logits - whole(tokens).logits).abs().max()
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
same = model.generate(tokens[:1], **options).equal(whole.generate(tokens[:1], **options))
names = len([name for name, _ in model.named_parameters()])
print(f"rank {rank}: {names} parameters, logits off by {far:.1e}, generates the same: {same}", flush=True)
print(f"rank {rank}: logits have a gradient: {logits.requires_grad}", flush=True)
dist.destroy_process_group()
