"""What the process imports from which ranks are forked: torch, and all of a measurement. It computes nothing."""

from importlib import import_module

for name in (
    "hessdiag.analysis",
    "hessdiag.check.gate",
    "hessdiag.check.writers",
    "hessdiag.cli.analyze",
    "hessdiag.cli.check",
    "hessdiag.cli.compare",
    "hessdiag.cli.doctor",
    "hessdiag.integrations",
    "hessdiag.present",
    "hessdiag.schemes.assemble",
    "hessdiag.spectral",
    "tests.models",
    "tests.ranks",
):
    import_module(name)
