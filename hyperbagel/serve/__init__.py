"""The OpenAI-compatible server: `create_app` in app.py, the engine in worker.py, the command in cli_serve.py."""
