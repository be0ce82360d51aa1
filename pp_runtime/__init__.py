"""Pipeline-parallel training with the API of torch.distributed.pipelining on a planned C++ runtime."""
