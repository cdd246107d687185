"""An OpenAI-compatible HTTP server.

Data flows through these modules: protocol (bodies of requests, checked) -> service (the thread that
owns the engine) -> answers (bodies of responses) -> app (routes, limits, keys).
"""
