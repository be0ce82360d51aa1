"""Proof that an order is complete, in a possible sequence, and comes to its end."""

from __future__ import annotations

from pp_runtime.planning.verifier.channels import verify_communication
from pp_runtime.planning.verifier.compute import verify

__all__ = ["verify", "verify_communication"]
