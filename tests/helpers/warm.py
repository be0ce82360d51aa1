"""What every rank needs, imported once by the fork server so that a new rank starts in milliseconds."""

import contextlib
import importlib
import os

from tests.helpers import api

# torch._dynamo: the first optimizer imports it. pytest: the main module that multiprocessing sets up in each rank.
_ALWAYS = ["pytest", "torch.distributed", "torch._dynamo", f"{api.PACKAGE}.schedules", "tests.helpers.pipelines"]

for _name in _ALWAYS + os.environ.get("PP_TEST_WARM", "").split():
    with contextlib.suppress(Exception):  # a missing part is the test's to report, not the server's
        getattr(importlib.import_module(_name), "warm", lambda: None)()
