"""One thread, so that timings and floating-point sums do not depend on the machine."""

import torch

pytest_plugins = ["pytester"]

torch.set_num_threads(1)
