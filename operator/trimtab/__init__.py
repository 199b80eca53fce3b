"""Balances LLM fleets by the tokens of work that each pod still owes."""

__version__ = "0.1.0"
