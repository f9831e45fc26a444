"""The parts of the incremental CIFAR-100 experiment, one subject per file; see the README for the order to read them in."""

import os
import pwd

# A user that is only a number, as in a container, has neither name nor home: PyTorch and Matplotlib ask for them when they are imported.
try:
    pwd.getpwuid(os.getuid())
except KeyError:
    os.environ["USER"] = os.environ.get("USER") or str(os.getuid())
    os.environ.setdefault("HOME", "/")  # as Docker does
