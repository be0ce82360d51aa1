"""DeepSpeed: the model written again as a list of layers, each of which takes what the one before it gives.

    torchrun --nproc_per_node 2 benchmarks/from_whole_model/deepspeed_layers.py

Run with deepspeed 0.19.8, torch 2.13.0 and transformers 5.23.0, on the CPU: ``pip install torch==2.13.0
deepspeed==0.19.8 transformers==5.23.0 numpy``, and DS_ACCELERATOR=cpu where there is a GPU.
"""

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from whole_model import CONFIG, MICROBATCHES, RATE, ROWS, STEPS, compare, loss_of, make_batch, make_model


class Layer(nn.Module):
    """A layer that makes its own mask and rotary table: only hidden states go from layer to layer."""

    def __init__(self, number):
        super().__init__()
        self.layer = LlamaDecoderLayer(CONFIG, number)
        self.rotary = LlamaRotaryEmbedding(CONFIG)

    def forward(self, hidden):
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = create_causal_mask(CONFIG, hidden, None, past_key_values=None, position_ids=positions)
        rotary = self.rotary(hidden, position_ids=positions)
        return self.layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions)


def name_in_model(name):
    """A parameter's name in the whole model: DeepSpeed's begin with the layer's place in the list."""
    place, _, rest = name.partition(".")
    outer = {0: "model.embed_tokens", layers + 1: "model.norm", layers + 2: "lm_head"}
    place = int(place)
    return f"{outer[place]}.{rest}" if place in outer else f"model.layers.{place - 1}.{rest.removeprefix('layer.')}"


deepspeed.init_distributed("gloo")
layers = CONFIG.num_hidden_layers
model = PipelineModule(
    [
        LayerSpec(nn.Embedding, CONFIG.vocab_size, CONFIG.hidden_size),
        *[LayerSpec(Layer, number) for number in range(layers)],
        LayerSpec(LlamaRMSNorm, CONFIG.hidden_size, CONFIG.rms_norm_eps),
        LayerSpec(nn.Linear, CONFIG.hidden_size, CONFIG.vocab_size, bias=False),
    ],
    num_stages=2,
    loss_fn=loss_of,
)
weights = make_model().state_dict()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name_in_model(name)])
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), RATE),
    config={
        "train_batch_size": ROWS,
        "train_micro_batch_size_per_gpu": ROWS // MICROBATCHES,
        "gradient_accumulation_steps": MICROBATCHES,
        "gradient_clipping": 0.0,  # else 1.0
    },
)
means = []
for step in range(STEPS):
    parts = make_batch(step).tensor_split(MICROBATCHES)
    means.append(engine.train_batch(iter([(part, part) for part in parts])).detach())
compare(means, [(name_in_model(name), parameter) for name, parameter in model.named_parameters()])
engine.destroy()
torch.distributed.destroy_process_group()
