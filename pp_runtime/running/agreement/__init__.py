"""What the ranks tell each other before a step, through the store: claims, refusals, failures."""

from __future__ import annotations

from pp_runtime.running.agreement.agreement import Agreement, RankAbsent
from pp_runtime.running.agreement.claims import Claim, check_claims, check_orders, fingerprint
from pp_runtime.running.agreement.deadline import checked_deadline, default_deadline
from pp_runtime.running.agreement.failures import FailureRecord
from pp_runtime.running.agreement.groups import check_ranks_exist, group_or_world, groups_of_stages, remember_group
from pp_runtime.running.agreement.refusals import TellsRefusals, refusals_of, refuse_for

__all__ = [
    "Agreement",
    "Claim",
    "FailureRecord",
    "RankAbsent",
    "TellsRefusals",
    "check_claims",
    "check_orders",
    "check_ranks_exist",
    "checked_deadline",
    "default_deadline",
    "fingerprint",
    "group_or_world",
    "groups_of_stages",
    "refusals_of",
    "refuse_for",
    "remember_group",
]
