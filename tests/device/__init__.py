"""The code that other devices run, on a pretend one: ``pytest tests/device``, in a process of its own.

A backend is registered once, for the whole process, and makes `torch.accelerator` report a device to all other
tests; so nothing here is collected unless it is named.
"""
