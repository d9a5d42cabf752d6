"""The OpenAI-compatible server: endpoints in app.py (`create_app`), the engine that runs the model in worker.py, the web page in ui/.

A request passes guard.py (host, key, size), is read by incoming.py, waits for worker.py, and leaves through streams.py and outgoing.py.
"""
