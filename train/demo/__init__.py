"""The quickstart, and the checkpoint that the notebooks load."""
