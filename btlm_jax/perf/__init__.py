"""FLOPs, bytes, chips, collectives and rooflines: what a step costs and how fast it could be."""
