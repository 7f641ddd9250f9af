"""Faults put on purpose: what the tests run briefly at every commit and `scripts/fault_*.py` run for long.

Each module makes one kind of fault and checks the same promises: nothing acknowledged is lost, nothing
damaged is served, and a resumed run ends in the bytes of an undisturbed one.
"""
