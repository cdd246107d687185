"""Costs and lower bounds of a step: FLOPs, bytes, chips, collectives and rooflines."""
