"""An asynchronous accelerator without hardware, and pp_runtime tested on it: see docs/lanes.md."""
