"""What every rank needs, imported once by the fork server so that a new rank starts in milliseconds."""

import contextlib
import importlib
import os

for _name in ("pytest", "torch.distributed", os.environ.get("PP_TEST_WARM", ""), "tests.pipelines"):
    with contextlib.suppress(Exception):  # a missing part is the test's to report, not the server's
        importlib.import_module(_name)
