"""accelerate: ``prepare_pippy``, which infers.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/accelerate_pippy.py --rows 2

Run with accelerate 1.15.0, torch 2.13.0 and transformers 5.23.0: ``pip install torch==2.13.0 accelerate==1.15.0
transformers==5.23.0 numpy``. With microbatches of a row each; it pads every other number of rows (8 in two to 10),
which the traced model then refuses.
"""

import torch
from accelerate import PartialState, prepare_pippy
from whole_model import make_batch, make_model

state = PartialState(cpu=True)
model = make_model().eval()
tokens = make_batch(0)
with torch.no_grad():
    expected = model(tokens).logits
    model = prepare_pippy(model, example_args=(tokens[: len(tokens) // state.num_processes],))
    output = model(tokens)
if state.is_last_process:
    print(f"cut at {model.hf_split_points}; logits off by {(output - expected).abs().max():.1e}", flush=True)
state.destroy_process_group()
