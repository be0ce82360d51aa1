"""What every rank needs, imported once by the fork server so that a new rank starts in milliseconds."""

import contextlib
import importlib

from tests import api

# torch._dynamo: the first optimizer imports it. pytest: the main module that multiprocessing sets up in each rank.
for _name in ("pytest", "torch.distributed", "torch._dynamo", f"{api.PACKAGE}.schedules", "tests.pipelines"):
    with contextlib.suppress(Exception):  # a missing part is the test's to report, not the server's
        importlib.import_module(_name)
