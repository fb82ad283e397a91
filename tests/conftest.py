"""One thread, so that timings and sums do not depend on the machine; and a desk, unless a test says it is CI."""

import os

import torch

pytest_plugins = ["pytester"]

torch.set_num_threads(1)

# The tool reads these: under a CI service it refuses to record baselines and writes annotations and summaries.
for name in [name for name in os.environ if name in ("CI", "GITLAB_CI") or name.startswith("GITHUB_")]:
    del os.environ[name]
