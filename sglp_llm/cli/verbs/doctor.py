"""``sglp-llm doctor``."""

from __future__ import annotations

from sglp_llm.cli.options import Json, Quiet
from sglp_llm.cli.quiet import prepare


def doctor(quiet: Quiet = False, as_json: Json = False) -> None:
    """Show what this machine has for the verbs: versions, devices, memory, caches, and what is missing."""
    console = prepare(quiet)
    from sglp_llm.cli.machine import machine, print_machine

    found = machine()
    if as_json:
        console.print_json(found)
    else:
        print_machine(found)
