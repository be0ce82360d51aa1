"""Proof that an order is complete, in a possible sequence, and comes to its end."""

from pp_runtime.verify.channels import verify_communication
from pp_runtime.verify.compute import verify

__all__ = ["verify", "verify_communication"]
